"""Keeps the cache directory within its budget: scans, and deletes the least recently used segments.

"Used" is the time of a file's last change: landing changes a file, and the store touches what was read, unless it is young
anyway. So all processes and hosts that share the directory see one order, without an index. What somebody is fetching into
stays (`store.claims`), and what is being read here goes last.

With a `Room` it works ahead: fetches take room before they begin, and a pass runs as soon as half of the slack below the
bound is taken, so that a fetch rarely waits for one.

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
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import trio

from valohai_fuse.model.eviction import Budget, Oldest, Segment
from valohai_fuse.model.segment import FORMAT_DIRECTORY
from valohai_fuse.store.claims import Claims
from valohai_fuse.store.room import Room

log = logging.getLogger("valohai_fuse.store")

INTERVAL_S = 5.0
_SCAN_SHARE_MAX = 0.05
"""Of its time the evictor spends at most this share scanning: a huge or slow directory is scanned more rarely. Not so where
fetches wait for room: then a scan follows upon the other, and each frees the whole slack."""
_FRUITLESS_PAUSE_S = 0.05
"""After a pass that was wanted and freed nothing: others have the lock, or all is in use, or the disk is full of others' files."""
_LOCK_PATIENCE_S = 0.5
"""How long a pass that is wanted waits for another process's to end."""
_LOCK_POLL_S = 0.005
_FIRST_SHARE = 0.04
_FIRST_BYTES_MAX = 1024 * 1024 * 1024
"""The first pass does not know how much is there, and has candidates ready for so much above the bound: looking twice at a million
files takes 5 s more. So many of 20 KiB take 15 MiB of memory."""
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
    """All segment files below `cache_dir`, in no order; names are relative to the format's directory. Some 5 us each.

    What vanishes meanwhile, or cannot be looked at, is left out. Files that are not ours are never named.
    """
    for fan_out in fan_outs(cache_dir):
        yield from scan_fan_out(cache_dir, fan_out)


def fan_outs(cache_dir: str) -> list[str]:
    """The directories in the format's directory that hold segments. All segments of one object are in the same."""
    home = os.path.join(cache_dir, FORMAT_DIRECTORY)
    return [entry.name for entry in _entries(home) if _FAN_OUT.fullmatch(entry.name)]


def scan_fan_out(cache_dir: str, fan_out: str) -> Iterator[Segment]:
    """As `scan`, one of `fan_outs`."""
    is_name = _NAME.fullmatch
    for entry in _entries(os.path.join(cache_dir, FORMAT_DIRECTORY, fan_out)):
        if is_name(entry.name):
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            name = f"{fan_out}/{entry.name}"
            yield Segment(found.st_mtime_ns, name, found.st_blocks * _SECTOR_BYTES, found.st_size)


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


class _Candidates:
    """What could go of all that is offered, as long as no more than `bytes_max` are to go."""

    def __init__(self, bytes_max: int, in_use: AbstractSet[str]) -> None:
        self._idle = Oldest(bytes_max)
        self._in_use = in_use
        self._busy: list[Segment] = []

    def offer(self, candidate: Segment) -> None:
        if candidate.name in self._in_use:
            self._busy.append(candidate)
        else:
            self._idle.offer(candidate)

    def chosen(self, wanted_bytes: int) -> list[Segment]:
        chosen = _oldest(self._idle.chosen(), wanted_bytes)
        lacking_bytes = wanted_bytes - sum(candidate.bytes_on_disk for candidate in chosen)
        return chosen + _oldest(self._busy, lacking_bytes) if lacking_bytes > 0 else chosen


def _oldest(found: Iterable[Segment], wanted_bytes: int) -> list[Segment]:
    oldest = Oldest(wanted_bytes)
    for candidate in found:
        oldest.offer(candidate)
    return oldest.chosen()


def choose(found: Iterable[Segment], wanted_bytes: int, in_use: AbstractSet[str]) -> list[Segment]:
    """The least recently used, oldest first; those in use come last and only where the others are not enough."""
    candidates = _Candidates(wanted_bytes, in_use)
    for candidate in found:
        candidates.offer(candidate)
    return candidates.chosen(wanted_bytes)


class Evictor:
    """Keeps one directory within `budget`. `touch_used` marks what was read since the last pass, in the directory; `in_use`
    names the segments that are being read here. Both are called in the evictor's thread."""

    def __init__(
        self,
        cache_dir: str,
        budget: Budget,
        *,
        room: Room | None = None,
        touch_used: Callable[[], None] = lambda: None,
        in_use: Callable[[], AbstractSet[str]] = frozenset,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """With `room`, a pass also runs as soon as that wants one."""
        self._cache_dir = cache_dir
        self._budget = budget
        self._room = room
        self._touch_used = touch_used
        self._in_use = in_use
        self._interval_s = interval_s
        self._is_first = True

    async def run(self) -> None:
        """Passes for ever, each in a thread; cancel to end."""
        while True:
            start_s = time.monotonic()
            done = await trio.to_thread.run_sync(self.run_pass, abandon_on_cancel=True)
            took_s = time.monotonic() - start_s
            pause_s = max(self._interval_s, took_s / _SCAN_SHARE_MAX)
            if self._room is None:
                await trio.sleep(pause_s)
                continue
            fruitless = self._room.wanted.is_set() and not done.evicted_segments
            self._room.wanted = trio.Event()
            self._room.notify(fruitless=fruitless)
            if fruitless:
                await trio.sleep(max(_FRUITLESS_PAUSE_S, took_s))
            with trio.move_on_after(pause_s):
                await self._room.wanted.wait()

    def run_pass(self) -> Pass:
        """Looks once, and evicts what is too much. Blocks; never raises OSError."""
        self._touch_used()
        if self._room is not None:
            self._room.beat()
        try:
            with self._alone() as alone:
                return self._run_alone() if alone else Pass()
        except OSError as error:
            log.debug("no eviction now: %s", error.strerror)
            return Pass()

    def _run_alone(self) -> Pass:
        budget, room = self._budget, self._room
        disk = os.statvfs(self._cache_dir)
        free_bytes, capacity_bytes = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if room is not None:
            free_bytes -= room.reserved_bytes()
            lacking = budget.pressing_bytes(0, free_bytes, capacity_bytes)
        else:
            lacking = budget.lacking_bytes(free_bytes, capacity_bytes)
        if not budget.bytes_max and not lacking:
            return Pass()
        before, expected_bytes = {}, lacking
        if room is not None:
            before = room.records_swept()
            expected_bytes = budget.pressing_bytes(room.used_bytes(), free_bytes, capacity_bytes)
        if self._is_first:
            guess_bytes = budget.slack_bytes + int(budget.bytes_max * _FIRST_SHARE)
            expected_bytes = max(expected_bytes, min(guess_bytes, _FIRST_BYTES_MAX))
            self._is_first = False
        in_use = self._in_use()
        candidates = _Candidates(expected_bytes, in_use)
        segments = cached_bytes = 0
        for found in scan(self._cache_dir):
            segments += 1
            cached_bytes += found.bytes_on_disk
            candidates.offer(found)
        if room is not None:
            room.measured(before, room.records_now(), cached_bytes)
            excess_bytes = budget.pressing_bytes(room.used_bytes(), free_bytes, capacity_bytes)
        else:
            excess_bytes = budget.excess_bytes(cached_bytes, free_bytes, capacity_bytes)
        if excess_bytes <= 0:
            return Pass(True, segments, cached_bytes)
        if excess_bytes <= expected_bytes:
            evicted = self._evict(candidates.chosen(excess_bytes))
        else:  # a bound that was lowered: nobody could know how much would have to go
            evicted = self._evict(choose(scan(self._cache_dir), excess_bytes, in_use))
        return Pass(True, segments, cached_bytes, len(evicted), sum(evicted))

    def _evict(self, chosen: list[Segment]) -> list[int]:
        """Returns how much each has given that went."""
        evicted: list[int] = []
        claims = Claims(self._cache_dir)
        try:
            for candidate in chosen:
                if not claims.is_claimed(candidate.name) and evict(self._cache_dir, candidate):
                    evicted.append(candidate.bytes_on_disk)
                    if self._room is not None:
                        self._room.evicted(candidate.bytes_on_disk)
        finally:
            claims.close()
        return evicted

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else is evicting here, as far as the file system can tell. Raises OSError."""
        fd = os.open(os.path.join(self._cache_dir, FORMAT_DIRECTORY), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            yield self._lock(fd)
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> bool:
        give_up_s = time.monotonic() + (_LOCK_PATIENCE_S if self._room is not None else 0)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= give_up_s:
                    return False
                time.sleep(_LOCK_POLL_S)
            except OSError:
                return True  # no locks on this file system: two evictors at once only evict too much
            else:
                return True
