"""Takes room in the cache directory *before* something is fetched into it, so that the bounds hold at every moment.

Each process that lands in the directory keeps a record in `shares/`: how many bytes it was ever granted, how many of those
belong to fetches that are over, and how many it has evicted. Whoever scans notes all records first; from then on

    what is used  <=  what the scan found + granted now - over at the scan - evicted since

summed over all processes, whatever they landed, failed to land or landed twice. A process *publishes* what it takes and
*then* looks at the sum: of two that take the last room at once, at least one sees the other and gives back. So the bound
needs no lock. A record without a living owner (its flock is free, or nobody wrote it for STALE_S where there are no locks)
is removed by whoever scans next; who misses one scans again.

Until the first scan the directory is taken for full, and PROVISIONAL_SHARE of the bound may be used beyond that.

Threads: any; the state is under `_lock`, `wait` and `wanted` belong to the event loop. Must not know what a segment is.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import trio

from valohai_fuse.model.eviction import Budget
from valohai_fuse.model.segment import FORMAT_DIRECTORY
from valohai_fuse.store.calls import DiskCalls, NotAnsweringError

log = logging.getLogger("valohai_fuse.store")

SHARES_DIRECTORY: Final = "shares"
PROVISIONAL_SHARE: Final = 0.01
STALE_S: Final = 120.0
BEAT_S: Final = 20.0
"""A record is written anew at least this often, which only matters where nothing can be locked."""
_RETRY_S: Final = 0.05
"""How long a waiter waits for the evictor's word before it looks by itself: others make room, too, and tell nobody."""
_JOIN_ATTEMPTS_MAX = 4
_RECORD = struct.Struct("<QQQ")
_NOTHING = (0, 0, 0)
_OURS = ""
"""Our record among the others', which go by their file's name."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a scan started from, and found. Records are (granted, over, evicted) by name."""

    before: dict[str, tuple[int, int, int]]
    after: dict[str, tuple[int, int, int]]
    cached_bytes: int
    provisional: bool = False


class Room:
    """The room of one cache directory as this process sees it."""

    def __init__(self, cache_dir: str, budget: Budget, *, disk: DiskCalls | None = None) -> None:
        """Touches nothing yet. `disk` is the way to it, by default of one that never hangs."""
        self._disk = disk or DiskCalls(may_hang=False)
        self._cache_dir = cache_dir
        self._shares_dir = os.path.join(cache_dir, FORMAT_DIRECTORY, SHARES_DIRECTORY)
        self._budget = budget
        self._lock = threading.Lock()
        self._own_name = ""
        self._own_fd = -1
        self._granted = self._over = self._evicted = 0
        self._written_at_s = 0.0
        self._late: deque[tuple[float, int]] = deque()
        """What is given back later: when, and how much."""
        self._baseline: Baseline | None = None
        self._others: dict[str, int] = {}
        """Descriptors of the other processes' records."""
        self._listed_at_ns = 0
        self._missed_one = False
        self._locks_work = True
        self.wanted = trio.Event()
        """Set when an eviction should not wait for its turn; replaced by the evictor."""
        self._changed = trio.Event()
        self._fruitless = 0
        """Passes that were wanted and freed nothing."""

    def close(self) -> None:
        """Gives the descriptors back; whoever scans next removes our record."""
        with self._lock:
            for fd in self._others.values():
                os.close(fd)
            self._others.clear()
            if self._own_fd >= 0:
                os.close(self._own_fd)
                self._own_fd = -1

    # --- taking and giving back (event loop) --------------------------------------------------------------------------

    def reserve(self, byte_count: int) -> bool:
        """Takes room for `byte_count` bytes on disk, if there is any. Waits for nothing; a disk that is stuck has none."""
        taken: list[bool] = []
        try:
            fits, pressed = self._disk.call(self._take, byte_count, taken)
        except NotAnsweringError:
            self._disk.later(self._untake, byte_count, taken)
            return False
        if pressed or not fits:
            self.wanted.set()
        return fits

    def _take(self, byte_count: int, taken: list[bool]) -> tuple[bool, bool]:
        """Whether there was room, and whether it is getting tight; `taken` says the first to who has stopped waiting."""
        with self._lock:
            self._release_late()
            self._granted += byte_count
            self._publish()
            fits, pressed = self._fits()
            if not fits:
                self._granted -= byte_count
                self._publish()
        taken.append(fits)
        return fits, pressed

    def _untake(self, byte_count: int, taken: list[bool]) -> None:
        if taken == [True]:
            self._give_back(byte_count)

    async def reserve_soon(self, byte_count: int, patience_s: float) -> bool:
        """The same, waiting up to `patience_s` for others to end or for the evictor; not once that has found nothing twice."""
        give_up = self._fruitless + 2
        with trio.move_on_after(patience_s):
            while True:
                changed = self._changed
                with trio.move_on_after(_RETRY_S):
                    await changed.wait()
                if self.reserve(byte_count):
                    return True
                if self._fruitless >= give_up:
                    return False
        return False

    @contextlib.asynccontextmanager
    async def taken(self, byte_count: int, *, patience_s: float, given_up_after_s: float = 0.0) -> AsyncIterator[bool]:
        """Takes room while the block runs, as `reserve_soon` does; says whether there was any. `given_up_after_s`: so much later
        it is given back where the block ends badly."""
        if not self.reserve(byte_count) and not await self.reserve_soon(byte_count, patience_s):
            yield False
            return
        try:
            yield True
        except BaseException:
            self.release(byte_count, after_s=given_up_after_s)
            raise
        self.release(byte_count)

    def release(self, byte_count: int, *, after_s: float = 0.0) -> None:
        """The fetch for which room was taken is over; what it landed is the directory's. `after_s`: something of it may still
        be written for so long."""
        self._disk.later(self._give_back, byte_count, after_s)
        if not after_s:
            self.notify()

    def _give_back(self, byte_count: int, after_s: float = 0.0) -> None:
        with self._lock:
            if after_s:
                self._late.append((time.monotonic() + after_s, byte_count))
                return
            self._over += byte_count
            self._publish()

    def notify(self, *, fruitless: bool = False) -> None:
        """Wakes those who wait for room. `fruitless`: a pass has looked for what could go and found nothing."""
        self._fruitless += fruitless
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # --- measuring (the evictor's thread) -----------------------------------------------------------------------------

    def records_swept(self) -> dict[str, tuple[int, int, int]]:
        """The records of all living processes; those of dead ones are removed. For before a scan."""
        with self._lock:
            if self._release_late():
                self._publish()
            self._remove_dead()
            return self._records()

    def records_now(self) -> dict[str, tuple[int, int, int]]:
        """All records, as they are. For after a scan."""
        with self._lock:
            return self._records()

    def measured(
        self, before: dict[str, tuple[int, int, int]], after: dict[str, tuple[int, int, int]], cached_bytes: int
    ) -> None:
        """A scan that began after `before` was read and ended before `after` was has found `cached_bytes`."""
        with self._lock:
            self._baseline = Baseline(before, after, cached_bytes)
            self._missed_one = False

    def evicted(self, byte_count: int) -> None:
        """We have freed that much."""
        with self._lock:
            self._evicted += byte_count
            self._publish()

    def used_bytes(self) -> int:
        """What the directory holds at the most, reservations included. 0 when nothing bounds it or nothing is known."""
        with self._lock:
            return self._used() if self._budget.bytes_max else 0

    def reserved_bytes(self) -> int:
        """What all processes have taken and not given back."""
        with self._lock:
            return sum(granted - over for granted, over, _ in self._records().values())

    # --- inside (under the lock) ----------------------------------------------------------------------------------------

    def _release_late(self) -> bool:
        """Whether anything was due."""
        over = self._over
        while self._late and self._late[0][0] <= time.monotonic():
            self._over += self._late.popleft()[1]
        return self._over != over

    def _fits(self) -> tuple[bool, bool]:
        """Whether what is taken now is within the bounds, and whether it is close to them."""
        budget = self._budget
        pressed = False
        if budget.bytes_max:
            used = self._used()
            bound = budget.bytes_max
            assert self._baseline is not None
            if self._baseline.provisional:
                bound += int(bound * PROVISIONAL_SHARE)
            if used > bound:
                return False, True
            pressed = used > budget.bytes_max - budget.slack_bytes // 2
        if budget.free_min_bytes or budget.free_min_share:
            try:
                disk = os.statvfs(self._cache_dir)
            except OSError:
                return True, False  # a directory that is gone has no bounds; landing there will say so
            reserved = sum(granted - over for granted, over, _ in self._records().values())
            free = disk.f_bavail * disk.f_frsize - reserved
            spare = free - budget.free_wanted_bytes(disk.f_blocks * disk.f_frsize)
            if spare < 0:
                return False, True
            pressed = pressed or spare < budget.slack_bytes // 2
        return True, pressed

    def _used(self) -> int:
        now = self._records()
        if self._baseline is None:
            others = {name: record for name, record in now.items() if name != _OURS}
            self._baseline = Baseline(others, now, self._budget.bytes_max, provisional=True)
        elif self._missed_one:
            # Somebody's record was removed: what it held since our scan is unknown until the next one.
            self._baseline = Baseline(now, now, self._budget.bytes_max, provisional=True)
        self._missed_one = False
        base = self._baseline
        used = base.cached_bytes
        for name, (granted, _, evicted) in now.items():
            used += granted - base.before.get(name, _NOTHING)[1]
            if name == _OURS or self._locks_work:
                # Others evict under the lock that the scan was made under: what they report since was there then.
                used -= evicted - base.after.get(name, _NOTHING)[2]
        return used

    def _publish(self) -> None:
        """Writes our record; without one (a disk that takes no writes) we are alone with our figures."""
        if self._own_fd < 0 and not self._join():
            return
        self._written_at_s = time.monotonic()
        with contextlib.suppress(OSError):
            os.pwrite(self._own_fd, _RECORD.pack(self._granted, self._over, self._evicted), 0)

    def beat(self) -> None:
        """Keeps our record from looking stale."""
        with self._lock:
            if time.monotonic() - self._written_at_s > BEAT_S:
                self._publish()

    def _join(self) -> bool:
        """Makes our record. Another process may take it for a dead one's until it is locked: then the next is tried."""
        with contextlib.suppress(OSError):
            os.mkdir(self._shares_dir, 0o700)
        for _ in range(_JOIN_ATTEMPTS_MAX):
            name = f"{os.getpid()}-{secrets.token_hex(6)}"
            path = os.path.join(self._shares_dir, name)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError:
                return False
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            except OSError:
                self._locks_work = False
            if os.path.exists(path):
                self._own_fd, self._own_name = fd, name
                return True
            os.close(fd)
        return False

    def _records(self) -> dict[str, tuple[int, int, int]]:
        self._list_others()
        records = {_OURS: (self._granted, self._over, self._evicted)}
        for name, fd in self._others.items():
            with contextlib.suppress(OSError):
                found = os.pread(fd, _RECORD.size, 0)
                records[name] = _RECORD.unpack(found) if len(found) == _RECORD.size else _NOTHING
        return records

    def _list_others(self) -> None:
        """Opens the records of processes that have come, closes those that are gone; a listing only when one has."""
        try:
            changed_at_ns = os.stat(self._shares_dir).st_mtime_ns
            if changed_at_ns == self._listed_at_ns:
                return
            names = set(os.listdir(self._shares_dir))
            if self._own_fd >= 0 and self._own_name not in names:  # somebody deleted the directory, or all in it
                os.close(self._own_fd)
                self._own_fd = -1
            names.discard(self._own_name)
        except OSError:
            return
        gone = [name for name in self._others if name not in names]
        for name in gone:
            os.close(self._others.pop(name))
        if gone or (self._listed_at_ns and names == self._others.keys()):  # the same: one came and went
            self._missed_one = True
        for name in names - self._others.keys():
            with contextlib.suppress(OSError):
                self._others[name] = os.open(
                    os.path.join(self._shares_dir, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                )
        # Two changes within one tick of the file system's clock look like one: a fresh listing is made again.
        recent = abs(time.time_ns() - changed_at_ns) < 50_000_000
        self._listed_at_ns = 0 if recent else changed_at_ns

    def _remove_dead(self) -> None:
        self._list_others()
        for name, fd in list(self._others.items()):
            if self._is_dead(fd):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self._shares_dir, name))
                self._missed_one = True
                os.close(self._others.pop(name))  # and with it the lock that `_is_dead` took

    def _is_dead(self, fd: int) -> bool:
        if self._locks_work:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                self._locks_work = False
            else:
                return True
        try:
            return time.time() - os.fstat(fd).st_mtime > STALE_S
        except OSError:
            return True
