"""A request that is late is sent once more: who wins, what is counted, and what must not happen."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from support.fetch_rig import CONTENT, SIZE, Rig, landed_blocks, landed_bytes, rig
from support.raw_store import Answer, End, Request, partial, plain
from valohai_fuse.fetch.tickets import Leg
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.model.hedge import SAMPLES_MIN
from valohai_fuse.ports import FailureKind, FetchFailed, FetchOrder, Priority
from valohai_fuse.store.landing import MEMORY_NAME

Scenario = Callable[[Rig], Awaitable[None]]
CUT = partial(CONTENT, 0, SIZE)[: BLOCK_BYTES + 30_000]
"""The head, the first block and a part of the second."""


def _run(
    directory: Path,
    scenario: Scenario,
    *,
    workers: int = 1,
    connections: int = 16,
    hedging: bool = True,
    disk_may_hang: bool = False,
) -> None:
    """On a pool that knows how soon its store answers."""

    async def main() -> None:
        async with rig(
            directory, workers=workers, connections=connections, hedging=hedging, disk_may_hang=disk_may_hang
        ) as r:
            await _both_workers(r, workers)
            for i in range(SAMPLES_MIN + 30):
                await r.fetch(r.order(0, BLOCK_BYTES, name=f"known{i}"))
            r.metrics.counters.clear()
            r.reports.clear()
            r.store.requests.clear()
            await scenario(r)

    trio.run(main)


async def _both_workers(r: Rig, workers: int) -> None:
    """Load until all workers run and hold a connection."""
    while workers > 1 and not (len(r.pool._workers) == workers and all(w.idle_connections for w in r.pool._workers)):
        gate = trio.Event()
        r.store.answers.extend([_gated(gate)] * 4 * workers)
        r.store.requests.clear()
        async with trio.open_nursery() as nursery:
            for i in range(4 * workers):
                nursery.start_soon(r.fetch, r.order(name=f"load{i}"))
                await _requests(r, i + 1)
            gate.set()


def _gated(gate: trio.Event) -> Answer:
    return [gate, partial(CONTENT, 0, SIZE)]


def _legs(r: Rig) -> list[Leg]:
    return [leg for worker in r.pool._workers for leg in worker.legs.values()]


async def _requests(r: Rig, count: int) -> None:
    await r.store.wait_until(lambda: len(r.store.requests) >= count)


async def _asked_twice(r: Rig) -> None:
    await _requests(r, 2)


async def _until_late(r: Rig) -> None:
    while not _legs(r)[0].ticket.is_late:  # noqa: ASYNC110 - nobody is told
        await trio.sleep(0.005)


def _memory(order: FetchOrder) -> str:
    """A memory segment for this order, as the store makes them."""
    fd = os.memfd_create(MEMORY_NAME)
    os.ftruncate(fd, segment.PAGE_BYTES + order.key.size)
    header = segment.encode_header(order.key.stable_id, order.key.size, 0, "")
    os.pwrite(fd, header + segment.EMPTY_TABLE, 0)
    return f"/proc/{os.getpid()}/fd/{fd}"


def test_a_request_without_an_answer_is_sent_once_more(tmp_path: Path) -> None:
    """The second answer is the order's; the first connection is given up; nothing is counted that was not fetched."""

    async def scenario(r: Rig) -> None:
        r.store.answers.append([End.HANG])
        order = r.order()
        fetched = await r.fetch(order)
        assert (fetched.fetched_bytes, fetched.version) == (SIZE, '"v1"')
        assert landed_bytes(order) == CONTENT
        assert [request.extent for request in r.store.requests] == [(0, SIZE)] * 2
        counted = r.metrics.counters
        assert (counted["fetch_hedges"], counted["fetch_hedges_won"], counted["fetch_hedge_bytes"]) == (1, 1, 0)
        assert (counted["fetches"], counted["fetched_bytes"]) == (2, SIZE)
        assert r.pool.statistics().active == 0
        await r.store.wait_until(lambda: r.store.open_connections == 1)

    _run(tmp_path, scenario)


def test_a_body_that_stalls_is_asked_for_from_where_it_stands(tmp_path: Path) -> None:
    """What has landed is not fetched again, and readers are told of each step once, in order."""

    async def scenario(r: Rig) -> None:
        r.store.answers.append([CUT, End.HANG])
        order = r.order()
        await r.fetch(order)
        assert landed_bytes(order) == CONTENT
        assert r.store.requests[1].extent == (BLOCK_BYTES, SIZE)
        uptos = [landed.upto for landed in r.reports]
        assert uptos == sorted(set(uptos))
        assert uptos[-1] == SIZE
        counted = r.metrics.counters
        body_bytes = len(CUT) - CUT.index(b"\r\n\r\n") - 4
        assert counted["fetched_bytes"] == body_bytes + SIZE - BLOCK_BYTES
        assert counted["fetch_hedge_bytes"] == body_bytes - BLOCK_BYTES

    _run(tmp_path, scenario)


def test_the_first_answer_may_still_win(tmp_path: Path) -> None:
    """It comes after all: the second request is given up, and was not worth it."""

    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.extend([_gated(gate), [End.HANG]])
        order = r.order()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, order)
            await _asked_twice(r)
            gate.set()
        assert landed_bytes(order) == CONTENT
        assert (r.metrics.counters["fetch_hedges"], r.metrics.counters["fetch_hedges_won"]) == (1, 0)
        await r.store.wait_until(lambda: r.store.open_connections == 1)

    _run(tmp_path, scenario)


def test_no_more_than_one_and_only_for_readers(tmp_path: Path) -> None:
    """What nobody waits for is not asked for twice, until somebody does; and what was asked twice never a third time."""

    async def scenario(r: Rig) -> None:
        order = r.order(priority=Priority.AHEAD)
        r.store.answers.extend([[End.HANG]] * 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, order)
            await _requests(r, 1)
            await _until_late(r)
            assert len(r.store.requests) == 1
            r.pool.promote(order)
            await _asked_twice(r)
            _legs(r)[0].ticket.is_late = False
            await _until_late(r)
            r.pool.promote(order)
            assert r.metrics.counters["fetch_hedges"] == 1
            nursery.cancel_scope.cancel()
        assert r.pool.statistics().active == 0

    _run(tmp_path, scenario)


def test_switched_off(tmp_path: Path) -> None:
    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.append(_gated(gate))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, r.order())
            await _requests(r, 1)
            with trio.move_on_after(0.3):
                await _until_late(r)
            gate.set()
        assert len(r.store.requests) == 1

    _run(tmp_path, scenario, hedging=False)


def test_a_store_that_is_late_with_everything_is_not_asked_twice_as_much(tmp_path: Path) -> None:
    """An overloaded store: the budget, and no more."""

    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.extend([_gated(gate)] * 30)
        async with trio.open_nursery() as nursery:
            for i in range(12):
                nursery.start_soon(r.fetch, r.order(name=f"n{i}"))
            await _requests(r, 12)
            while not all(leg.ticket.is_late or leg.is_hedge for leg in _legs(r)):  # noqa: ASYNC110
                await trio.sleep(0.005)
            assert r.metrics.counters["fetch_hedges"] <= 4
            gate.set()

    _run(tmp_path, scenario)


def test_a_store_that_throttles_is_not_asked_twice(tmp_path: Path) -> None:
    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.extend([[plain(503, b"")], _gated(gate)])
        assert (await r.failure(r.order(name="throttled"))).kind is FailureKind.THROTTLED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, r.order())
            await _asked_twice(r)
            await _until_late(r)
            gate.set()
        assert r.metrics.counters["fetch_hedges"] == 0

    _run(tmp_path, scenario)


def test_no_connection_is_free(tmp_path: Path) -> None:
    """The limit of requests under way holds for second ones too."""

    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.append(_gated(gate))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, r.order())
            await _requests(r, 1)
            await _until_late(r)
            gate.set()
        assert len(r.store.requests) == 1

    _run(tmp_path, scenario, connections=1)


@pytest.mark.parametrize("kind", ["refused", "changed", "broken"])
def test_a_second_request_that_fails_does_no_harm(kind: str, tmp_path: Path) -> None:
    """Refused, another version, broken off: the first goes on, and its bytes are the ones that count."""

    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        rest = partial(CONTENT[BLOCK_BYTES:], BLOCK_BYTES, SIZE)
        answers: dict[str, Answer] = {
            "refused": [plain(403, b"")],
            "changed": [rest.replace(b'"v1"', b'"v2"')],
            "broken": [rest[:-5000], End.RESET],
        }
        r.store.answers.extend([[CUT, gate, partial(CONTENT, 0, SIZE)[len(CUT) :]], answers[kind]])
        order = r.order()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, order)
            await _asked_twice(r)
            while len(_legs(r)) > 1:  # noqa: ASYNC110 - nobody is told
                await trio.sleep(0.005)
            gate.set()
        assert landed_bytes(order) == CONTENT
        assert r.metrics.counters["fetch_hedges_won"] == 0

    _run(tmp_path, scenario)


def test_when_both_fail_the_first_ones_reason_counts(tmp_path: Path) -> None:
    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.extend([[gate, plain(403, b"")], [gate, plain(500, b"")]])
        failures: list[FetchFailed] = []

        async def fail() -> None:
            failures.append(await r.failure(r.order()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await _asked_twice(r)
            gate.set()
        assert [failed.status for failed in failures] == [403]

    _run(tmp_path, scenario)


def test_the_object_changes_between_the_two(tmp_path: Path) -> None:
    """Neither knew the version when it was sent: the order ends with the bytes of one of them."""

    async def scenario(r: Rig) -> None:
        gate, more = trio.Event(), trio.Event()
        newer = bytes(reversed(CONTENT))

        def second(_: Request) -> Answer:
            answer = partial(newer, 0, SIZE, etag='"v2"')
            return [answer[: len(CUT)], more, answer[len(CUT) :]]

        r.store.answers.append(_gated(gate))
        r.store.answers.append(second)
        order = r.order()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, order)
            await _asked_twice(r)
            while not r.reports:  # noqa: ASYNC110 - nobody is told
                await trio.sleep(0.005)
            gate.set()
            while len(_legs(r)) > 1:  # noqa: ASYNC110
                await trio.sleep(0.005)
            more.set()
        assert {landed.version for landed in r.reports} == {'"v2"'}

    _run(tmp_path, scenario)


def test_a_staged_order_is_over_when_nobody_writes_to_its_memory_any_more(tmp_path: Path) -> None:
    """The loser's worker stands still: readers go on with what has landed, and the memory is kept until it has let go. The second
    request has landed in the file, for the memory has one writer."""

    async def scenario(r: Rig) -> None:
        gate, ended = trio.Event(), trio.Event()
        rest = partial(CONTENT[BLOCK_BYTES:], BLOCK_BYTES, SIZE)
        r.store.answers.extend([[CUT, End.HANG], [gate, rest]])
        order = r.order(staging_path=(staging := _memory(r.order())))

        async def fetch() -> None:
            await r.fetch(order)
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            await _asked_twice(r)
            first, second = _legs(r) if not _legs(r)[0].is_hedge else _legs(r)[::-1]
            assert first.worker is not second.worker
            os.kill(first.worker.process.pid, signal.SIGSTOP)
            try:
                gate.set()
                while first.ticket.upto < SIZE or second in _legs(r):  # noqa: ASYNC110 - nobody is told
                    await trio.sleep(0.005)
                in_memory, in_file = landed_blocks(replace(order, segment_path=staging)), landed_blocks(order)
                assert min(in_memory) == 0
                assert not in_memory.keys() & in_file.keys()
                assert b"".join(data for _, data in sorted((in_memory | in_file).items())) == CONTENT
                assert r.reports[-1].upto == SIZE
                assert not ended.is_set()
            finally:
                os.kill(first.worker.process.pid, signal.SIGCONT)
            await ended.wait()
        os.close(int(staging.rpartition("/")[2]))

    _run(tmp_path, scenario, workers=2)


def test_what_lands_in_memory_only_is_not_asked_for_twice(tmp_path: Path) -> None:
    """Where the disk may hang nothing is landed in a file but by a thread, and memory has one writer."""

    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.append([gate, partial(CONTENT, 0, SIZE)])
        order = r.order(staging_path=(staging := _memory(r.order())))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, order)
            await _requests(r, 1)
            await _until_late(r)
            gate.set()
        assert len(r.store.requests) == 1
        os.close(int(staging.rpartition("/")[2]))

    _run(tmp_path, scenario, disk_may_hang=True)


def test_a_worker_dies_with_one_of_the_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The other request, at another worker, brings the bytes."""

    async def scenario(r: Rig) -> None:
        gate = trio.Event()
        r.store.answers.extend([[End.HANG], _gated(gate)])
        order = r.order()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, order)
            await _asked_twice(r)
            (first,) = [leg for leg in _legs(r) if not leg.is_hedge]
            os.kill(first.worker.process.pid, signal.SIGKILL)
            while first in _legs(r):  # noqa: ASYNC110 - nobody is told
                await trio.sleep(0.005)
            gate.set()
        assert landed_bytes(order) == CONTENT

    _run(tmp_path, scenario, workers=2)
    assert "died with 1 orders" in caplog.text


def test_cancelling_ends_both(tmp_path: Path) -> None:
    async def scenario(r: Rig) -> None:
        r.store.answers.extend([[End.HANG]] * 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetch, r.order())
            await _asked_twice(r)
            nursery.cancel_scope.cancel()
        assert r.pool.statistics().active == 0
        await r.store.wait_until(lambda: r.store.open_connections == 0)

    _run(tmp_path, scenario)
