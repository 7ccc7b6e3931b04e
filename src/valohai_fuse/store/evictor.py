"""Keeps the cache directory within its budget: scans, and deletes the least recently used segments.

"Used" is the time of a file's last change: landing changes a file, and the store touches what was read, at most once per
scan. So all processes and hosts that share the directory see one order, without an index.

Nothing depends on this for correctness: a segment may vanish at any moment, under readers and writers (see `store.opened`).
A deleted file is also cut to length 0, for others may have it open, and its room would stay taken until they let go. One
evictor at a time works where `flock` does; where it does not, two may throw away more than needed.

All the work is done in a thread, off the read path. Must not know the store's bookkeeping, only the names of its files.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from valohai_fuse.model.eviction import Budget, Oldest, Segment
from valohai_fuse.model.segment import FORMAT_DIRECTORY

log = logging.getLogger("valohai_fuse.store")

INTERVAL_S = 5.0
_SCAN_SHARE_MAX = 0.05
"""Of its time the evictor spends at most this share scanning: a huge or slow directory is scanned more rarely."""
_SECTOR_BYTES = 512
_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(r"[0-9a-f]{40}\.[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Pass:
    """What one look at the directory found and did. `scanned` is False when the look was over before a scan."""

    scanned: bool = False
    segments: int = 0
    cached_bytes: int = 0
    evicted_segments: int = 0
    evicted_bytes: int = 0


def scan(cache_dir: str) -> Iterator[Segment]:
    """All segment files below `cache_dir`, in no order; names are relative to the format's directory.

    What vanishes meanwhile, or cannot be looked at, is left out. Files that are not ours are never named.
    """
    home = os.path.join(cache_dir, FORMAT_DIRECTORY)
    for fan_out in _entries(home):
        if not _FAN_OUT.fullmatch(fan_out.name):
            continue
        for entry in _entries(fan_out.path):
            if _NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    name = f"{fan_out.name}/{entry.name}"
                    yield Segment(found.st_mtime_ns, name, found.st_blocks * _SECTOR_BYTES)


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def evict(cache_dir: str, candidate: Segment) -> bool:
    """Deletes one segment, unless it was used since it was scanned; its room is free on return. Never raises OSError."""
    path = os.path.join(cache_dir, FORMAT_DIRECTORY, candidate.name)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_mtime_ns != candidate.used_at_ns:
            return False
        os.unlink(path)
        os.ftruncate(fd, 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class Evictor:
    """Keeps one directory within `budget`. `touch_used` marks what was read since the last pass, in the directory."""

    def __init__(
        self,
        cache_dir: str,
        budget: Budget,
        *,
        touch_used: Callable[[], None] = lambda: None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._cache_dir = cache_dir
        self._budget = budget
        self._touch_used = touch_used
        self._interval_s = interval_s

    async def run(self) -> None:
        """Passes for ever, each in a thread; cancel to end."""
        while True:
            start_s = time.monotonic()
            await trio.to_thread.run_sync(self.run_pass, abandon_on_cancel=True)
            took_s = time.monotonic() - start_s
            await trio.sleep(max(self._interval_s, took_s / _SCAN_SHARE_MAX))

    def run_pass(self) -> Pass:
        """Looks once, and evicts what is too much. Blocks; never raises OSError."""
        try:
            with self._alone() as alone:
                return self._run_alone() if alone else Pass()
        except OSError as error:
            log.debug("no eviction now: %s", error.strerror)
            return Pass()

    def _run_alone(self) -> Pass:
        self._touch_used()
        disk = os.statvfs(self._cache_dir)
        free_bytes, capacity_bytes = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if not self._budget.bytes_max and not self._budget.lacking_bytes(free_bytes, capacity_bytes):
            return Pass()
        segments = cached_bytes = 0
        for found in scan(self._cache_dir):
            segments += 1
            cached_bytes += found.bytes_on_disk
        excess_bytes = self._budget.excess_bytes(cached_bytes, free_bytes, capacity_bytes)
        if not excess_bytes:
            return Pass(True, segments, cached_bytes)
        oldest = Oldest(excess_bytes)
        for found in scan(self._cache_dir):
            oldest.offer(found)
        evicted = [found.bytes_on_disk for found in oldest.chosen() if evict(self._cache_dir, found)]
        return Pass(True, segments, cached_bytes, len(evicted), sum(evicted))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else is evicting here, as far as the file system can tell. Raises OSError."""
        fd = os.open(os.path.join(self._cache_dir, FORMAT_DIRECTORY), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass  # no locks on this file system: two evictors at once only evict too much
            yield True
        finally:
            os.close(fd)
