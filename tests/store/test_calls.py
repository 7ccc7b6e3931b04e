"""What is asked of a disk that may stop answering: `store.calls`."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Awaitable, Callable

import pytest
import trio

from valohai_fuse.store.calls import DiskCalls, NotAnsweringError

PATIENCE_S = 0.05


def on_trio(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Runs the test as trio's main task, whose thread may not wait."""

    @functools.wraps(test)
    def run() -> None:
        trio.run(test)

    return run


def fail() -> None:
    raise FileNotFoundError


async def freed(disk: DiskCalls) -> None:
    """Returns when the call that hung has returned."""
    with trio.fail_after(10):
        while disk.stuck:  # noqa: ASYNC110 - it ends in a thread
            await trio.sleep(0.001)


@on_trio
async def test_answers_and_errors_come_back() -> None:
    """From a thread where the disk may hang, directly where it may not."""
    for may_hang in (True, False):
        disk = DiskCalls(may_hang=may_hang, patience_s=10)
        assert (disk.call(threading.get_ident) != threading.get_ident()) is may_hang
        with pytest.raises(FileNotFoundError):
            disk.call(fail)
        disk.later(fail)  # whose error is nobody's
        assert disk.call(int, "7") == 7
        assert not disk.stuck


@on_trio
async def test_a_call_that_does_not_return_is_waited_for_once() -> None:
    """Then nobody asks any more, in no thread, until it has returned; what was put off is done then, in order."""
    disk, gate = DiskCalls(may_hang=True, patience_s=PATIENCE_S), threading.Event()
    done: list[int | str] = []
    with pytest.raises(NotAnsweringError):
        disk.call(gate.wait)
    with pytest.raises(NotAnsweringError):
        await trio.to_thread.run_sync(disk.call, time.monotonic)
    with pytest.raises(NotAnsweringError):
        disk.call(done.append, "never")
    disk.later(done.append, 1)
    disk.later(done.append, 2)
    assert disk.stuck
    assert done == []
    gate.set()
    await freed(disk)
    assert disk.call(len, done) == 2  # behind what was put off
    assert done == [1, 2]
    assert disk.call(int, "8") == 8


@on_trio
async def test_a_call_behind_one_that_hangs_does_not_wait_for_ever_either() -> None:
    """As when closing a file hangs, for which nobody waits."""
    disk, gate = DiskCalls(may_hang=True, patience_s=PATIENCE_S), threading.Event()
    disk.later(gate.wait)
    with pytest.raises(NotAnsweringError):
        disk.call(int, "7")
    assert disk.stuck
    gate.set()
    await freed(disk)


def test_who_may_wait_is_not_handed_over() -> None:
    """A program without an event loop, or a thread."""
    disk = DiskCalls(may_hang=True)
    assert disk.call(threading.get_ident) == threading.get_ident()


def test_a_garbage_collection_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What closes files later may be called by one, in the middle of anything: the thread is there from the start."""
    disk, done = DiskCalls(may_hang=True), threading.Event()
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    disk.later(done.set)
    assert done.wait(10)
