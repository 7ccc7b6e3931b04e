"""Writes behind the readers' backs: what has landed in memory goes to its segment file in a thread of the worker.

The disk must not set the pace of a stream, nor may it be owed without bound: no more than QUEUE_BYTES_MAX wait here, and what
is offered beyond is refused. It stays in memory for its readers and is simply not cached, so a disk that is slower than the
network gets as much as it can take, and the network goes on.

Threads: `offer`, `ended` and `close` belong to the worker's loop, `_write_all` is the thread. They share two queues; `fd`
becomes readable when `ended` has something. A job is done with once its writing has ended, whatever came of it.
Must not know: HTTP, what a segment file looks like.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from valohai_fuse.fetch.wire import Done

QUEUE_BYTES_MAX: Final = 32 * 1024 * 1024
"""Half a second of a disk that writes 64 MB/s; a faster one never has as much waiting."""
_CLOSE_WITHIN_S: Final = 1.0
"""The daemon kills a worker that has not ended two seconds after it was asked to."""


@dataclass(frozen=True, slots=True)
class Job:
    """One order's bytes, to be written by calling `write` (which may raise OSError)."""

    byte_count: int
    write: Callable[[], None]
    done: Done | None
    """What to tell the daemon afterwards; None: nobody waits to hear of it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that is over; `disk_error` is why its disk refused it."""

    job: Job
    is_written: bool
    disk_error: str = ""


class WriteBehind:
    """See the module's text. The thread starts with the first job."""

    def __init__(self) -> None:
        self.fd: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None

    def offer(self, job: Job) -> bool:
        """Takes the job, unless too much is waiting already."""
        if self._waiting_bytes and self._waiting_bytes + job.byte_count > QUEUE_BYTES_MAX:
            return False
        self._waiting_bytes += job.byte_count
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="write-behind", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return True

    def ended(self) -> list[Ended]:
        """The jobs that have ended since the last call."""
        found: list[Ended] = []
        if self._waiting_bytes:
            try:
                os.eventfd_read(self.fd)
            except BlockingIOError:
                return found
        while not self._ended.empty():
            found.append(self._ended.get())
            self._waiting_bytes -= found[-1].job.byte_count
        return found

    def close(self) -> None:
        """Gives what still waits a moment to be written."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_CLOSE_WITHIN_S)

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.write()
            except OSError as error:
                # Without memory the blocks cannot be mapped, which says nothing about the disk.
                refused = "" if error.errno == errno.ENOMEM else error.strerror or type(error).__name__
                ended = Ended(job, is_written=False, disk_error=refused)
            except MemoryError:
                ended = Ended(job, is_written=False)
            else:
                ended = Ended(job, is_written=True)
            self._ended.put(ended)
            os.eventfd_write(self.fd, 1)
