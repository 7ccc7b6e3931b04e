"""Writes behind the readers' backs: what has landed in memory goes to its segment file in threads of the worker.

The disk must not set the pace of a stream, nor may it be owed without bound: no more than `bytes_max` of segments wait here, and
what is offered beyond is refused. It stays in memory for its readers and is simply not cached, so a disk that is slower than the
network gets as much as it can take, and the network goes on. A segment of which any part waits is memory that the stream
cannot use: the daemon has some in addition, or there would be none left to stage in, and the stream would wait for the disk
after all.

Nor is a disk waited for that does not answer at all: a job that is not written within PATIENCE_S is *given up*, for its order
holds a connection, and while its writing has not returned nothing more is taken. What it still writes then, whenever that is,
is verified by whoever reads it.

Threads: `offer`, `ended` and `close` belong to the worker's loop, `_write_all` is a thread of several. They share two queues; `fd`
becomes readable when `ended` has something. A job is done with once its writing has ended, whatever came of it, or it is
given up. Must not know: HTTP, what a segment file looks like.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final, Protocol

from valohai_fuse.fetch.wire import Done

THREADS: Final = 2
"""With one, 42 of the 896 segments of seven cold GiB were refused, with two 6: a write of 8 MiB, 5 ms on
an idle machine, takes 7 ms or more beside a stream."""
PATIENCE_S: Final = 3.0
_CLOSE_WITHIN_S: Final = 1.0
"""The daemon kills a worker that has not ended two seconds after it was asked to."""


class Bytes(Protocol):
    """`transfer.Staged`, as far as it is needed here."""

    segment: bytes
    """What they are part of, and that counts as a whole: its file's path."""
    segment_bytes: int

    def write(self) -> None:
        """To the disk, and closes. Raises OSError."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One order's bytes, to be written. What was not taken, its owner closes."""

    staged: Bytes
    done: Done | None
    """What to tell the daemon afterwards; None: nobody waits to hear of it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that is over; `disk_error` is why its disk refused it."""

    job: Job
    is_written: bool
    disk_error: str = ""


class WriteBehind:
    """See the module's text. A thread starts with a job that all others are too busy for."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._waiting: Counter[bytes] = Counter()
        """How many jobs there are of a segment."""
        self._waiting_bytes = 0
        self._patient: dict[Job, float] = {}
        """The jobs that are waited for, and until when; in order."""
        self._given_up = 0
        """How many jobs were given up and have not ended."""
        self._threads: list[threading.Thread] = []

    def offer(self, job: Job) -> bool:
        """Takes the job, unless too much is waiting already, or the disk does not answer. The first one in any case."""
        staged = job.staged
        more = 0 if self._waiting[staged.segment] else staged.segment_bytes
        if self._given_up or (more and self._waiting_bytes and self._waiting_bytes + more > self.bytes_max):
            return False
        self._waiting_bytes += more
        self._waiting[staged.segment] += 1
        self._patient[job] = time.monotonic() + PATIENCE_S
        if len(self._threads) < min(THREADS, len(self._patient)):
            self._threads.append(threading.Thread(target=self._write_all, name="write-behind", daemon=True))
            self._threads[-1].start()
        self._jobs.put(job)
        return True

    def ended(self) -> list[Ended]:
        """The jobs that have ended since the last call."""
        # Always, whatever waits: the thread may have told of a job after the last call had already found that job, and a count
        # that nobody takes keeps the loop awake.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        found: list[Ended] = []
        while not self._ended.empty():
            ended = self._ended.get()
            staged = ended.job.staged
            self._waiting[staged.segment] -= 1
            if not self._waiting[staged.segment]:
                del self._waiting[staged.segment]
                self._waiting_bytes -= staged.segment_bytes
            if self._patient.pop(ended.job, None) is None:
                self._given_up -= 1
            else:
                found.append(ended)
        return found

    @property
    def give_up_at_s(self) -> float | None:
        """When `given_up` will have something, should nothing happen (`time.monotonic`)."""
        return next(iter(self._patient.values()), None)

    def given_up(self, now_s: float) -> list[Job]:
        """The jobs that are not waited for any longer."""
        found = [job for job, give_up_at_s in self._patient.items() if give_up_at_s <= now_s]
        for job in found:
            del self._patient[job]
        self._given_up += len(found)
        return found

    def close(self) -> None:
        """Gives what still waits a moment to be written."""
        for _ in self._threads:
            self._jobs.put(None)
        until_s = time.monotonic() + _CLOSE_WITHIN_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.staged.write()
            except OSError as error:
                # Without memory the blocks cannot be mapped, which says nothing about the disk.
                refused = "" if error.errno == errno.ENOMEM else error.strerror or type(error).__name__
                ended = Ended(job, is_written=False, disk_error=refused)
            except MemoryError:
                ended = Ended(job, is_written=False)
            except Exception as bug:  # noqa: BLE001 - one piece is not cached; without this thread none would be
                ended = Ended(job, is_written=False, disk_error=type(bug).__name__)
            else:
                ended = Ended(job, is_written=True)
            self._ended.put(ended)
            os.eventfd_write(self.fd, 1)
