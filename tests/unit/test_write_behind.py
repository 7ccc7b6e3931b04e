"""What is written behind the readers' backs: in order, bounded, and its failures told."""

from __future__ import annotations

import errno
import select
import threading
import time
from collections.abc import Iterator

import pytest

from valohai_fuse.fetch.behind import QUEUE_BYTES_MAX, Ended, Job, WriteBehind


@pytest.fixture
def behind() -> Iterator[WriteBehind]:
    behind = WriteBehind()
    yield behind
    behind.close()


def wait_ended(behind: WriteBehind, count: int) -> list[Ended]:
    """The next `count` ends, as the worker's loop learns of them."""
    found: list[Ended] = []
    while len(found) < count:
        readable, _, _ = select.select([behind.fd], [], [], 10)
        assert readable, f"{len(found)} of {count} ended"
        found += behind.ended()
    return found


def test_jobs_are_written_in_order_and_told(behind: WriteBehind) -> None:
    written: list[int] = []
    jobs = [Job(1000, lambda n=n: written.append(n), None) for n in range(5)]  # type: ignore[misc]
    assert all(behind.offer(job) for job in jobs)
    assert [(ended.job, ended.is_written) for ended in wait_ended(behind, 5)] == [(job, True) for job in jobs]
    assert written == [0, 1, 2, 3, 4]
    assert behind.ended() == []


def test_no_more_waits_than_the_bound(behind: WriteBehind) -> None:
    """A disk that stands still is owed no more than that; when it goes on, it is offered again. One job always fits."""
    gate = threading.Event()

    def wait() -> None:
        gate.wait(10)

    large = Job(QUEUE_BYTES_MAX + 1, wait, None)
    assert behind.offer(large)
    assert not behind.offer(Job(1, wait, None))
    gate.set()
    wait_ended(behind, 1)
    assert behind.offer(Job(1, wait, None))
    wait_ended(behind, 1)


def test_a_disk_that_does_not_answer_is_not_waited_for(behind: WriteBehind) -> None:
    """What it owes is given up when its time has come, nothing is offered to it meanwhile, and its late end is no news."""
    gate = threading.Event()
    jobs = [Job(1, lambda: assert_set(gate), None) for _ in range(2)]
    assert all(behind.offer(job) for job in jobs)
    give_up_at_s = behind.give_up_at_s or 0.0
    assert behind.given_up(give_up_at_s - 1) == []
    assert behind.given_up(give_up_at_s + 1) == jobs
    assert (behind.give_up_at_s, give_up_at_s > 0) == (None, True)
    assert not behind.offer(Job(1, lambda: assert_set(gate), None))
    gate.set()
    deadline = time.monotonic() + 10
    while not behind.offer(after := Job(1, lambda: None, None)):
        assert time.monotonic() < deadline
        assert behind.ended() == []
    assert [ended.job for ended in wait_ended(behind, 1)] == [after]


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_a_refusal_is_the_disks_unless_it_is_memory_that_lacks(behind: WriteBehind) -> None:
    def refuse(number: int) -> None:
        raise OSError(number, "refused")

    for number in (errno.ENOSPC, errno.ENOMEM):
        assert behind.offer(Job(1, lambda number=number: refuse(number), None))  # type: ignore[misc]
    assert [(e.is_written, e.disk_error) for e in wait_ended(behind, 2)] == [(False, "refused"), (False, "")]


def test_closing_writes_what_waits() -> None:
    """A worker that is told to end has a moment for it."""
    behind = WriteBehind()
    written: list[int] = []
    for number in range(20):
        assert behind.offer(Job(1, lambda number=number: written.append(number), None))  # type: ignore[misc]
    behind.close()
    assert len(written) == 20


def test_an_unforeseen_error_costs_one_job(behind: WriteBehind) -> None:
    """The next one is written."""

    def fail() -> None:
        raise BufferError("cannot close exported pointers exist")

    assert behind.offer(Job(1, fail, None))
    assert behind.offer(Job(1, lambda: None, None))
    assert [(ended.is_written, ended.disk_error) for ended in wait_ended(behind, 2)] == [
        (False, "BufferError"),
        (True, ""),
    ]
