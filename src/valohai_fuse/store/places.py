"""Where the blocks of a segment are: keeps open segments at hand, looks for them on the disk, and deals with bad ones.

A segment is in memory (where the disk would not take it), in its file, in both, or nowhere. What is at hand is an outdated
snapshot at worst; `look` looks again, for others (our workers, other daemons, other hosts) land, replace and evict at any
moment.

A fault is one time that a segment's file let a reader down. From FAULTS_TOLERATED on the file is left alone for
FAULT_MEMORY_S, and the segment lives in memory meanwhile: otherwise a rotten sector could send a read round in circles,
fetched, landed, found bad, fetched...

Threads: any. The maps are touched only under `_lock`, which is never held over a system call that can wait. Open segments
need no lock (see `store.opened`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from cachetools import LRUCache, TTLCache

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES, Extent
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store.calls import DiskCalls, NotAnsweringError
from valohai_fuse.store.health import RateLimitedLog
from valohai_fuse.store.memory import Held, MemorySegments
from valohai_fuse.store.opened import Contents, OpenSegment

FAULTS_TOLERATED = 2
FAULT_MEMORY_S = 600.0
_FAULTS_MAX = 4096
TOUCH_AGE_S = 10.0
"""A file that is younger is not touched. So what a reader streams through keeps the order in which it landed, and what was
read already goes before what was fetched ahead."""
READING_S = 5.0
"""The segment of an object that was last read, if that was less than READING_S ago, is being read."""
EXPECTED_S = 0.25
"""So long after an open, or after it was foreseen, its first read need not ask again whether the file is still at its path."""
STAGED_IDLE_S = 15.0
"""So long after the last piece was staged the memory is given back."""
ABANDONED_S = 0.5
"""So long after a staged fetch was given up its worker may still be writing what had landed: it has half a second's work of a
disk that writes 128 MB/s waiting at the most (`fetch.behind`)."""
_USED_MAX = 65536
"""Segments read between two touches; what is beyond passes for as old as its last touch."""

Place = tuple[ObjectKey, int]
"""An object and the index of one of its segments."""


class Places:
    """The segments of one cache directory, `home` being the format's directory in it."""

    def __init__(
        self,
        home: str,
        *,
        disk: DiskCalls,
        descriptors_max: int,
        memory_bytes_max: int,
        never_waits: bool,
        monotonic: Callable[[], float],
        warnings: RateLimitedLog,
    ) -> None:
        """`never_waits`: the directory is in memory, so reading it needs no care."""
        self._home = home
        self._disk = disk
        self._close = functools.partial(disk.later, os.close) if disk.may_hang else os.close  # type: ignore[call-arg]
        """A network file system may want to be told, and waited for, when a file is closed."""
        self._never_waits = never_waits
        self._warnings = warnings
        self._lock = threading.Lock()
        self._opened: LRUCache[Place, OpenSegment] = LRUCache(max(1, descriptors_max))
        self._memory = MemorySegments(memory_bytes_max)
        self._monotonic = monotonic
        self._faults: TTLCache[Place, int] = TTLCache(_FAULTS_MAX, FAULT_MEMORY_S, timer=monotonic)
        self._used: set[Place] = set()
        self.blocks_distrusted = 0
        self.files_unreadable = 0
        self._staged_at_s = 0.0
        self._abandoned: deque[tuple[float, Held]] = deque()
        """Pins that are taken back later, and when."""

    def close(self) -> None:
        """Forgets all; the descriptors go with their last user."""
        with self._lock:
            self._opened.clear()
            self._memory.clear()

    def forget_files(self) -> None:
        """Gives back the descriptors of files, as `close`; what is still there is opened again when it is asked for."""
        with self._lock:
            self._opened.clear()

    def counts(self) -> tuple[int, int, int]:
        """Open files, segments in memory, and the bytes that the latter take when full."""
        with self._lock:
            return len(self._opened), len(self._memory), self._memory.bytes_when_full

    def path(self, place: Place) -> str:
        """Where the segment's file is, if it is."""
        return os.path.join(self._home, self.name(place))

    @staticmethod
    def name(place: Place) -> str:
        """The same below the format's directory."""
        key, index = place
        return segment.segment_name(segment.object_digest(key.stable_id, key.size).hex(), index)

    def blocks(self, key: ObjectKey, extent: Extent) -> tuple[str, int, int]:
        """The segment's name and the blocks [first, stop) of it that `extent`, which lies within one, touches."""
        index, within = divmod(extent.start, SEGMENT_BYTES)
        first = within // BLOCK_BYTES
        return self.name((key, index)), first, first + segment.blocks_in(len(extent))

    @contextlib.contextmanager
    def in_memory(
        self,
        place: Place,
        extent: Extent,
        *,
        stands_in: bool,
        may_replace: bool = False,
    ) -> Iterator[str | None]:
        """Where a worker lands `extent` of the segment in memory; it stays there during the block, and for ABANDONED_S more if
        that ends badly. None: no room, for staging (see `MemorySegments.take`).

        Raises OSError.
        """
        with self._lock:
            self._unpin_abandoned()
            held = self._memory.take(*place, extent, stands_in=stands_in, may_replace=may_replace)
            self._staged_at_s = self._monotonic()
        if held is None:
            yield None
            return
        try:
            yield held.path
        except BaseException:
            with self._lock:
                self._memory.give_up(held, extent)
                self._abandoned.append((self._monotonic() + ABANDONED_S, held))
            raise
        with self._lock:
            self._memory.release(held)

    def begin_loading(self, place: Place) -> Held | None:
        """Empty memory, pinned until `end_loading`, for a copy of the segment's file; None: it is there already, or no room."""
        with self._lock, contextlib.suppress(OSError):
            into = self._memory.take_empty(*place)
            if into is not None:
                self._staged_at_s = self._monotonic()
            return into
        return None

    def is_in_memory(self, place: Place) -> bool:
        """Whether the segment, or what has come of it, is in memory."""
        with self._lock:
            return self._memory.get(*place) is not None

    def end_loading(self, into: Held, *, loaded: bool) -> None:
        """Nobody writes there any more."""
        with self._lock:
            self._memory.end_loading(into, loaded=loaded)

    def file(self, place: Place) -> OpenSegment | None:
        """The segment's file, about to be read. Blocks; raises OSError."""
        opened = self._file(place)
        if opened is not None:
            self.mark_used(opened)
        return opened

    def _unpin_abandoned(self) -> None:
        while self._abandoned and self._abandoned[0][0] <= self._monotonic():
            self._memory.release_given_up(self._abandoned.popleft()[1])

    # --- looking ------------------------------------------------------------------------------------------------------

    def at_hand(self, place: Place) -> OpenSegment | None:
        """The segment as it was last seen, without any system call. No file of a disk that is stuck."""
        with self._lock:
            return self._memory.get(*place) or (None if self._disk.stuck else self._opened.get(place))

    def look_in_memory(self, place: Place) -> list[tuple[OpenSegment, Contents]]:
        """The segment in memory as of now, if there is one with any block."""
        with self._lock:
            in_memory = self._memory.get(*place)
        places: list[tuple[OpenSegment, Contents]] = []
        if in_memory is not None:
            self._refresh(in_memory, places, nowait=False)
        return places if places and any(places[0][1].entries) else []

    def look(self, place: Place, *, nowait: bool, to_keep: bool = False) -> list[tuple[OpenSegment, Contents]]:
        """Where blocks of the segment are, as of now; a disk that is stuck has none. `to_keep`: in the file, not in memory.

        Raises BlockingIOError with `nowait`, nothing else.
        """
        places = [] if to_keep else self.look_in_memory(place)
        if not self.avoids_file(place):
            try:
                places += self._disk.call(self._look_at_file, place, nowait=nowait)
            except BlockingIOError:
                raise
            except NotAnsweringError:
                pass
            except OSError as error:
                if nowait:
                    raise BlockingIOError(errno.EAGAIN, "to be looked into in a thread") from error
                self.unreadable(place, error)
        return places

    def prepare(self, place: Place, byte_count: int) -> None:
        """Opens the segment's file, if there is one, and has the disk read its table and first `byte_count` bytes. For a
        reader that comes there soon. Blocks as `look` does; raises nothing."""
        self._prepare(place, byte_count, again=False)

    def expect(self, place: Place, byte_count: int) -> bool:
        """The same for one that has just opened it, or will presently: what was read before may be gone from memory, and the next
        look finds the file that is found here. Whether the file seems to have all blocks (`OpenSegment.seems_whole`)."""
        with self._lock:
            opened = self._opened.get(place)
        if opened is None or opened.expected_until_s <= self._monotonic():
            opened = self._prepare(place, byte_count, again=True)
            if opened is None:
                return False
            opened.expected_until_s = self._monotonic() + EXPECTED_S
        return opened.seems_whole

    def _prepare(self, place: Place, byte_count: int, *, again: bool) -> OpenSegment | None:
        with contextlib.suppress(OSError):
            return (
                None if self.avoids_file(place) else self._disk.call(self._prepare_file, place, byte_count, again=again)
            )
        return None

    def _prepare_file(self, place: Place, byte_count: int, *, again: bool) -> OpenSegment | None:
        opened = self._file(place)
        if opened is not None:
            opened.prepare(byte_count, again=again)
        return opened

    def _look_at_file(self, place: Place, *, nowait: bool) -> list[tuple[OpenSegment, Contents]]:
        places: list[tuple[OpenSegment, Contents]] = []
        opened = self._file(place)
        if opened is not None:
            self._refresh(opened, places, nowait=nowait)
        return places

    @staticmethod
    def _refresh(opened: OpenSegment, places: list[tuple[OpenSegment, Contents]], *, nowait: bool) -> None:
        contents = opened.refresh(nowait=nowait)
        if contents is not None:
            places.append((opened, contents))

    def _file(self, place: Place) -> OpenSegment | None:
        """The open file that is at the segment's path now; None when there is none. Raises OSError."""
        with self._lock:
            opened = self._opened.get(place)
        if opened is not None and opened.expected_until_s:
            expected_until_s, opened.expected_until_s = opened.expected_until_s, 0.0
            if self._monotonic() < expected_until_s:
                return opened
        path = self.path(place)
        try:
            if opened is not None:
                # By path and not by link count: not every network file system counts links.
                found = os.stat(path, follow_symlinks=False)
                if opened.is_seen_as(found):
                    return opened
            opened = self._open(path, place)
        except (FileNotFoundError, NotADirectoryError):
            self._forget(place)
            return None
        with self._lock:
            self._opened[place] = opened
        return opened

    def _open(self, path: str, place: Place) -> OpenSegment:
        key, index = place
        try:
            return OpenSegment.open(path, key, index, never_waits=self._never_waits, close=self._close)
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE}:
                raise
        with self._lock:
            self._opened.clear()
        return OpenSegment.open(path, key, index, never_waits=self._never_waits, close=self._close)

    def _forget(self, place: Place) -> None:
        with self._lock:
            self._opened.pop(place, None)

    def discard(self, place: Place) -> None:
        """Removes the segment; who reads it now still has its bytes. Raises nothing: at worst it stays."""
        self._disk.later(os.unlink, self.path(place))
        with self._lock:
            self._opened.pop(place, None)
            self._memory.discard(*place)

    def listed(self, key: ObjectKey) -> list[int]:
        """Indexes of the object's segments that exist, by one listing; anything on the disk that is in the way is none."""
        fan_out, name = os.path.split(self.path((key, 0)))
        prefix = name.removesuffix("0")
        with self._lock:
            indexes = set(self._memory.indexes(key))
        try:
            names = [name for name in self._disk.call(os.listdir, fan_out) if name.startswith(prefix)]
        except OSError:
            names = []
        for name in names:
            index_text = name.removeprefix(prefix)
            if index_text and set(index_text) <= set("0123456789abcdef"):
                indexes.add(int(index_text, 16))
        return sorted(indexes)

    # --- what is used ---------------------------------------------------------------------------------------------------

    def mark_used(self, opened: OpenSegment) -> None:
        """Remembers, until `touch_used`, that the segment was read. Costs next to nothing the second time."""
        opened.read_at_s = self._monotonic()
        if opened.used:
            return
        if opened.file_id is None:
            opened.used = True
            return
        with self._lock:
            if len(self._used) < _USED_MAX:
                opened.used = True
                self._used.add((opened.key, opened.index))

    def note_read_to_end(self, opened: OpenSegment) -> None:
        """A reader has come to the end of a segment: if it is in memory, that may be used again."""
        if opened.file_id is None:
            with self._lock:
                self._memory.note_read(opened)

    def touch_used(self) -> None:
        """Sets the time of the files that were read, by which evictors of all processes see what is used, and gives back the
        memory of what was staged some time ago. Blocks."""
        with self._lock:
            self._unpin_abandoned()
            if self._monotonic() - self._staged_at_s > STAGED_IDLE_S:
                self._memory.drop_staged()
            used, self._used = self._used, set()
            for place in used:
                opened = self._opened.get(place)
                if opened is not None:
                    opened.used = False
        for place in used:
            path = self.path(place)
            with contextlib.suppress(OSError):  # evicted meanwhile, or a disk that takes no writes
                if time.time() - os.stat(path, follow_symlinks=False).st_mtime > TOUCH_AGE_S:
                    os.utime(path, follow_symlinks=False)

    def being_read(self) -> set[str]:
        """Names, below the format's directory, of the segments that readers are at: of each object the last one."""
        since_s = self._monotonic() - READING_S
        latest: dict[ObjectKey, OpenSegment] = {}
        with self._lock:
            for opened in self._opened.values():
                if opened.read_at_s > since_s and (
                    opened.key not in latest or latest[opened.key].read_at_s < opened.read_at_s
                ):
                    latest[opened.key] = opened
        return {self.name((opened.key, opened.index)) for opened in latest.values()}

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def avoids_file(self, place: Place) -> bool:
        """Whether the segment's file is left alone for now."""
        with self._lock:
            return self._faults.get(place, 0) >= FAULTS_TOLERATED

    def fault(self, place: Place, count: int = FAULTS_TOLERATED) -> None:
        """Takes down `count` faults of the segment's file, by default enough to leave it alone."""
        with self._lock:
            self._faults[place] = self._faults.get(place, 0) + count
            self._opened.pop(place, None)

    def unreadable(self, place: Place, error: OSError) -> None:
        """The segment's file could not be opened or read."""
        if error.errno in {errno.ESTALE, errno.ENOENT}:  # a network file system's way to say that it was replaced
            self._forget(place)
            return
        reason = error.strerror or type(error).__name__
        with self._lock:
            self.files_unreadable += 1
        self._warnings.warn("unreadable", f"a cache file cannot be read ({reason}); its data is fetched again")
        self.fault(place)

    def distrust(self, opened: OpenSegment, believed: Contents, block: int) -> None:
        """A block was not what its entry in `believed` says: takes the entry away, so that all fetch it again.

        Raises OSError.
        """
        entry = believed.entries[block]
        contents = opened.refresh(nowait=False)
        if contents is None or contents.seed != believed.seed or contents.entries[block] != entry:
            return  # the snapshot was outdated: the file was replaced, evicted, or the block landed anew
        if self._disk.may_hang and _is_on_its_way(opened, contents, block):
            return
        place = (opened.key, opened.index)
        with self._lock:
            self.blocks_distrusted += 1
        name = os.path.basename(self.path(place))
        self._warnings.warn("distrust", f"block {block} of cache file {name} failed its check; it is fetched again")
        with self._lock:
            is_copy = opened.file_id is None and not self._memory.holds(opened, stands_in=True)
        try:
            self._clear_entry(opened, block)
        except OSError:
            self.fault(place)
        else:
            if not is_copy:  # whether the file is any better is about to be seen
                self.fault(place, 1)

    def _clear_entry(self, opened: OpenSegment, block: int) -> None:
        offset = segment.entry_offset(block)
        if opened.file_id is None:
            os.pwrite(opened.fd, segment.ABSENT_ENTRY, offset)
            return
        path = self.path((opened.key, opened.index))
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) == opened.file_id:
                os.pwrite(fd, segment.ABSENT_ENTRY, offset)
        finally:
            os.close(fd)


def _is_on_its_way(opened: OpenSegment, contents: Contents, block: int) -> bool:
    """Whether a bad block is no damage, in a file that other hosts write to: it is right by now, or lies beyond the end of the
    file as it is known here. A host remembers for seconds how long a file is; the entry in the first page may be newer."""
    start = (opened.index * SEGMENT_BLOCKS + block) * BLOCK_BYTES
    length = min(BLOCK_BYTES, opened.key.size - start)
    is_beyond = not os.pread(opened.fd, 1, segment.DATA_OFFSET + block * BLOCK_BYTES + length - 1)
    return opened.read_blocks(contents, block, memoryview(bytearray(length)), nowait=False) is None or is_beyond
