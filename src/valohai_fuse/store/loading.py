"""Loads whole segments from their files into memory, past the page cache, for a reader that comes there soon.

Read through the page cache, a file's bytes are copied into pages that are new to it and from there to the reader. Loaded
(O_DIRECT) into memory that has served before and lent from it they are not copied by us at all, the page cache keeps what
others use, and the disk is asked for pieces of the size that suits it.

What is loaded is a copy of the file, table and all: each read of it is verified as ever, and what does not verify is looked for
in the file itself.

Threads: `load` belongs to the event loop, `load_segment` runs in threads of a limiter of its own, which read the pieces of
each other's segments, in the order in which the loads were begun (`in_turn`).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Final

import trio

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES
from valohai_fuse.ports import Version
from valohai_fuse.store.huge import HugePages
from valohai_fuse.store.in_turn import Piece, ReadsInTurn
from valohai_fuse.store.memory import Held
from valohai_fuse.store.opened import Contents, OpenSegment
from valohai_fuse.store.places import Place, Places

THREADS: Final = 8
_PIECE_BYTES: Final = 2 * 1024 * 1024
"""Per system call. One disk gave 2,200 to 2,700 MiB/s in pieces of 1 to 4 MiB and 620 to 1,800 in pieces of 8 MiB."""


class Loading:
    """The loads of one store. `possible`: that its disk is one, and not one that may hang."""

    def __init__(self, places: Places, *, possible: bool) -> None:
        self._places = places
        self._possible = possible
        self._limiter = trio.CapacityLimiter(THREADS)
        self._pages = HugePages()
        self._reads = ReadsInTurn()
        self._turn = 0

    async def load(self, place: Place, version: Version) -> bool:
        """See `ports.BlockStore`. Cancelled, it leaves a thread behind that gives the memory back when the disk answers."""
        key, index = place
        if (
            not self._possible
            or segment.segment_bytes(key.size, index) < SEGMENT_BYTES
            or self._places.avoids_file(place)
        ):
            return False
        into = self._places.begin_loading(place)
        if into is None:
            return self._places.is_in_memory(place)
        self._turn += 1
        return await trio.to_thread.run_sync(
            self._load, place, version, into, self._turn, abandon_on_cancel=True, limiter=self._limiter
        )

    def _load(self, place: Place, version: Version, into: Held, turn: int) -> bool:
        blocks = 0
        try:
            source = self._places.file(place)
            if source is not None:
                blocks = load_segment(source, version, into.opened, self._pages, self._reads, turn)
        except OSError as error:
            # Whatever else it is, the reader comes to it by the usual way, and there it is dealt with.
            if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:
                self._possible = False
        finally:
            self._places.end_loading(into, loaded=blocks > 0)
        return blocks == SEGMENT_BLOCKS


def load_segment(
    source: OpenSegment, version: Version, into: OpenSegment, pages: HugePages, reads: ReadsInTurn, turn: int
) -> int:
    """Copies what `source`, a file, has of `version` to the empty memory segment `into`, in its turn. Returns how many blocks;
    0 when there is nothing to copy, or no use in it, for the page cache has it.

    Raises OSError, EINVAL from a file system without direct reads.
    """
    assert into.room is not None, "of full size, so it is mapped"
    fd = os.open(f"/proc/self/fd/{source.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _is_warm(fd):
            return 0
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        with mmap.mmap(-1, segment.PAGE_BYTES) as page:  # aligned
            read = os.preadv(fd, [page], 0)
            contents = source.refresh_from(page[:read])
        if contents is None or contents.version != version or not any(contents.entries):
            return 0
        pages.collapse(into.room, 0, len(into.room))
        os.pwrite(into.fd, segment.encode_header(into.key.stable_id, into.key.size, into.index, version), 0)
        runs = list(_runs(contents))
        if not reads.read(turn, fd, into.room, _pieces(runs)):
            return 0
    finally:
        os.close(fd)
    for first, stop in runs:
        # No more than these: a worker may be landing the others.
        os.pwrite(into.fd, segment.pack_entries(contents.entries[first:stop]), segment.entry_offset(first))
    return sum(stop - first for first, stop in runs)


def _runs(contents: Contents) -> Iterator[tuple[int, int]]:
    """The blocks [first, stop) that are there, in as few pieces as possible."""
    first = 0
    entries = (*contents.entries, 0)
    for block, entry in enumerate(entries):
        if not entry:
            if block > first:
                yield first, block
            first = block + 1


def _pieces(runs: list[tuple[int, int]]) -> Iterator[Piece]:
    for run in runs:
        start, end = (segment.DATA_OFFSET + block * BLOCK_BYTES for block in run)
        for at in range(start, end, _PIECE_BYTES):
            yield at, min(at + _PIECE_BYTES, end)


def _is_warm(fd: int) -> bool:
    """Whether the page cache has the last byte: a reader's own readahead has not come so far. Has the page read if not, and no
    more than that."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        last = segment.DATA_OFFSET + SEGMENT_BYTES - 1
        return os.preadv(fd, [bytearray(1)], last, os.RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno not in {errno.EAGAIN, errno.EOPNOTSUPP}:
            raise
        return False
