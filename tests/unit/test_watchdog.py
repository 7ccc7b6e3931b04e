"""The watchdog over a loop that stands still, requests that outlive their deadline, and SIGUSR1."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from support.mounts import wait_until
from valohai_fuse.mount.under_way import RequestsUnderWay
from valohai_fuse.obs import watchdog
from valohai_fuse.obs.metrics import Counts
from valohai_fuse.obs.watchdog import Watchdog


def watching(
    requests: RequestsUnderWay, metrics: Counts, *, deadline_s: float = 100, stall_s: float = 0.15
) -> Watchdog:
    return Watchdog(
        requests=requests,
        deadline_s=deadline_s,
        margin_s=0,
        stall_s=stall_s,
        metrics=metrics,
        state=lambda: {"answer": 42},
    )


def stand_still(seconds: float) -> None:
    """Keeps the loop's thread, as a forgotten blocking call would."""
    threading.Event().wait(seconds)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_loop_that_stands_still_is_told_with_the_place(caplog: pytest.LogCaptureFixture) -> None:
    """A pass of the loop that takes too long: one WARNING, with the stack of the place, and numbers for `status`."""
    metrics = Counts()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watching(RequestsUnderWay(), metrics).run)
            await trio.sleep(0.05)
            stand_still(0.8)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(main)
    (said,) = warnings(caplog)
    assert re.search(
        r"stood still for 0\.\d+ s: .*test_watchdog\.py:\d+ main > .*test_watchdog.py:\d+ stand_still", said
    )
    assert metrics.snapshot()["loop_stalls"] == 1
    assert 0.5 < metrics.snapshot()["loop_stall_seconds_max"] <= 2


def test_an_idle_loop_is_not_looked_at_and_its_stall_is_seen_all_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing happens the watching thread sleeps; the pass that ends the idleness wakes it, and so does the end."""
    looks: list[float] = []
    wait = signal.sigtimedwait

    def counted(signals: set[signal.Signals], seconds: float) -> signal.struct_siginfo | None:
        looks.append(seconds)
        return wait(signals, seconds)

    monkeypatch.setattr(signal, "sigtimedwait", counted)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watching(RequestsUnderWay(), Counts()).run)
            while watchdog.LOOK_IDLE_S not in looks:  # noqa: ASYNC110 - the thread tells nobody
                await trio.sleep(4 * watchdog.LOOK_S)
            before = len(looks)
            await trio.sleep(8 * watchdog.LOOK_S)
            assert len(looks) <= before + 3
            stand_still(0.8)
            before = len(looks)
            with trio.fail_after(30):
                # Not the last look: the pass that asks wakes the thread, which may look before it is asked.
                while watchdog.LOOK_IDLE_S not in looks[before:]:  # noqa: ASYNC110 - the thread tells nobody
                    await trio.sleep(4 * watchdog.LOOK_S)
            nursery.cancel_scope.cancel()

    began_s = time.monotonic()
    trio.run(main)
    assert time.monotonic() - began_s < watchdog.LOOK_IDLE_S / 2
    (said,) = warnings(caplog)
    assert "stand_still" in said


def test_a_busy_loop_is_not_a_stall(caplog: pytest.LogCaptureFixture) -> None:
    """Much work in short passes is no stall, however long it lasts."""
    metrics = Counts()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watching(RequestsUnderWay(), metrics, stall_s=0.25).run)
            data = b"x" * 100_000
            until = trio.current_time() + 0.6
            while trio.current_time() < until:
                hashlib.sha256(data)
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert warnings(caplog) == []
    assert metrics.snapshot()["loop_stalls"] == 0


def test_time_for_which_others_had_the_processor_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was ready to run and did not get the processor did not stall."""
    clock = watchdog._ThreadClock(threading.get_native_id())
    try:
        queued_s = 100.0
        monkeypatch.setattr(clock, "_queued_s", lambda: queued_s)
        clock.look()
        began_s = time.monotonic()
        assert 0 <= clock.ran_since(began_s) < 5
        queued_s += 7
        assert clock.ran_since(began_s) < -1
        clock.look()
        assert clock.ran_since(time.monotonic()) >= 0, "what was queued before it began is nobody's concern"
    finally:
        clock.close()


def test_without_schedstat_nothing_is_subtracted(caplog: pytest.LogCaptureFixture) -> None:
    clock = watchdog._ThreadClock(2**31)
    clock.look()
    assert clock.ran_since(time.monotonic() - 3) >= 3
    clock.close()


def test_a_request_that_outlives_its_deadline_is_told_once_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    """Deadline and margin gone: a WARNING with where it waits, once; the others wait for theirs; the number in `status`."""
    metrics, requests = Counts(), RequestsUnderWay()

    async def answer(name: str, seconds: float) -> None:
        entry = requests.begin(name)
        try:
            await trio.sleep(seconds)
        finally:
            requests.end(entry)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watching(requests, metrics, deadline_s=0.3).run)
            nursery.start_soon(answer, "read", 60)
            for _ in range(3):
                await answer("lookup", 0.15)
            while not metrics.snapshot()["requests_overdue"]:  # noqa: ASYNC110 - a counter announces nothing
                await trio.sleep(0.01)
            await trio.sleep(1.2)  # the watchdog has looked again by then
            nursery.cancel_scope.cancel()

    trio.run(main)
    (said,) = warnings(caplog)
    assert re.search(
        r"a read has been under way for \d+ s, though it ends within 0 s: .*test_watchdog\.py:\d+ answer", said
    )
    assert metrics.snapshot()["requests_overdue"] == 1
    assert len(requests) == 0


def test_many_overdue_requests_are_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand reads that wait for one store do not fill the log."""
    metrics, requests = Counts(), RequestsUnderWay()

    async def answer() -> None:
        requests.begin("read")
        await trio.sleep_forever()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(answer)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.1)  # all are overdue by the first look, however long it took to begin them
            await nursery.start(watching(requests, metrics, deadline_s=0.05).run)
            while not metrics.snapshot()["requests_overdue"]:  # noqa: ASYNC110 - a counter announces nothing
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
    said = [line for line in warnings(caplog) if "stood still" not in line]
    assert len(said) == watchdog.OVERDUE_REPORTED_MAX + 1
    assert said[-1] == "995 more requests are overdue"


def test_the_order_is_kept_and_a_request_that_ended_is_gone() -> None:
    """Oldest first; what has ended is not found."""
    requests = RequestsUnderWay()
    oldest: list[str | None] = []

    async def one(name: str, begun: trio.Event, end: trio.Event) -> None:
        entry = requests.begin(name)
        begun.set()
        await end.wait()
        requests.end(entry)

    async def main() -> None:
        ends = {name: trio.Event() for name in ("a", "b", "c")}
        async with trio.open_nursery() as nursery:
            for name, end in ends.items():
                begun = trio.Event()
                nursery.start_soon(one, name, begun, end)
                await begun.wait()
            assert [r.name for r in requests.since(time.monotonic() + 1)] == ["a", "b", "c"]
            assert requests.since(0) == []
            for end in ends.values():
                found = requests.oldest()
                oldest.append(found.name if found else None)
                end.set()
                await trio.testing.wait_all_tasks_blocked()
        assert requests.oldest() is None

    trio.run(main)
    assert oldest == ["a", "b", "c"]


PROGRAM = """
import logging, sys, threading, trio
from valohai_fuse.mount.under_way import RequestsUnderWay
from valohai_fuse.obs import watchdog
from valohai_fuse.obs.metrics import Counts
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
watchdog.block_signal()
async def waits_for_a_store():
    await trio.sleep_forever()
async def main():
    dog = watchdog.Watchdog(requests=RequestsUnderWay(), deadline_s=100, metrics=Counts(), state=lambda: {"answer": 42})
    async with trio.open_nursery() as nursery:
        await nursery.start(dog.run)
        nursery.start_soon(waits_for_a_store)
        nursery.start_soon(waits_for_a_store)
        await trio.sleep(0.1)
        print("up", flush=True)
        if sys.argv[1] == "stuck":
            threading.Event().wait()
        await trio.sleep_forever()
trio.run(main)
"""


@contextmanager
def program(kind: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """A process with a watchdog, and a function that reads what it says until a line has the text given."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "up\n"
        stderr = process.stderr

        def heard(until: str) -> str:
            lines: list[str] = []
            while not lines or until not in lines[-1]:
                lines.append(stderr.readline())
                assert lines[-1], "".join(lines)
            return "".join(lines)

        yield process, heard
    finally:
        process.kill()
        process.communicate()


def test_sigusr1_dumps_threads_tasks_and_state() -> None:
    """SIGUSR1 ends nothing; it writes the stacks of all threads and tasks, equal ones counted, and the state."""
    with program("idle") as (process, heard):
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            said = heard("state:")
            assert "thread MainThread: " in said
            assert "thread watchdog: " in said
            assert re.search(r"2 tasks \S*waits_for_a_store: .* waits_for_a_store > ", said)
            assert 'state: {"answer": 42}' in said
        assert process.poll() is None


def test_sigusr1_tells_where_a_loop_hangs() -> None:
    """The dump needs no loop: that is when it is wanted most."""
    with program("stuck") as (process, heard):
        process.send_signal(signal.SIGUSR1)
        said = heard("does not answer")
        assert re.search(r"thread MainThread: .*<string>:\d+ main", said)


def test_an_idle_daemon_costs_next_to_nothing() -> None:
    """Watching costs less than half a percent of a processor while nothing happens."""
    with program("idle") as (process, _):
        ticks = os.sysconf("SC_CLK_TCK")

        def cpu_s() -> float:
            with open(f"/proc/{process.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b") ")[2].split()
            return (int(fields[11]) + int(fields[12])) / ticks

        before, began = cpu_s(), time.monotonic()
        wait_until("two seconds have passed", lambda: time.monotonic() - began > 2)
        assert cpu_s() - before <= 0.03
