"""Lands blocks in a cache file: the writing half of the format, used by the fetch workers.

Any number of processes, on any number of hosts, may land in one segment at once: an object's bytes are the same for all of
them, and so are header and entries, so whatever order the writes take the file only gains blocks. Hence no locks, no
temporary names and no fsync (see `model.segment`). The data goes out before the entry that vouches for it, so that a reader
does not distrust a block that is just on its way; correctness does not depend on that order.

What is found at the path decides how a writer starts:
- nothing, or an empty file: writes the header;
- the very header it would write: goes on from there;
- a sound header of another version or object: someone may be reading that file, so it is unlinked and a new one made;
- anything else (torn, rotten): header and an empty table are written over it. Not unlinked, for two writers who meet the
  same rubbish would unlink each other's new file.

What is received straight into a memory segment is hashed as it lies there, directly after it has come: nobody else writes to that
part of it (`store.memory`). It is written to its file later, from there (`copy_out`). Directly (O_DIRECT), where the file
system can: the bytes were served from memory, and a second copy of them in the page cache costs more than everything else
on the way. Nobody waits for that write but the thread that makes it.

Must not know: HTTP, the store's bookkeeping, retries. Errors of the disk are raised as they are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES
from valohai_fuse.ports import ObjectKey, Version
from valohai_fuse.store.huge import map_whole
from valohai_fuse.store.mappings import Mappings

_REPLACE_ATTEMPTS_MAX = 4
"""Two writers of two versions can take the file from one another; that many times is bad luck, more is a fault."""


MEMORY_NAME = "valohai-fuse-segment"
"""The name of memory segments' memfds (see `store.memory`): by it a writer knows that it opened one."""

_DIRECT_BYTES_MIN = 512 * 1024
"""Less than this is written through the page cache: a direct write waits for the device each time."""


def is_memory_path(path: str) -> bool:
    """Whether a segment path leads to a memory segment of some process instead of a file on disk."""
    return path.startswith("/proc/")


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite until all of `data` is out; a full disk cuts a write short before it refuses the next. Raises OSError."""
    written = os.pwrite(fd, data, offset)
    if written == len(data):
        return
    rest = memoryview(data)
    while written < len(rest):
        step = os.pwrite(fd, rest[written:], offset + written)
        if step == 0:
            raise OSError(errno.EIO, "a write to the cache made no progress")
        written += step


class SegmentWriter:
    """Writes blocks of one version of one object into one segment file. One thread uses it at a time."""

    __slots__ = (
        "_came",
        "_came_start",
        "_fd",
        "_first_block",
        "_mapped",
        "_mappings",
        "_seed",
        "_size",
        "_start",
        "_stop",
    )

    def __init__(
        self, path: str, key: ObjectKey, segment_index: int, version: Version, mappings: Mappings | None = None
    ) -> None:
        """Opens the segment at `path`, making or replacing the file where needed. `mappings`: those that may be used again.

        Raises OSError as the disk gave it; ValueError for a version longer than `segment.VERSION_BYTES_MAX` bytes or a
        segment beyond the object's end.
        """
        self._fd = -1
        self._mappings = mappings
        self._mapped: memoryview | None = None
        self._came: segment.EntriesInPieces | None = None
        """What vouches for that which was put into the mapped memory."""
        self._came_start = 0
        length = segment.segment_bytes(key.size, segment_index)
        if length == 0:
            raise ValueError(f"an object of {key.size} bytes has no segment {segment_index}")
        self._size = key.size
        self._start = segment_index * SEGMENT_BYTES
        self._stop = self._start + length
        self._first_block = self._start // BLOCK_BYTES
        digest = segment.object_digest(key.stable_id, key.size)
        self._seed = segment.hash_seed(digest, version)
        header = segment.encode_header(key.stable_id, key.size, segment_index, version)
        if is_memory_path(path):
            self._fd = _open_memory(path, header)
        else:
            self._fd = _open_file(path, header)

    def land(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Makes the whole blocks in `data` present; `offset` is that of the first, in the object, block-aligned.

        Only the object's last block may be short. Returns when any reader can read them. Raises OSError as the disk gave
        it (blocks before the failure may have landed), ValueError for bytes that are not whole blocks of this segment.
        """
        view = memoryview(data)
        self._check(offset, offset + len(view))
        write_all(self._fd, view, self._place(offset))
        self._vouch(offset, segment.encode_entries(view, self._seed, offset // BLOCK_BYTES))

    def _place(self, offset: int) -> int:
        """Where in the segment the object's byte at `offset` lies."""
        return segment.DATA_OFFSET + offset - self._start

    def _check(self, offset: int, stop: int) -> None:
        if offset % BLOCK_BYTES or (stop % BLOCK_BYTES and stop != self._size) or stop <= offset:
            raise ValueError(f"not whole blocks: [{offset}, {stop}) of {self._size} bytes")
        if not self._start <= offset < stop <= self._stop:
            raise ValueError(f"not in this segment: [{offset}, {stop})")

    def _vouch(self, offset: int, entries: bytes) -> None:
        write_all(self._fd, entries, segment.entry_offset(offset // BLOCK_BYTES - self._first_block))

    def map(self, start: int, stop: int) -> None:
        """Makes room to `put` bytes [start, stop) of the object, whole blocks, straight into this memory segment.

        Raises OSError when there is not as much memory, ValueError for what is not such a range or no segment of the store's.
        """
        self._check(start, stop)
        if self._mappings is None:
            self._mapped = map_whole(self._fd, os.fstat(self._fd).st_size)
        else:
            self._mapped = self._mappings.map(self._fd, self._place(start), self._place(stop), time.monotonic())
        self._came = segment.EntriesInPieces(self._seed, start)
        self._came_start = start

    def put(self, data: bytes | memoryview) -> None:
        """Copies the next bytes to their place; nobody sees them before `vouch`. Any cut, from the start of what is mapped on."""
        assert self._mapped is not None, "map() comes first"
        assert self._came is not None
        at = self._place(self._came.stop)
        self._mapped[at : at + len(data)] = data
        self._came.add(data)

    def room(self, most: int) -> memoryview:
        """Where the next bytes belong, `most` at the most: to be filled from its start, and then told by `took`. For whoever
        alone writes there, or the hash would be that of somebody else's bytes."""
        assert self._mapped is not None, "map() comes first"
        assert self._came is not None
        at = self._place(self._came.stop)
        return self._mapped[at : at + most]

    def took(self, data: memoryview) -> None:
        """So much has come into `room`."""
        assert self._came is not None, "map() comes first"
        self._came.add(data)

    def vouch(self, offset: int, stop: int) -> None:
        """Makes the whole blocks [offset, stop), which were put there, present. Raises as `land`."""
        self._check(offset, stop)
        self._vouch(offset, self._entries(offset, stop))

    def _entries(self, start: int, stop: int) -> bytes:
        came = self._came
        assert came is not None, "map() comes first"
        if stop > came.stop:
            raise ValueError(f"[{start}, {stop}) has not come")
        if stop == self._size:
            came.end_block()
        first = (start - self._came_start) // BLOCK_BYTES
        return segment.pack_entries(came.entries[first : first + segment.blocks_in(stop - start)])

    def copy_out(self, path: str, key: ObjectKey, version: Version, start: int, stop: int) -> None:
        """Writes blocks [start, stop) of the object, which have landed in this memory segment where it is mapped, to the
        segment file at `path`, with the entries of what came: should anybody spoil the memory meanwhile, the file's block does
        not verify.

        Raises OSError as the disk gave it.
        """
        assert self._mapped is not None, "map() comes first"
        offset = self._place(start)
        first = start // BLOCK_BYTES - self._first_block
        entries = self._entries(start, stop)
        with (
            SegmentWriter(path, key, self._start // SEGMENT_BYTES, version) as file,
            self._mapped[offset : offset + stop - start] as data,
        ):
            direct = len(data) - len(data) % segment.PAGE_BYTES if len(data) >= _DIRECT_BYTES_MIN else 0
            with _writing_directly(file._fd) as possible:
                direct = _write_directly(file._fd, data[:direct], offset) if possible else 0
            if direct < len(data):
                write_all(file._fd, data[direct:], offset + direct)
            write_all(file._fd, entries, segment.entry_offset(first))

    def give_up(self) -> None:
        """The order has ended badly: its memory is not landed in again. Raises OSError."""
        if self._mapped is not None and self._mappings is not None:
            self._mappings.forget(self._fd)

    def close(self) -> None:
        """Gives the descriptor back; a second call does nothing. Raises OSError (network file systems write late)."""
        fd, self._fd = self._fd, -1
        self._mapped = None
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Landings:
    """Where one process lands: one writer after the other, on mappings of memory segments that are kept for the next."""

    def __init__(self) -> None:
        self._mappings = Mappings()

    def open(self, path: str, key: ObjectKey, segment_index: int, version: Version) -> SegmentWriter:
        """As SegmentWriter."""
        return SegmentWriter(path, key, segment_index, version, self._mappings)

    def expect(self, path: str, start: int, stop: int) -> None:
        """Bytes [start, stop) of the object will be landed in the memory segment at `path` soon: has memory made ready. Raises
        nothing; what is in the way is met again by `open`."""
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _is_memory(fd):
                    base = start - start % SEGMENT_BYTES - segment.DATA_OFFSET
                    self._mappings.expect(fd, start - base, stop - base, time.monotonic())
            finally:
                os.close(fd)

    @property
    def due_at_s(self) -> float | None:
        """When `expire` has something to do (`time.monotonic`); None: not before a segment is opened."""
        return self._mappings.due_at_s

    def expire(self, now_s: float) -> None:
        """Gives back the memory that has not been landed in for a while."""
        self._mappings.expire(now_s)


def _open_file(path: str, header: bytes) -> int:
    for _ in range(_REPLACE_ATTEMPTS_MAX):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            found = os.pread(fd, segment.HEADER_BYTES, 0)
            if found == header:
                return fd
            if not found:
                write_all(fd, header, 0)
                return fd
            if segment.decode_header(found) is None:
                write_all(fd, header + segment.EMPTY_TABLE, 0)
                return fd
            os.unlink(path)
        except FileNotFoundError:
            os.close(fd)  # another writer unlinked it first
            continue
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise OSError(errno.ESTALE, "other versions of the object keep taking the segment's place", path)


def _open_memory(path: str, header: bytes) -> int:
    """The daemon may have forgotten this segment, and the descriptor's number may mean something else by now, or its memory
    hold another segment: such a thing is recognised, by the memfd's name and the header, and not written to."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        is_it = _is_memory(fd)
        if is_it:
            found = os.pread(fd, segment.HEADER_BYTES, 0)
            is_it = _are_of_one_segment(found, header)
            if is_it and found != header:
                write_all(fd, header + segment.EMPTY_TABLE, 0)
    except BaseException:
        os.close(fd)
        raise
    if not is_it:
        os.close(fd)
        raise OSError(errno.ESTALE, "the memory segment is gone", path)
    return fd


def _is_memory(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{MEMORY_NAME} ")


def _are_of_one_segment(found: bytes, own: bytes) -> bool:
    """Whether two headers differ in the version at most."""
    there, ours = segment.decode_header(found), segment.decode_header(own)
    assert ours is not None, "made by ourselves"
    return there is not None and (there.stable_id, there.size, there.segment_index) == (
        ours.stable_id,
        ours.size,
        ours.segment_index,
    )


@contextlib.contextmanager
def _writing_directly(fd: int) -> Iterator[bool]:
    """Switches the page cache off for `fd` during the block, where that can be done (says whether)."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _write_directly(fd: int, data: memoryview, offset: int) -> int:
    """How much of `data`, from its start, was written; less than all where the file system does not like direct writes.

    Raises OSError.
    """
    at = 0
    try:
        while at < len(data):
            written = os.pwrite(fd, data[at:], offset + at)
            at += written
            if not written or written % segment.PAGE_BYTES:
                break
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
    return at
