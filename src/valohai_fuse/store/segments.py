"""The block cache: reads verified blocks out of segment files, says what is missing, and says where to land it.

Reading first tries what is known of the segments it touches; only where that does not suffice it looks at the files again.
What goes wrong with the disk is absence for the reader, never an error:
- a block that does not verify loses its entry and is fetched again (`store.places`);
- a disk that refuses writes gets no more for a while, new segments go to memory, what the disk holds is still read
  (`store.placement`, `store.health`);
- a disk that does not answer within `patience_s` is not waited for;
- a file system that can hang as a whole is called through `store.calls`, and while it is stuck there is nothing in it.

Threads: everything here belongs to the event loop, except `cached_bytes`, which may run anywhere, and the inside of `read`,
which runs in threads of a limiter of its own. What they share is in `Places`, which is made for that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager

import trio

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent, block_ceil, block_floor, split_by_segment
from valohai_fuse.ports import ABSENT, COLD, FOREIGN, LandingPlace, NotHere, ObjectKey, Version
from valohai_fuse.store.calls import DiskCalls, NotAnsweringError
from valohai_fuse.store.claims import Claims
from valohai_fuse.store.directory import Home, lies_in_memory
from valohai_fuse.store.health import RateLimitedLog, StoreStatistics
from valohai_fuse.store.loading import Loading
from valohai_fuse.store.opened import Run
from valohai_fuse.store.placement import Placement, reason_of
from valohai_fuse.store.places import Places
from valohai_fuse.store.room import Room
from valohai_fuse.store.soon import SOON_BYTES_MAX, Bytes, Soon

MEMORY_BYTES_MAX = 128 * 1024 * 1024
DESCRIPTORS_MAX = 1024
READING_THREADS = 8
PATIENCE_S = 10.0
SERVED_PATIENCE_S = 3.0
"""The same where a server may be gone, or slow for so long that fetching again is no worse."""
EXPECTED_BYTES = 128 * 1024
"""What a first read asks for as a rule: the kernel's own first readahead."""
_READ_ATTEMPTS_MAX = 4
"""A bad block or an outdated snapshot sends a read back to looking; in the end it is absent."""
_LISTING_SEGMENTS_MIN = 32
"""From this many segments on, listing the directory beats asking for each of them."""


class SegmentStore:
    """`ports.BlockStore` on a directory."""

    def __init__(
        self,
        cache_dir: str,
        *,
        room: Room | None = None,
        disk: DiskCalls | None = None,
        memory_bytes_max: int = MEMORY_BYTES_MAX,
        descriptors_max: int | None = None,
        patience_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the directory where it is missing. Where that cannot be done, everything stays in memory (WARNING).
        With `room`, nothing lands on the disk that was not granted there first (an `Evictor` on the same room must run).
        `disk` is the room's; by default one that never hangs.

        Raises ConfigurationError for a directory that is not safe to use.
        """
        if descriptors_max is None:
            descriptors_max = min(DESCRIPTORS_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._room = room
        self._disk = disk or DiskCalls(may_hang=False)
        self._home = Home(cache_dir, self._disk)
        self._claims = Claims(cache_dir)
        self._patience_s = patience_s or (SERVED_PATIENCE_S if self._disk.may_hang else PATIENCE_S)
        self._limiter = trio.CapacityLimiter(READING_THREADS)
        self._monotonic = monotonic
        self._soon = Soon(possible=not self._disk.may_hang, monotonic=monotonic)
        self._warnings = RateLimitedLog(monotonic)
        refusal = None
        try:
            self._home.make()
        except OSError as error:
            refusal = reason_of(error)
        in_memory = lies_in_memory(self._home.path)
        self._places = Places(
            self._home.path,
            disk=self._disk,
            descriptors_max=descriptors_max,
            memory_bytes_max=memory_bytes_max,
            never_waits=in_memory,
            monotonic=monotonic,
            warnings=self._warnings,
        )
        self._placement = Placement(
            self._home,
            self._places,
            disk=self._disk,
            claims=self._claims,
            room=room,
            monotonic=monotonic,
            warnings=self._warnings,
        )
        if refusal is not None:
            self._placement.refused(refusal)
        self._loading = Loading(self._places, possible=not (in_memory or self._disk.may_hang))

    def close(self) -> None:
        """Gives all descriptors back; a read that is still in a thread keeps its own until it is done."""
        self._places.close()
        self._disk.later(self._claims.close)
        if self._room is not None:
            self._disk.later(self._room.close)

    def statistics(self) -> StoreStatistics:
        """How things stand."""
        open_segments, memory_segments, memory_bytes = self._places.counts()
        return StoreStatistics(
            open_segments,
            memory_segments,
            memory_bytes,
            self._places.blocks_distrusted,
            self._placement.is_well,
            self._placement.failures + self._places.files_unreadable,
        )

    def touch_used(self) -> None:
        """Marks on disk which segments were read since the last call, for the evictors of all processes. Blocks: call it in
        a thread (`store.evictor` does)."""
        self._places.touch_used()

    def being_read(self) -> set[str]:
        """Names of the segments that readers are at, for the evictor to leave them to the last. Any thread."""
        return self._places.being_read()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_nowait(self, key: ObjectKey, version: Version, extent: Extent, *, lend: bool = False) -> Bytes | NotHere:
        """The bytes of `extent`, if that needs no waiting for the disk; see `ports.BlockStore`."""
        try:
            return self._read(key, version, extent, nowait=True, lend=lend)
        except BlockingIOError:
            return COLD

    async def read(self, key: ObjectKey, version: Version, extent: Extent) -> Bytes | NotHere:
        """The bytes of `extent`, read in a thread; ABSENT when the disk takes longer than the store's patience."""
        if self._disk.stuck:
            found = self.read_nowait(key, version, extent)
            return ABSENT if found is COLD else found
        found = await self._read_soon(key, version, extent)
        if found is not COLD:
            return found
        began_s = self._monotonic()
        with trio.move_on_after(self._patience_s):
            found = await trio.to_thread.run_sync(
                self.read_blocking, key, version, extent, abandon_on_cancel=True, limiter=self._limiter
            )
            self._soon.note(self._monotonic() - began_s)
            return found
        self._warnings.warn("slow", f"the cache disk did not answer for {self._patience_s:g} s; fetching again instead")
        if self._is_stuck():
            return ABSENT  # which is no fault of these segments
        for part in split_by_segment(extent):
            self._places.fault((key, part.start // SEGMENT_BYTES))
        return ABSENT

    def _is_stuck(self) -> bool:
        """Asks the disk for a sign of life."""
        with contextlib.suppress(OSError):
            self._disk.call(os.lstat, self._home.path)
        return self._disk.stuck

    async def _read_soon(self, key: ObjectKey, version: Version, extent: Extent) -> Bytes | NotHere:
        """The same without a thread, where that is quicker; COLD where it is not."""
        if self._soon.is_quick and len(extent) <= SOON_BYTES_MAX:
            start, stop = block_floor(extent.start), block_ceil(extent.stop, key.size)
            with contextlib.suppress(BlockingIOError):  # its table is not in memory either
                runs = self._plan(key, version, start, stop, nowait=True)
                if not isinstance(runs, NotHere):
                    return await self._soon.read(runs, lambda: self._take_nowait(runs, extent))
        return COLD

    def _take_nowait(self, runs: list[Run], extent: Extent) -> Bytes | NotHere:
        try:
            return self._take(runs, extent, nowait=True) or COLD
        except BlockingIOError:
            return COLD

    def read_blocking(self, key: ObjectKey, version: Version, extent: Extent) -> Bytes | NotHere:
        """The same for programs without an event loop, however long the disk takes."""
        return self._read(key, version, extent, nowait=False)

    def expect(self, key: ObjectKey) -> bool:
        """Has the disk fetch the object's first bytes, if it has them; see `ports.BlockStore`."""
        return bool(key.size) and self._places.expect((key, 0), min(key.size, EXPECTED_BYTES))

    def expect_read(self, key: ObjectKey, extent: Extent) -> None:
        """Has the disk fetch what of `extent` lies in files that were looked at already; see `ports.BlockStore`."""
        if self._disk.may_hang:
            return
        for part in split_by_segment(extent):
            index, within = divmod(part.start, SEGMENT_BYTES)
            opened = self._places.at_hand((key, index))
            if opened is not None:
                opened.ask(within // BLOCK_BYTES, len(part))

    async def load(self, key: ObjectKey, version: Version, offset: int) -> bool:
        """Copies the segment that holds byte `offset` from its file to memory; see `ports.BlockStore`."""
        return await self._loading.load((key, offset // SEGMENT_BYTES), version)

    def _read(
        self, key: ObjectKey, version: Version, extent: Extent, *, nowait: bool, lend: bool = False
    ) -> Bytes | NotHere:
        start, stop = block_floor(extent.start), block_ceil(extent.stop, key.size)
        if extent.start >= min(extent.stop, key.size):
            return b""
        for _ in range(_READ_ATTEMPTS_MAX):
            runs = self._plan(key, version, start, stop, nowait=nowait)
            if isinstance(runs, NotHere):
                return runs
            if lend and len(runs) == 1 and (lent := runs[0].lent()) is not None:
                self._note_read(runs[0])
                return lent[extent.start - start : extent.stop - start]
            found = self._take(runs, extent, nowait=nowait)
            if found is not None:
                return found
        return ABSENT

    def _take(self, runs: list[Run], extent: Extent, *, nowait: bool) -> Bytes | None:
        """The bytes of `extent`, which the runs cover. As `_fill`."""
        start, stop = runs[0].start, runs[-1].stop
        buffer = bytearray(stop - start)
        if not self._fill(runs, memoryview(buffer), start, nowait=nowait):
            return None
        if extent.start == start and extent.stop >= stop:
            return buffer
        return memoryview(buffer)[extent.start - start : extent.stop - start]

    def _plan(self, key: ObjectKey, version: Version, start: int, stop: int, *, nowait: bool) -> list[Run] | NotHere:
        runs: list[Run] = []
        at = start
        while at < stop:
            index, within = divmod(at, SEGMENT_BYTES)
            end = min(at - within + SEGMENT_BYTES, stop)
            first = within // BLOCK_BYTES
            opened = self._places.at_hand((key, index))
            contents = None if opened is None else opened.contents
            if opened is not None and contents is not None and contents.serves(version, first, end - at):
                runs.append(Run(opened, contents, first, at, end))
            else:
                found = self._compose(key, version, at, end, nowait=nowait)
                if isinstance(found, NotHere):
                    return found
                runs.extend(found)
            at = end
        return runs

    def _compose(self, key: ObjectKey, version: Version, start: int, stop: int, *, nowait: bool) -> list[Run] | NotHere:
        """Runs for [start, stop) of one segment after a fresh look, each block from wherever it is."""
        index, within = divmod(start, SEGMENT_BYTES)
        places = self._places.look_in_memory((key, index))
        if not (places and places[0][1].serves(version, within // BLOCK_BYTES, stop - start)):
            places = self._places.look((key, index), nowait=nowait)
        matching = [place for place in places if place[1].version == version]
        if not matching:
            return FOREIGN if places else ABSENT
        runs: list[Run] = []
        base = start - within
        while start < stop:
            first = (start - base) // BLOCK_BYTES
            having = next((place for place in matching if place[1].entries[first]), None)
            if having is None:
                return ABSENT
            opened, contents = having
            end = start
            while end < stop and contents.entries[(end - base) // BLOCK_BYTES]:
                end = min(end + BLOCK_BYTES, stop)
            runs.append(Run(opened, contents, first, start, end))
            start = end
        return runs

    def _fill(self, runs: list[Run], into: memoryview, start: int, *, nowait: bool) -> bool:
        """Whether all runs were read and verified. If not, what stood in the way was dealt with: look again.

        Raises BlockingIOError with `nowait`, also where there is something to be dealt with.
        """
        for run in runs:
            view = into[run.start - start : run.stop - start]
            try:
                if not nowait:
                    self._ask_disk(run, len(view))
                bad = run.opened.read_blocks(run.contents, run.first, view, nowait=nowait)
                if bad is None:
                    self._note_read(run)
                    continue
                if not nowait:
                    self._places.distrust(run.opened, run.contents, bad)
            except OSError as error:
                if not nowait:
                    self._places.unreadable((run.opened.key, run.opened.index), error)
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "to be looked into in a thread")
            return False
        return True

    def _note_read(self, run: Run) -> None:
        self._places.mark_used(run.opened)
        if run.opened.note_read(run.start, run.stop):
            self._places.note_read_to_end(run.opened)

    def _ask_disk(self, run: Run, byte_count: int) -> None:
        """Has the disk read what is about to be read, and what a sequential reader wants next, also from the next file: by the
        time a reader comes there, its table and its first blocks are in memory."""
        beyond_bytes = run.opened.advise(run.first, byte_count)
        if beyond_bytes and (run.opened.index + 1) * SEGMENT_BYTES < run.opened.key.size:
            self._places.prepare((run.opened.key, run.opened.index + 1), beyond_bytes)

    # --- what there is ------------------------------------------------------------------------------------------------

    def missing(self, key: ObjectKey, version: Version, extent: Extent, *, to_keep: bool = False) -> list[Extent]:
        """The parts of `extent`, whole blocks, that are not present; see `ports.BlockStore`."""
        parts: list[Extent] = []
        if extent.start >= min(extent.stop, key.size):
            return parts
        for part in split_by_segment(Extent(block_floor(extent.start), block_ceil(extent.stop, key.size))):
            for gap in self._gaps(key, version, part, to_keep=to_keep):
                if parts and parts[-1].stop == gap.start:
                    parts[-1] = Extent(parts[-1].start, gap.stop)
                else:
                    parts.append(gap)
        return parts

    def _gaps(self, key: ObjectKey, version: Version, part: Extent, *, to_keep: bool) -> Iterator[Extent]:
        """The missing blocks of `part`, which is whole blocks of one segment."""
        index, within = divmod(part.start, SEGMENT_BYTES)
        first = within // BLOCK_BYTES
        opened = self._places.at_hand((key, index))
        contents = None if opened is None or to_keep else opened.contents
        if contents is not None and contents.serves(version, first, len(part)):
            return
        looked = self._places.look((key, index), nowait=False, to_keep=to_keep)
        tables = [found.entries for _, found in looked if found.version == version]
        for block, at in enumerate(range(part.start, part.stop, BLOCK_BYTES), first):
            if not any(entries[block] for entries in tables):
                yield Extent(at, min(at + BLOCK_BYTES, part.stop))

    def version(self, key: ObjectKey, offset: int) -> Version | None:
        """The version of the segment that holds byte `offset`, as of now; see `ports.BlockStore`."""
        looked = self._places.look((key, offset // SEGMENT_BYTES), nowait=False)
        return looked[0][1].version if looked else None

    def cached_bytes(self, key: ObjectKey) -> int:
        """How many bytes of the object are present, by the tables. May take a second for an object of many segments: the
        event loop should leave it to a thread."""
        count = -(-key.size // SEGMENT_BYTES)
        indexes: Iterable[int] = range(count)
        if count >= _LISTING_SEGMENTS_MIN:
            indexes = (index for index in self._places.listed(key) if index < count)
        return sum(self._cached_in_segment(key, index) for index in indexes)

    def _cached_in_segment(self, key: ObjectKey, index: int) -> int:
        tables = [found.entries for _, found in self._places.look((key, index), nowait=False)]
        length = segment.segment_bytes(key.size, index)
        return sum(
            min(BLOCK_BYTES, length - at)
            for block, at in enumerate(range(0, length, BLOCK_BYTES))
            if any(entries[block] for entries in tables)
        )

    def discard(self, key: ObjectKey, offset: int) -> None:
        """Removes the segment that holds byte `offset`: its bytes are somewhere else by now. May run in a thread."""
        self._places.discard((key, offset // SEGMENT_BYTES))

    # --- where to land ------------------------------------------------------------------------------------------------

    def landing(
        self, key: ObjectKey, extent: Extent, *, ahead: bool, staged: bool = False, to_keep: bool = False
    ) -> AbstractAsyncContextManager[LandingPlace | None]:
        """Where a fetch of `extent` lands, with room taken for it while the block runs; see `ports.BlockStore`."""
        return self._placement.landing(key, extent, ahead=ahead, staged=staged, to_keep=to_keep)

    def note_landed(self, byte_count: int, disk_wait_s: float) -> None:
        """See `ports.BlockStore`."""
        self._placement.pace.waited(byte_count, disk_wait_s)

    def note_passed_by(self, byte_count: int) -> None:  # noqa: ARG002 - the port's signature
        """See `ports.BlockStore`."""
        self._placement.pace.tell_once()

    def landing_failed(self, key: ObjectKey, offset: int, detail: str) -> None:
        """A worker could not land there: this segment, and new ones while the disk is sick, go to memory."""
        self._places.fault((key, offset // SEGMENT_BYTES))
        self._placement.refused(detail)

    def claim(self, key: ObjectKey, extent: Extent) -> bool:
        """Says that we fetch `extent`; False: another process is fetching some of it. See `ports.BlockStore`."""
        try:
            return self._disk.call(self._claims.claim, *self._places.blocks(key, extent))
        except NotAnsweringError:
            return True

    def unclaim(self, key: ObjectKey, extent: Extent) -> None:
        """Takes `claim` back."""
        self._disk.later(self._claims.release, *self._places.blocks(key, extent))
