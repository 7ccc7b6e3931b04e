"""Fetches whole files that nobody reads yet: the work behind `prefetch` and `download`.

The life of a file: sized where its size is not known, cut into pieces of one segment each, and each piece is missing blocks ->
flights -> landed -> kept (`Keep`: the cache is enough for `prefetch`, `download` copies it into a file). At most `pieces_max`
pieces are under way, whether of one large file or of as many small ones; the files are begun in the order given.

A file that fails is told in `progress` and does not stop the others; its remaining pieces are left out. There is no limit on the
time of a file, only on a silence: `patience_s` without a byte. Whatever has landed stays when the run is cancelled.

Concurrency: all state changes on the trio thread in functions that do not await in between; `_Piece.flights` is filled before the
piece waits. A piece holds a handle on its file, so that the reader neither forgets the object nor gives up its flights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from valohai_fuse import errors
from valohai_fuse.engine.flights import Flight, Flights
from valohai_fuse.engine.objects import Handle
from valohai_fuse.engine.reader import Reader
from valohai_fuse.engine.sizing import Sizing
from valohai_fuse.model.extents import Extent, split_by_segment
from valohai_fuse.model.tree import Inode, Tree
from valohai_fuse.ports import Priority

FAILURES_TOLD_MAX: Final = 100
"""Failures kept with their words; beyond that they are only counted."""
STEP_BYTES: Final = 1024 * 1024
"""A silence is noticed when less than this lands within the patience."""
ROUNDS_MAX: Final = 3
"""How often a piece may land and be gone again, in a cache that is smaller than what is fetched at once, or find a disk that
takes nothing."""
REFUSED_PAUSE_S: Final = 1.0
"""A disk that takes nothing is asked again after that, by a piece; not any more once a file failed for it, until it takes one."""
BREATH_FILES: Final = 100


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot. `bytes` is the sum over the files whose size is known by now, `bytes_done` what of it is there, however it
    came there, `bytes_fetched` what came from a store. `failures` are (path, why), the first of `files_failed`."""

    files: int
    files_done: int
    files_failed: int
    bytes: int
    bytes_done: int
    bytes_fetched: int
    failures: tuple[tuple[str, str], ...]


class Keep(Protocol):
    """What becomes of a file's pieces. Methods raise ReadError when the file cannot be kept; it counts as failed then."""

    in_cache: bool
    """The cache's files are where they are kept, so a slow disk is waited for."""

    async def begin(self, inode: Inode, size: int) -> tuple[Iterable[Extent], int]:
        """The pieces wanted, each within one segment and ascending, and how many bytes are there already beside them."""
        ...

    async def landed(self, handle: Handle, piece: Extent) -> None:
        """`piece` is in the store. Called for several pieces of a file at a time, in any order."""
        ...

    async def complete(self, inode: Inode, size: int) -> None:
        """All pieces of the file were kept."""
        ...


class InCache:
    """Nothing is to be done: what has landed is in the cache."""

    in_cache = True

    async def begin(self, inode: Inode, size: int) -> tuple[Iterable[Extent], int]:  # noqa: ARG002 - the protocol's shape
        """All of the file."""
        return split_by_segment(Extent(0, size)), 0

    async def landed(self, handle: Handle, piece: Extent) -> None:
        """That was it."""

    async def complete(self, inode: Inode, size: int) -> None:
        """That was it."""


@dataclass(slots=True)
class _File:
    inode: Inode
    size: int
    pieces_open: int = 0
    offered: bool = False
    """All its pieces have been handed out."""
    over: bool = False


@dataclass(slots=True, eq=False)
class _Piece:
    file: _File
    extent: Extent
    flights: list[tuple[Flight, int, int]] = field(default_factory=list)
    """What brings it: the flight, and the bytes [from, to) of it that count for this piece."""

    @property
    def fetched(self) -> int:
        return sum(min(max(flight.landed, start), stop) - start for flight, start, stop in self.flights)

    @property
    def there(self) -> int:
        """Bytes that are in the cache by now, as far as that is known: none before the first look."""
        missing = sum(stop - start for _, start, stop in self.flights)
        return len(self.extent) - missing + self.fetched if self.flights else 0


class Prefetch:
    """One run over some files. `run` once; `progress` at any time, from the trio thread."""

    def __init__(
        self,
        *,
        tree: Tree,
        reader: Reader,
        flights: Flights,
        sizing: Sizing,
        keep: Keep,
        priority: Priority,
        pieces_max: int,
        patience_s: float,
    ) -> None:
        self._tree = tree
        self._reader = reader
        self._flights = flights
        self._sizing = sizing
        self._keep = keep
        self._priority = priority
        self._pieces_max = pieces_max
        self._patience_s = patience_s
        self._under_way: set[_Piece] = set()
        self._files = self._files_done = self._files_failed = 0
        self._bytes = self._bytes_done = self._bytes_fetched = 0
        self._failures: list[tuple[str, str]] = []
        self._unsized = trio.Semaphore(pieces_max)
        self._disk_refuses = False

    def progress(self) -> Progress:
        """How far it is."""
        fetched = sum(piece.fetched for piece in self._under_way)
        return Progress(
            files=self._files,
            files_done=self._files_done,
            files_failed=self._files_failed,
            bytes=self._bytes,
            bytes_done=self._bytes_done + sum(piece.there for piece in self._under_way),
            bytes_fetched=self._bytes_fetched + fetched,
            failures=tuple(self._failures),
        )

    async def run(self, inodes: Iterable[Inode]) -> None:
        """Fetches the files; raises nothing of its own, `progress` tells what failed."""
        wanted = list(inodes)
        self._files = len(wanted)
        for position, inode in enumerate(wanted):
            self._bytes += self._tree.size(inode) or 0
            if position % (10 * BREATH_FILES) == 0:
                await trio.lowlevel.checkpoint()
        send, receive = trio.open_memory_channel[_Piece](0)
        async with trio.open_nursery() as workers, receive:
            for _ in range(self._pieces_max):
                workers.start_soon(self._work, receive.clone())
            async with send, trio.open_nursery() as unsized:
                for position, inode in enumerate(wanted):
                    if position % BREATH_FILES == 0:
                        await trio.lowlevel.checkpoint()
                    if self._tree.size(inode) is None:
                        await self._unsized.acquire()
                        unsized.start_soon(self._size_and_offer, inode, send.clone())
                    else:
                        await self._offer(inode, send)

    async def _size_and_offer(self, inode: Inode, send: trio.MemorySendChannel[_Piece]) -> None:
        try:
            async with send:
                try:
                    size = await self._sizing.wait_known(inode)
                except errors.ReadError as error:
                    self._fail(inode, error)
                else:
                    self._bytes += size
                    await self._offer(inode, send)
        finally:
            self._unsized.release()

    async def _offer(self, inode: Inode, send: trio.MemorySendChannel[_Piece]) -> None:
        """Hands out the pieces of a file of known size, as fast as they are taken."""
        size = self._tree.size(inode)
        assert size is not None, "asked for by the caller"
        if self._tree.local(inode):  # on the disk already, below the mount point
            self._files_done += 1
            self._bytes_done += size
            return
        file = _File(inode, size)
        try:
            pieces, there = await self._keep.begin(inode, size)
        except errors.ReadError as error:
            file.over = True
            self._fail(inode, error)
            return
        self._bytes_done += there
        for extent in pieces:
            if file.over:
                break
            file.pieces_open += 1
            await send.send(_Piece(file, extent))
        file.offered = True
        await self._finish(file)

    async def _work(self, receive: trio.MemoryReceiveChannel[_Piece]) -> None:
        async with receive:
            async for piece in receive:
                try:
                    if not piece.file.over:
                        await self._bring(piece)
                except errors.ReadError as error:
                    self._end_failed(piece.file, error)
                piece.file.pieces_open -= 1
                await self._finish(piece.file)

    async def _finish(self, file: _File) -> None:
        """Ends the file once, when its last piece is done."""
        if file.over or file.pieces_open or not file.offered:
            return
        file.over = True
        try:
            await self._keep.complete(file.inode, file.size)
        except errors.ReadError as error:
            self._fail(file.inode, error)
        else:
            self._files_done += 1

    def _end_failed(self, file: _File, error: errors.ReadError) -> None:
        if not file.over:
            file.over = True
            self._fail(file.inode, error)

    def _fail(self, inode: Inode, error: errors.ReadError) -> None:
        self._files_failed += 1
        if len(self._failures) < FAILURES_TOLD_MAX:
            self._failures.append((self._tree.path(inode), error.message))

    # --- one piece ----------------------------------------------------------------------------------------------------

    async def _bring(self, piece: _Piece) -> None:
        """Lands the piece and keeps it. Raises ReadError."""
        handle, _ = self._reader.open(piece.file.inode)
        self._under_way.add(piece)
        there = None
        try:
            await self._land(handle, piece)
            await self._keep.landed(handle, piece.extent)
            there = len(piece.extent)
        finally:
            self._under_way.remove(piece)
            self._bytes_fetched += piece.fetched
            self._bytes_done += piece.there if there is None else there
            self._reader.close(handle)

    async def _land(self, handle: Handle, piece: _Piece) -> None:
        obj = handle.object
        for _ in range(ROUNDS_MAX):
            gaps = self._reader.gaps(obj, piece.extent, to_keep=self._keep.in_cache)
            if not gaps:
                return
            for gap in gaps:
                self._flights.begin(obj, gap, self._priority, to_keep=self._keep.in_cache)
            flights = self._flights.covering(obj, piece.extent)
            self._bytes_fetched += piece.fetched  # of the round before, which came to nothing
            piece.flights = [
                (flight, max(flight.landed, piece.extent.start), min(flight.extent.stop, piece.extent.stop))
                for flight in flights
            ]
            for flight in flights:
                flight.want(trio.current_time() + self._patience_s)  # before the first of them is waited for
            for flight, _start, stop in piece.flights:
                await self._wait_landed(flight, stop, handle)
            if self._keep.in_cache:
                await self._note_refused(piece)
        if self._reader.gaps(obj, piece.extent, to_keep=self._keep.in_cache):
            refused = self._disk_refuses = any(flight.landed < stop for flight, _start, stop in piece.flights)
            why = "the cache directory takes no writes" if refused else "the cache does not keep what it is given"
            raise errors.ReadError(f"{obj.label}: {why}")

    async def _note_refused(self, piece: _Piece) -> None:
        """Gives a disk that took nothing of the last round some time, if it may need only that."""
        if all(flight.landed >= stop for flight, _start, stop in piece.flights):
            self._disk_refuses = False
        elif not self._disk_refuses:
            await trio.sleep(REFUSED_PAUSE_S)

    async def _wait_landed(self, flight: Flight, stop: int, handle: Handle) -> None:
        """Until `flight` has landed up to `stop`, however long that takes while bytes come. Raises ReadError."""
        while flight.landed < stop and not flight.over:
            upto = min(stop, flight.landed + STEP_BYTES)
            with trio.move_on_after(self._patience_s) as scope:
                await flight.wait_landed(upto, trio.current_time() + self._patience_s)
            handle.check()
            if scope.cancelled_caught:
                raise errors.DeadlineExceededError(
                    f"{handle.object.label}: nothing came for {self._patience_s:g} s, though it was asked for again"
                )
        await flight.wait_landed(stop, trio.current_time())  # says why, if it ended before
