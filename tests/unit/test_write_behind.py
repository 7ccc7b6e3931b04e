"""What is written behind the readers' backs: bounded, and its failures told."""

from __future__ import annotations

import errno
import itertools
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from valohai_fuse.daemon import STAGED_BEHIND_BYTES
from valohai_fuse.fetch.behind import THREADS, Ended, Job, WriteBehind
from valohai_fuse.fetch.pool import BEHIND_BYTES, WorkerPool
from valohai_fuse.obs.metrics import Counts

BYTES_MAX = 1000_000
NUMBERS = itertools.count()


@pytest.fixture
def behind() -> Iterator[WriteBehind]:
    behind = WriteBehind(BYTES_MAX)
    yield behind
    behind.close()


@dataclass
class Staged:
    """What is to be written."""

    segment_bytes: int
    write: Callable[[], None]
    segment: bytes


def job(segment_bytes: int, write: Callable[[], None], segment: str = "") -> Job:
    return Job(Staged(segment_bytes, write, (segment or str(next(NUMBERS))).encode()), None)


def wait_ended(behind: WriteBehind, count: int) -> list[Ended]:
    """The next `count` ends, as the worker's loop learns of them."""
    found: list[Ended] = []
    while len(found) < count:
        readable, _, _ = select.select([behind.fd], [], [], 10)
        assert readable, f"{len(found)} of {count} ended"
        found += behind.ended()
    return found


def test_jobs_are_written_and_told(behind: WriteBehind) -> None:
    written: list[int] = []
    jobs = [job(1000, lambda n=n: written.append(n)) for n in range(5)]  # type: ignore[misc]
    assert all(behind.offer(job) for job in jobs)
    assert {ended.job: ended.is_written for ended in wait_ended(behind, 5)} == dict.fromkeys(jobs, True)
    assert sorted(written) == [0, 1, 2, 3, 4]
    assert behind.ended() == []


def test_a_slow_write_does_not_hold_up_the_next(behind: WriteBehind) -> None:
    """The disk has something to do while a thread waits for a processor. A lone job takes a single thread."""
    gate = threading.Event()
    slow, quick = job(1, lambda: assert_set(gate)), job(1, lambda: None)
    assert behind.offer(slow)
    assert len(behind._threads) == 1
    assert behind.offer(quick)
    assert [ended.job for ended in wait_ended(behind, 1)] == [quick]
    gate.set()
    assert [ended.job for ended in wait_ended(behind, 1)] == [slow]
    for _ in range(10):
        assert behind.offer(job(1, lambda: None))
    wait_ended(behind, 10)
    assert len(behind._threads) == THREADS


def test_no_more_waits_than_the_bound(behind: WriteBehind) -> None:
    """A disk that stands still is owed no more than that; when it goes on, it is offered again. One job always fits."""
    gate = threading.Event()

    def wait() -> None:
        gate.wait(10)

    large = job(BYTES_MAX + 1, wait)
    assert behind.offer(large)
    assert not behind.offer(job(1, wait))
    gate.set()
    wait_ended(behind, 1)
    assert behind.offer(job(1, wait))
    wait_ended(behind, 1)


def test_a_segment_counts_as_a_whole_however_little_of_it_waits(behind: WriteBehind) -> None:
    """It keeps all of its memory. So what belongs to one that waits is taken, and a part of another is not; and it counts until
    its last part is written."""
    gates = [threading.Event() for _ in range(2)]
    whole = BYTES_MAX // 2 + 1
    first, second = (job(whole, lambda gate=gate: assert_set(gate), "one") for gate in gates)  # type: ignore[misc]
    assert behind.offer(first)
    assert behind.offer(second)
    assert not behind.offer(job(whole, lambda: None, "another"))
    gates[0].set()
    assert [ended.job for ended in wait_ended(behind, 1)] == [first]
    assert not behind.offer(job(whole, lambda: None, "another"))
    gates[1].set()
    wait_ended(behind, 1)
    assert behind.offer(job(whole, lambda: None, "another"))
    wait_ended(behind, 1)


def test_a_disk_that_does_not_answer_is_not_waited_for(behind: WriteBehind) -> None:
    """What it owes is given up when its time has come, nothing is offered to it meanwhile, and its late end is no news."""
    gate = threading.Event()
    jobs = [job(1, lambda: assert_set(gate)) for _ in range(2)]
    assert all(behind.offer(job) for job in jobs)
    give_up_at_s = behind.give_up_at_s or 0.0
    assert behind.given_up(give_up_at_s - 1) == []
    assert behind.given_up(give_up_at_s + 1) == jobs
    assert (behind.give_up_at_s, give_up_at_s > 0) == (None, True)
    assert not behind.offer(job(1, lambda: assert_set(gate)))
    gate.set()
    deadline = time.monotonic() + 10
    while not behind.offer(after := job(1, lambda: None)):
        assert time.monotonic() < deadline
        assert behind.ended() == []
    assert [ended.job for ended in wait_ended(behind, 1)] == [after]


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_a_refusal_is_the_disks_unless_it_is_memory_that_lacks(behind: WriteBehind) -> None:
    def refuse(number: int) -> None:
        raise OSError(number, "refused")

    for number in (errno.ENOSPC, errno.ENOMEM):
        assert behind.offer(job(1, lambda number=number: refuse(number)))  # type: ignore[misc]
    assert sorted((e.is_written, e.disk_error) for e in wait_ended(behind, 2)) == [(False, ""), (False, "refused")]


def test_closing_writes_what_waits() -> None:
    """A worker that is told to end has a moment for it."""
    behind = WriteBehind(BYTES_MAX)
    written: list[int] = []
    for number in range(20):
        assert behind.offer(job(1, lambda number=number: written.append(number)))  # type: ignore[misc]
    behind.close()
    assert len(written) == 20


def test_an_unforeseen_error_costs_one_job(behind: WriteBehind) -> None:
    """The next one is written."""

    def fail() -> None:
        raise BufferError("cannot close exported pointers exist")

    assert behind.offer(job(1, fail))
    assert behind.offer(job(1, lambda: None))
    assert sorted((ended.is_written, ended.disk_error) for ended in wait_ended(behind, 2)) == [
        (False, "BufferError"),
        (True, ""),
    ]


def test_a_count_that_comes_late_does_not_keep_the_loop_awake(
    behind: WriteBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job was found together with the first, before the thread told of it."""
    eventfd_write, told, gate = os.eventfd_write, threading.Event(), threading.Event()

    def tell(fd: int, count: int) -> None:
        if told.is_set():
            assert_set(gate)
        eventfd_write(fd, count)
        told.set()

    monkeypatch.setattr(os, "eventfd_write", tell)
    assert behind.offer(job(1, lambda: None))
    assert told.wait(10)
    assert behind.offer(job(1, lambda: None))
    deadline = time.monotonic() + 10
    while behind._ended.qsize() < 2:
        assert time.monotonic() < deadline
    assert len(behind.ended()) == 2
    gate.set()
    assert select.select([behind.fd], [], [], 10)[0]
    assert behind.ended() == []
    assert not select.select([behind.fd], [], [], 0)[0]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_all_workers_together_owe_no_more_than_there_is_memory_for(workers: int) -> None:
    """Whatever else the daemon holds for streams is for what is fetched ahead."""
    pool = WorkerPool(metrics=Counts(), workers=workers)
    assert 0 < workers * pool._configure.behind_bytes_max <= BEHIND_BYTES < STAGED_BEHIND_BYTES
