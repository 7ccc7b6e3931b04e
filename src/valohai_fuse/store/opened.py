"""An open cache file (or memory segment), and the verified reading of its blocks.

Invariants: bytes leave here only after their block matched its entry *on this very read*, so bit rot, truncation, holes and
foreign writes are all found, whenever they happen. What is remembered of the table only saves looking; it may be stale, and
then a block is looked for in vain or fails to verify.

`Contents` is an immutable snapshot, replaced as a whole: the event loop and the reading threads share an OpenSegment without
a lock, each working on the snapshot it took. The descriptor is closed when the last reference goes, never under a reader:
a thread that still reads keeps it alive by holding it, so eviction from a cache is just forgetting.

Every read is either `nowait`, raising BlockingIOError where a disk would have to be waited for, or waits.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES
from valohai_fuse.ports import ObjectKey, Version

AHEAD_BYTES = SEGMENT_BYTES
"""So far ahead of a reader that goes on where it was the disk is asked to read. A block device's own readahead is 128 KiB,
and begins anew with each segment's file."""
_SECTOR_BYTES = 512
"""The unit of `st_blocks`."""
_END_OFFSET = segment.DATA_OFFSET + SEGMENT_BYTES


@dataclass(frozen=True, slots=True)
class Contents:
    """What header and table said when they were last read. Blocks are counted within the segment."""

    version: Version
    entries: tuple[int, ...]
    seed: int

    def serves(self, version: Version, first: int, byte_count: int) -> bool:
        """Whether there is an entry, of this version, for all blocks that hold `byte_count` bytes from block `first` on."""
        return self.version == version and 0 not in self.entries[first : first + segment.blocks_in(byte_count)]


class OpenSegment:
    """One segment's descriptor. `contents` is None as long as there is no sound header of this very segment."""

    __slots__ = (
        "__weakref__",
        "_advised_stop",
        "_close",
        "_end_is_read",
        "_first_block",
        "_header",
        "_next_block",
        "_occupied_bytes",
        "_unread_bytes",
        "contents",
        "expected_until_s",
        "fd",
        "file_id",
        "index",
        "key",
        "mapped",
        "never_waits",
        "read_at_s",
        "room",
        "used",
    )

    def __init__(
        self, fd: int, key: ObjectKey, index: int, *, never_waits: bool, close: Callable[[int], object] = os.close
    ) -> None:
        """Takes over `fd`, to be given back by `close`, in any thread. `never_waits`: the file is in memory, an ordinary read
        of it is as good as a nowait one."""
        self.fd = fd
        self._close = close
        self.key = key
        self.index = index
        self.never_waits = never_waits
        self.used = False
        """Read since the store last marked what was used."""
        self.read_at_s = 0.0
        """When it was last read, by the store's monotonic clock."""
        self.expected_until_s = 0.0
        """Until then, by the same clock, the next look need not ask whether it is still the file at its path."""
        self.file_id: tuple[int, int] | None = None
        self.mapped: memoryview | None = None
        """The whole of it, where that is memory that cannot shrink."""
        self.room: memoryview | None = None
        """The same to write to, for who loads a file into it."""
        self.contents: Contents | None = None
        self._first_block = index * SEGMENT_BLOCKS
        self._header = b""
        self._next_block = 0
        """Behind what was read last; a hint, so threads may race for it."""
        self._advised_stop = 0
        """So far, as an offset in the file, the disk was asked to read for a sequential reader; another such hint."""
        self._end_is_read = False
        self._occupied_bytes = 0
        self._unread_bytes = segment.segment_bytes(key.size, index)

    def __del__(self) -> None:
        self._close(self.fd)

    @classmethod
    def open(
        cls, path: str, key: ObjectKey, index: int, *, never_waits: bool, close: Callable[[int], object] = os.close
    ) -> OpenSegment:
        """Opens a cache file for reading, without looking into it yet. Raises OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        opened = cls(fd, key, index, never_waits=never_waits, close=close)
        opened.is_seen_as(os.fstat(fd))
        return opened

    def is_seen_as(self, found: os.stat_result) -> bool:
        """Whether `found` is of this file, which is remembered as it is now; the first time it is."""
        file_id = (found.st_dev, found.st_ino)
        if self.file_id is None:
            self.file_id = file_id
        self._occupied_bytes = found.st_blocks * _SECTOR_BYTES
        return self.file_id == file_id

    @property
    def seems_whole(self) -> bool:
        """Whether the file, when it was last seen, took as much of the disk as all its blocks do: what is absent is a hole. Where
        the file system compresses, or takes room in advance, that is wrong, and nothing worse."""
        return self._occupied_bytes >= segment.DATA_OFFSET + segment.segment_bytes(self.key.size, self.index)

    def refresh(self, *, nowait: bool) -> Contents | None:
        """Reads header and table again. Raises OSError, BlockingIOError with `nowait`."""
        page = bytearray(segment.PAGE_BYTES)
        read = self._pread(memoryview(page), 0, nowait=nowait)
        return self.refresh_from(page[:read])

    def refresh_from(self, page: bytes | bytearray) -> Contents | None:
        """The same with what somebody has just read of the first page."""
        if len(page) < segment.PAGE_BYTES:
            self.contents = None
            return None
        header = bytes(page[: segment.HEADER_BYTES])
        if self.contents is None or header != self._header:
            said = segment.decode_header(header)
            if said is None or not self._is_ours(said):
                self.contents = None
                return None
            digest = segment.object_digest(self.key.stable_id, self.key.size)
            seed = segment.hash_seed(digest, said.version)
            contents = Contents(said.version, segment.decode_table(page), seed)
            self._header = header
        else:
            contents = Contents(self.contents.version, segment.decode_table(page), self.contents.seed)
        self.contents = contents
        return contents

    def _is_ours(self, said: segment.Header) -> bool:
        return (
            said.size == self.key.size
            and said.segment_index == self.index
            and said.stable_id == segment.stored_id(self.key.stable_id)
        )

    def read_blocks(self, contents: Contents, first: int, into: memoryview, *, nowait: bool) -> int | None:
        """Fills `into` with the blocks from `first` on, each verified against `contents`.

        Returns the first block that is not what its entry says, None when all are. `into` holds whole blocks, the
        object's last one as short as it is; after a bad block its content means nothing. Raises OSError, BlockingIOError
        with `nowait`.
        """
        wanted, offset = len(into), segment.DATA_OFFSET + first * BLOCK_BYTES
        self._next_block = first + segment.blocks_in(wanted)
        read = self._pread(into, offset, nowait=nowait)
        if read < wanted:
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "only a part is in memory")
            read = self._pread_rest(into, read, offset)
        bad = self._first_bad(contents, first, into, read)
        if bad is None or nowait or self.never_waits:
            return bad
        # What the kernel has of the file may be older than what another host has written there since: ask the disk itself.
        return self._first_bad(contents, first, into, self._pread_past_kernel(into, offset))

    def lend_blocks(self, contents: Contents, first: int, byte_count: int) -> memoryview | None:
        """The same without a copy, of a segment in memory: good as long as nobody else may land in it. None for a file.

        Raises BlockingIOError when a block is not what its entry says.
        """
        if self.mapped is None:
            return None
        start = segment.DATA_OFFSET + first * BLOCK_BYTES
        lent = self.mapped[start : start + byte_count]
        if self._first_bad(contents, first, lent, byte_count) is not None:
            raise BlockingIOError(errno.EAGAIN, "to be looked into in a thread")
        return lent

    def _first_bad(self, contents: Contents, first: int, blocks: memoryview, read: int) -> int | None:
        entries, seed, first_number = contents.entries, contents.seed, self._first_block
        wanted = len(blocks)
        for nth, at in enumerate(range(0, wanted, BLOCK_BYTES), first):
            stop = min(at + BLOCK_BYTES, wanted)
            if stop > read or segment.block_entry(blocks[at:stop], seed, first_number + nth) != entries[nth]:
                return nth
        return None

    def note_read(self, start: int, stop: int) -> bool:
        """Bytes [start, stop) of the object were read from here. Whether a reader has by now come to the segment's end with
        nothing left out: several reads of the kernel's are under way at once, and the last piece may overtake the others."""
        self._unread_bytes -= stop - start
        if stop % SEGMENT_BYTES == 0 or stop == self.key.size:
            self._end_is_read = True
        return self._end_is_read and self._unread_bytes <= 0

    def advise(self, first: int, byte_count: int) -> int:
        """Has the kernel fetch from the disk what is about to be read, all at once, and for a sequential reader more: returns
        how much of that lies beyond this segment. For `read_blocks` that waits; raises nothing."""
        start = segment.DATA_OFFSET + first * BLOCK_BYTES
        stop = start + byte_count
        if first and first != self._next_block:
            self._advised_stop = 0
            self._have_fetched(start, stop)
            return 0
        if stop + AHEAD_BYTES // 2 > self._advised_stop:
            self._have_fetched(max(start, self._advised_stop), stop + AHEAD_BYTES)
            self._advised_stop = stop + AHEAD_BYTES
            return max(0, self._advised_stop - _END_OFFSET)
        return 0

    def ask(self, first: int, byte_count: int) -> None:
        """Has the kernel fetch these blocks and no more, without waiting for them; raises nothing."""
        start = segment.DATA_OFFSET + first * BLOCK_BYTES
        self._have_fetched(start, start + byte_count)

    def prepare(self, byte_count: int, *, again: bool = False) -> None:
        """The same before the first read, for a reader that is on its way: table and first `byte_count` bytes. `again`: they may
        have been read and be gone from memory."""
        stop = segment.DATA_OFFSET + byte_count
        advised_stop = 0 if again else self._advised_stop
        if stop > advised_stop:
            self._have_fetched(advised_stop, stop)
            self._advised_stop = max(stop, self._advised_stop)

    def _have_fetched(self, start: int, stop: int) -> None:
        if not self.never_waits:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _pread(self, into: memoryview, offset: int, *, nowait: bool) -> int:
        if not nowait or self.never_waits:
            return os.preadv(self.fd, [into], offset)
        try:
            return os.preadv(self.fd, [into], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # network file systems, mostly: nobody knows whether it would wait
                raise BlockingIOError(errno.EAGAIN, "cannot tell whether this would wait") from None
            raise

    def _pread_rest(self, into: memoryview, read: int, offset: int) -> int:
        while read < len(into):
            step = os.preadv(self.fd, [into[read:]], offset + read)
            if step == 0:
                break
            read += step
        return read

    def _pread_past_kernel(self, into: memoryview, offset: int) -> int:
        """Reads what the disk has. The kernel is asked to forget its copy, which alone is not enough: it keeps pages that somebody
        maps, reads or has only just put there."""
        length = -(-len(into) // segment.PAGE_BYTES) * segment.PAGE_BYTES
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            try:
                with mmap.mmap(-1, length) as aligned:
                    read = min(os.preadv(fd, [aligned], offset), len(into))
                    into[:read] = aligned[:read]
            finally:
                os.close(fd)
        except OSError:  # a file system without direct reads, or a file that has no name any more
            read = 0
        return self._pread_rest(into, read, offset)


class Run(NamedTuple):
    """Consecutive blocks that one open segment has: bytes [start, stop) of the object, `first` counted in the segment."""

    opened: OpenSegment
    contents: Contents
    first: int
    start: int
    stop: int

    def lent(self) -> memoryview | None:
        """See `OpenSegment.lend_blocks`."""
        return self.opened.lend_blocks(self.contents, self.first, self.stop - self.start)
