"""The worker pool over a real store: connections, limits, priorities, cancellation, workers that die, and its end."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from support.fake_fetcher import ramp
from support.fetch_rig import CONTENT, SECRET, SIZE, RecordingMetrics, Rig, landed_blocks, landed_bytes, rig
from support.raw_store import ETAG, Answer, End, Request, partial
from valohai_fuse.errors import ConfigurationError
from valohai_fuse.fetch.pool import WorkerPool, open_pool
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.ports import FailureKind, FetchFailed, FetchOrder, Landed, Priority
from valohai_fuse.store.landing import MEMORY_NAME


def _ignore(_: Landed) -> None:
    pass


def _gated(gate: trio.Event) -> Answer:
    """The whole object, once the gate is open."""
    return [gate, partial(CONTENT, 0, SIZE)]


async def _under_way(r: Rig, requests: int) -> None:
    await r.store.wait_until(lambda: len(r.store.requests) >= requests)


def test_sequential_orders_use_one_connection(tmp_path: Path) -> None:
    """A kept connection is used again, in whichever worker it lies."""

    async def scenario() -> None:
        async with rig(tmp_path, workers=3) as r:
            fresh = [(await r.fetch(r.order(name=f"n{i}"))).new_connection for i in range(12)]
            assert fresh == [True] + [False] * 11
            assert r.store.connections == 1
            assert r.pool.statistics().connections_new == 1
            assert r.metrics.counters["connections_opened"] == 1
            assert r.metrics.counters["fetches"] == 12
            assert r.metrics.counters["fetched_bytes"] == 12 * SIZE

    trio.run(scenario)


def _memory(order: FetchOrder) -> str:
    """A memory segment for this order, as the store makes them."""
    fd = os.memfd_create(MEMORY_NAME)
    os.ftruncate(fd, segment.PAGE_BYTES + order.key.size)
    header = segment.encode_header(order.key.stable_id, order.key.size, 0, "")
    os.pwrite(fd, header + segment.EMPTY_TABLE, 0)
    return f"/proc/{os.getpid()}/fd/{fd}"


def test_a_staged_order_lands_in_memory_first_and_is_over_when_its_file_has_it(tmp_path: Path) -> None:
    """Readers go on with `Landed`; at the end memory and file hold the same."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            order = r.order(staging_path=(staging := _memory(r.order())))
            fetched = await r.fetch(order)
            assert fetched.is_kept
            assert r.reports[-1].upto == SIZE
            assert landed_bytes(order) == CONTENT
            assert landed_bytes(replace(order, segment_path=staging)) == CONTENT
            os.close(int(staging.rpartition("/")[2]))

    trio.run(scenario)


@pytest.mark.parametrize("head", ["HTTP/1.1 206 Some", "HTTP/1.1 200 All"])
def test_what_is_received_into_memory_is_what_was_sent(tmp_path: Path, head: str) -> None:
    """In whatever pieces it comes; of an answer that is the whole object no byte beyond the order is taken."""
    size = 20 * BLOCK_BYTES + 77
    content = ramp(size)

    async def scenario() -> None:
        async with rig(tmp_path, content) as r:
            whole = head.endswith("All")
            body = content if whole else content[: -BLOCK_BYTES - 77]
            lines = f"{head}\r\nETag: {ETAG}\r\nContent-Length: {len(body)}\r\n"
            lines += "" if whole else f"Content-Range: bytes 0-{len(body) - 1}/{size}\r\n"
            dice = random.Random(3)
            cuts = sorted(dice.sample(range(1, len(body)), 40))
            pieces = [body[a:b] for a, b in itertools.pairwise((0, *cuts, len(body)))]
            r.store.answers.append([lines.encode() + b"\r\n", *(x for piece in pieces for x in (piece, 0.002))])
            order = r.order(0, size - BLOCK_BYTES - 77, staging_path=(staging := _memory(r.order())))
            await r.fetch(order)
            for landed in (order, replace(order, segment_path=staging)):
                assert landed_bytes(landed) == content[: -BLOCK_BYTES - 77]
            assert len(landed_blocks(replace(order, segment_path=staging))) == 19
            os.close(int(staging.rpartition("/")[2]))

    trio.run(scenario)


def test_a_staged_order_whose_disk_refuses_succeeds_and_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as r:
            plain = r.order()
            order = r.order(segment_path=str(tmp_path / "nowhere" / "x"), staging_path=(staging := _memory(plain)))
            fetched = await r.fetch(order)
            assert (fetched.is_kept, fetched.disk_error) == (False, "No such file or directory")
            assert landed_bytes(replace(order, segment_path=staging)) == CONTENT
            os.close(int(staging.rpartition("/")[2]))

    trio.run(scenario)


def test_what_a_broken_staged_order_has_landed_reaches_its_file(tmp_path: Path) -> None:
    """A connection that breaks in the middle: the whole blocks before that are in memory, and soon on the disk."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            cut = partial(CONTENT, 0, SIZE)[: -2 * BLOCK_BYTES]
            r.store.answers.append([cut, End.CLOSE])
            order = r.order(staging_path=(staging := _memory(r.order())))
            await r.failure(order)
            assert r.reports[-1].upto >= 2 * BLOCK_BYTES
            while len(landed_blocks(order)) * BLOCK_BYTES < r.reports[-1].upto:  # noqa: ASYNC110 - nobody is told
                await trio.sleep(0.01)
            os.close(int(staging.rpartition("/")[2]))

    trio.run(scenario)


def test_connection_survives_a_refusal(tmp_path: Path) -> None:
    """An error that is read to its end leaves the connection usable: a renewal costs no handshake."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append([b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno!"])
            await r.failure(r.order())
            await r.fetch(r.order())
            assert r.store.connections == 1

    trio.run(scenario)


def test_store_that_closes_idle_connections(tmp_path: Path) -> None:
    """A kept connection that the store has closed meanwhile is no failure."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append([partial(CONTENT, 0, SIZE), End.CLOSE])
            await r.fetch(r.order())
            await r.store.wait_until(lambda: r.store.open_connections == 0)
            await r.fetch(r.order())
            assert r.store.connections == 2

    trio.run(scenario)


def test_connections_are_bounded(tmp_path: Path) -> None:
    """Never more requests under way than `connections`, over all workers together."""

    async def scenario() -> None:
        async with rig(tmp_path, workers=2, connections=3) as r:
            gate = trio.Event()
            r.store.answers.extend([_gated(gate)] * 8)
            async with trio.open_nursery() as nursery:
                for i in range(8):
                    nursery.start_soon(r.fetch, r.order(name=f"n{i}"))
                await _under_way(r, 3)
                assert r.pool.statistics().active == 3
                assert r.pool.statistics().waiting == 5
                gate.set()
            assert r.store.open_connections <= 3
            assert r.pool.statistics().requests == 8

    trio.run(scenario)


def test_demand_overtakes_ahead(tmp_path: Path) -> None:
    """AHEAD never takes the last connections, and a demand order that comes later goes first."""

    async def scenario() -> None:
        async with rig(tmp_path, connections=4) as r:
            gate = trio.Event()
            r.store.answers.extend([_gated(gate)] * 4)
            async with trio.open_nursery() as nursery:
                for i in range(6):
                    nursery.start_soon(r.fetch, r.order(name=f"ahead{i}", priority=Priority.AHEAD))
                    await trio.testing.wait_all_tasks_blocked()
                await _under_way(r, 2)
                assert r.pool.statistics().active_ahead == 2
                assert r.pool.statistics().waiting == 4
                for i in range(3):  # one more than there is room for
                    nursery.start_soon(r.fetch, r.order(name=f"demand{i}"))
                    await trio.testing.wait_all_tasks_blocked()
                await _under_way(r, 4)
                gate.set()
            names = [request.target.split(b"?")[0].decode() for request in r.store.requests]
            assert sorted(names[:2]) == ["/ahead0", "/ahead1"]
            assert sorted(names[2:4]) == ["/demand0", "/demand1"]
            assert "/demand2" in names[4:6]

    trio.run(scenario)


def test_promoted_order_stops_being_ahead(tmp_path: Path) -> None:
    """An order that was a guess and is now waited for does not stay behind other guesses."""

    async def scenario() -> None:
        async with rig(tmp_path, connections=3) as r:
            gate = trio.Event()
            r.store.answers.extend([_gated(gate)] * 2)
            orders = [r.order(name=f"ahead{i}", priority=Priority.AHEAD) for i in range(4)]
            async with trio.open_nursery() as nursery:
                for order in orders:
                    nursery.start_soon(r.fetch, order)
                    await trio.testing.wait_all_tasks_blocked()
                await _under_way(r, 1)
                r.pool.promote(orders[3])
                await _under_way(r, 2)
                assert r.store.requests[1].target.startswith(b"/ahead3")
                r.pool.promote(orders[0])  # under way already: nothing to do
                gate.set()

    trio.run(scenario)


def test_cancelling_frees_the_connection(tmp_path: Path) -> None:
    """A caller that goes away ends the transfer in the store's sight, and the next order has its place at once."""

    async def scenario() -> None:
        async with rig(tmp_path, connections=1) as r:
            r.store.answers.append([partial(CONTENT, 0, SIZE)[: 2 * BLOCK_BYTES], End.HANG])
            cancelled = r.order(name="cancelled")
            with trio.CancelScope() as scope:
                await r.pool.fetch(cancelled, lambda _: scope.cancel())
            assert scope.cancelled_caught
            assert r.pool.statistics().active == 0
            await r.fetch(r.order())
            await r.store.wait_until(lambda: r.store.open_connections == 1)
            assert list(landed_blocks(cancelled)) == [0]

    trio.run(scenario)


def test_cancelling_a_waiting_order(tmp_path: Path) -> None:
    """An order that was never sent leaves no trace."""

    async def scenario() -> None:
        async with rig(tmp_path, connections=1) as r:
            gate = trio.Event()
            r.store.answers.append(_gated(gate))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.fetch, r.order())
                await _under_way(r, 1)
                with trio.move_on_after(0.02):
                    await r.fetch(r.order(name="never"))
                assert r.pool.statistics().waiting == 0
                gate.set()
            assert len(r.store.requests) == 1

    trio.run(scenario)


def test_killed_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All orders of a worker that dies fail as WORKER_LOST; the next order starts another worker and works."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.extend([[End.HANG]] * 3)
            failures: list[FetchFailed] = []

            async def expect_loss(order: FetchOrder) -> None:
                failures.append(await r.failure(order))

            async with trio.open_nursery() as nursery:
                for i in range(3):
                    nursery.start_soon(expect_loss, r.order(name=f"n{i}"))
                await _under_way(r, 3)
                (pid,) = r.pool.worker_pids
                os.kill(pid, signal.SIGKILL)
            assert [failed.kind for failed in failures] == [FailureKind.WORKER_LOST] * 3
            assert r.pool.statistics().workers == 0
            order = r.order()
            await r.fetch(order)
            assert landed_bytes(order) == CONTENT
            assert r.pool.worker_pids != (pid,)

    trio.run(scenario)
    assert "died with 3 orders" in caplog.text
    assert SECRET not in caplog.text


def test_killed_idle_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that dies without orders is replaced without anyone noticing."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            await r.fetch(r.order())
            os.kill(r.pool.worker_pids[0], signal.SIGKILL)
            await r.metrics.wait_gauge("workers", 0)
            await r.fetch(r.order())

    trio.run(scenario)
    assert caplog.text == ""


def test_worker_ignores_ctrl_c(tmp_path: Path) -> None:
    """Ctrl-C on the terminal is the daemon's business."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            await r.fetch(r.order())
            pids = r.pool.worker_pids
            os.kill(pids[0], signal.SIGINT)
            await r.fetch(r.order())
            assert r.pool.worker_pids == pids

    trio.run(scenario)


def test_nothing_secret_in_the_command_line(tmp_path: Path) -> None:
    """A command line is world-readable: it holds neither URL nor header; the environment neither."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            await r.fetch(r.order(headers=(("X-Extra", "hush"),)))
            process = trio.Path("/proc") / str(r.pool.worker_pids[0])
            shown = await (process / "cmdline").read_bytes() + await (process / "environ").read_bytes()
            assert b"valohai_fuse.fetch.worker" in shown
            for secret in (SECRET.encode(), b"hush", r.store.url.encode()):
                assert secret not in shown
            order = r.order()
            assert SECRET not in repr(order)

    trio.run(scenario)


def test_workers_follow_the_load(tmp_path: Path) -> None:
    """One worker for one order; more when there is work for them; idle ones go, the last one later; and it starts again."""

    async def scenario() -> None:
        async with rig(tmp_path, workers=3, idle_s=0.2) as r:
            await r.fetch(r.order())
            assert r.pool.statistics().workers == 1
            gate = trio.Event()
            r.store.answers.extend([_gated(gate)] * 12)
            async with trio.open_nursery() as nursery:
                for i in range(12):
                    nursery.start_soon(r.fetch, r.order(name=f"n{i}"))
                    await _under_way(r, i + 2)
                assert r.pool.statistics().workers == 2
                gate.set()
            assert r.metrics.gauges["workers"] == 2
            await r.metrics.wait_gauge("workers", 1)
            assert r.pool.statistics().workers == 1
            await r.fetch(r.order())
            await r.metrics.wait_gauge("workers", 0)
            r.pool.prewarm()
            assert len(r.pool.worker_pids) == 1
            await r.fetch(r.order())
            assert r.metrics.counters["workers_lost"] == 0

    trio.run(scenario)


def test_one_worker_stays_where_another_could_not_start(tmp_path: Path) -> None:
    """With a file system that hangs, a new process hangs as well."""

    async def scenario() -> None:
        async with rig(tmp_path, idle_s=0.02, disk_may_hang=True) as r:
            await r.fetch(r.order())
            await trio.sleep(0.5)  # five times as long as the last one may be idle otherwise
            assert len(r.pool.worker_pids) == 1

    trio.run(scenario)


def test_prewarm(tmp_path: Path) -> None:
    """A worker can be started before the first order, and that order then uses it."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.pool.prewarm()
            r.pool.prewarm()
            pids = r.pool.worker_pids
            assert len(pids) == 1
            await r.fetch(r.order())
            assert r.pool.worker_pids == pids

    trio.run(scenario)


def test_fault_in_the_callback_ends_its_own_order_only(tmp_path: Path) -> None:
    """What `landed` raises comes out of `fetch`; others go on."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:

            def broken(_: Landed) -> None:
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await r.pool.fetch(r.order(), broken)
            await r.fetch(r.order())

    trio.run(scenario)


def test_orders_end_with_the_pool(tmp_path: Path) -> None:
    """Closing the pool ends what is waiting and what is under way, and leaves no process."""

    async def scenario() -> None:
        async with rig(tmp_path, connections=1) as r:
            metrics = RecordingMetrics()
            pool = WorkerPool(metrics=metrics, workers=1, connections=1)
            r.store.answers.append([End.HANG])
            failures: list[FetchFailed] = []

            async def expect_loss(order: FetchOrder) -> None:
                with pytest.raises(FetchFailed) as caught:
                    await pool.fetch(order, _ignore)
                failures.append(caught.value)

            async with trio.open_nursery() as nursery, open_pool(pool):
                nursery.start_soon(expect_loss, r.order(name="sent"))
                nursery.start_soon(expect_loss, r.order(name="waiting"))
                await _under_way(r, 1)
                (pid,) = pool.worker_pids
            assert [failed.kind for failed in failures] == [FailureKind.WORKER_LOST] * 2
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            with pytest.raises(FetchFailed):
                await pool.fetch(r.order(), _ignore)
            assert metrics.gauges["workers"] == 0

    trio.run(scenario)


def test_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """kill -9 of the daemon leaves no worker behind."""
    program = (
        "import sys, trio\n"
        "from support.fetch_rig import RecordingMetrics\n"
        "from valohai_fuse.fetch.pool import WorkerPool, open_pool\n"
        "async def main():\n"
        "    async with open_pool(WorkerPool(metrics=RecordingMetrics(), workers=1)) as pool:\n"
        "        pool.prewarm()\n"
        "        while not pool._workers[0].ready:\n"
        "            await trio.sleep(0.01)\n"
        "        print(pool.worker_pids[0], flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    tests = str(Path(__file__).resolve().parents[1])
    paths = [tests, *filter(None, sys.path)]
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{program}"], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        descriptor = os.pidfd_open(worker)
        parent.kill()

        async def gone() -> None:
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(descriptor)

        trio.run(gone)
        os.close(descriptor)


def test_many_orders_at_once(tmp_path: Path) -> None:
    """Two hundred orders of every kind over two workers: every byte right, nothing left."""
    content = ramp(40 * BLOCK_BYTES + 17, phase=3)

    async def scenario() -> None:
        async with rig(tmp_path, content, workers=2) as r:

            def broken(request: Request) -> Answer:
                return [r.store.ordinary(request)[:-100], End.RESET]

            orders = []
            kinds: set[FailureKind] = set()
            async with trio.open_nursery() as nursery:

                async def until_it_works(order: FetchOrder) -> None:
                    done = False
                    while not done:
                        try:
                            await r.fetch(order)
                            done = True
                        except FetchFailed as failed:
                            kinds.add(failed.kind)

                r.store.answers.extend([broken] * 20)
                for i in range(200):
                    start = i % 40 * BLOCK_BYTES
                    stop = min(start + (1 + i % 7) * BLOCK_BYTES, len(content))
                    order = r.order(start, stop, name=f"n{i}", priority=Priority(i % 2))
                    orders.append(order)
                    nursery.start_soon(until_it_works, order)
            for order in orders:
                assert landed_bytes(order) == content[order.extent.start : order.extent.stop]
            assert kinds == {FailureKind.TRANSIENT}
            statistics = r.pool.statistics()
            assert (statistics.active, statistics.active_ahead, statistics.waiting) == (0, 0, 0)
            assert r.store.connections <= 2 * 16 + 20

    trio.run(scenario)


def test_unreadable_ca_file(tmp_path: Path) -> None:
    """A wrong --ca-file is a configuration error at the start, not a broken worker later."""
    with pytest.raises(ConfigurationError):
        WorkerPool(metrics=RecordingMetrics(), ca_file=str(tmp_path / "missing.pem"))
