"""The block cache: reads verified blocks out of segment files, says what is missing, and says where to land it.

Reading first tries what is known of the segments it touches; only where that does not suffice it looks at the files again.
What goes wrong with the disk is absence for the reader, never an error:
- a block that does not verify loses its entry and is fetched again (`store.places`);
- a disk that refuses writes gets no more for a while, new segments go to memory, what the disk holds is still read
  (`store.health`);
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
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager

import trio

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent, block_ceil, block_floor, split_by_segment
from valohai_fuse.ports import ABSENT, COLD, FOREIGN, LandingPlace, NotHere, ObjectKey, Version
from valohai_fuse.store import directory
from valohai_fuse.store.calls import DiskCalls, NotAnsweringError
from valohai_fuse.store.claims import Claims
from valohai_fuse.store.health import DiskHealth, DiskPace, RateLimitedLog, StoreStatistics
from valohai_fuse.store.loading import Loading
from valohai_fuse.store.opened import Run
from valohai_fuse.store.places import ABANDONED_S, Place, Places
from valohai_fuse.store.room import Room
from valohai_fuse.store.soon import SOON_BYTES_MAX, Bytes, Soon

MEMORY_BYTES_MAX = 128 * 1024 * 1024
STAGED_BYTES_MIN = 1024 * 1024
"""From this on a piece goes through memory: a stream's. A smaller one would waste a segment's memory."""
DESCRIPTORS_MAX = 1024
READING_THREADS = 8
PATIENCE_S = 10.0
SERVED_PATIENCE_S = 3.0
"""The same where a server may be gone, or slow for so long that fetching again is no worse."""
ROOM_PATIENCE_S = 2.0
"""How long a fetch that somebody waits for waits for room on the disk before it lands in memory."""
_ROOM_PATIENCE_AHEAD_S = 0.5
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
        self._cache_dir = cache_dir
        self._home = os.path.join(cache_dir, segment.FORMAT_DIRECTORY)
        self._room = room
        self._disk = disk or DiskCalls(may_hang=False)
        self._claims = Claims(cache_dir)
        self._patience_s = patience_s or (SERVED_PATIENCE_S if self._disk.may_hang else PATIENCE_S)
        self._limiter = trio.CapacityLimiter(READING_THREADS)
        self._monotonic = monotonic
        self._soon = Soon(possible=not self._disk.may_hang, monotonic=monotonic)
        self._warnings = RateLimitedLog(monotonic)
        self._health = DiskHealth(monotonic)
        self._pace = DiskPace(monotonic)
        self._prepared = False
        self._fan_out_made: set[str] = set()
        try:
            self._prepare()
        except OSError as error:
            self._health.failed(_reason(error))
        in_memory = directory.lies_in_memory(self._home)
        self._places = Places(
            self._home,
            disk=self._disk,
            descriptors_max=descriptors_max,
            memory_bytes_max=memory_bytes_max,
            never_waits=in_memory,
            monotonic=monotonic,
            warnings=self._warnings,
        )
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
            self._health.well and not self._disk.stuck,
            self._health.failures + self._places.files_unreadable,
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

    async def _read_soon(self, key: ObjectKey, version: Version, extent: Extent) -> Bytes | NotHere:
        """The same without a thread, where that is quicker; COLD where it is not."""
        if self._soon.is_quick and len(extent) <= SOON_BYTES_MAX:
            start, stop = block_floor(extent.start), block_ceil(extent.stop, key.size)
            with contextlib.suppress(BlockingIOError):  # its table is not in memory either
                runs = self._plan(key, version, start, stop, nowait=True)
                if not isinstance(runs, NotHere):
                    return await self._soon.read(runs, lambda: self.read_nowait(key, version, extent))
        return COLD

    def read_blocking(self, key: ObjectKey, version: Version, extent: Extent) -> Bytes | NotHere:
        """The same for programs without an event loop, however long the disk takes."""
        return self._read(key, version, extent, nowait=False)

    def expect(self, key: ObjectKey) -> None:
        """Has the disk fetch the object's first bytes, if it has them; see `ports.BlockStore`."""
        if key.size:
            self._places.expect((key, 0), min(key.size, EXPECTED_BYTES))

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
            buffer = bytearray(stop - start)
            if self._fill(runs, memoryview(buffer), start, nowait=nowait):
                if extent.start == start and extent.stop >= stop:
                    return buffer
                return memoryview(buffer)[extent.start - start : extent.stop - start]
        return ABSENT

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

    def segment_path(self, key: ObjectKey, offset: int) -> str:
        """Where a worker lands the segment that holds byte `offset`: a file, or memory while the disk takes nothing."""
        place = (key, offset // SEGMENT_BYTES)
        path = self._file_path(place)
        if path is not None:
            return path
        with self._standing_in(place, Extent(offset, offset + 1)) as path:
            return path

    def _file_path(self, place: Place) -> str | None:
        """The segment's file, if the disk may be asked to take it."""
        path = self._places.path(place)
        if self._disk.stuck:
            self._disk_refused("it does not answer")
            return None
        if self._places.avoids_file(place) or not self._health.takes_writes():
            return None
        try:
            self._prepare()
            self._make_fan_out(os.path.dirname(path))
        except (OSError, ConfigurationError) as error:
            self._disk_refused(_reason(error))
            return None
        return path

    def _is_stuck(self) -> bool:
        """Asks the disk for a sign of life."""
        with contextlib.suppress(OSError):
            self._disk.call(os.lstat, self._home)
        return self._disk.stuck

    @contextlib.contextmanager
    def _standing_in(self, place: Place, extent: Extent) -> Iterator[str]:
        """Memory for what the disk does not take; the file all the same, should there be no memory."""
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(self._places.in_memory(place, extent, stands_in=True))
            except OSError as error:
                self._warnings.warn("memory", f"no segments in memory ({_reason(error)}); trying the disk all the same")
                path = None
            yield path or self._places.path(place)

    @contextlib.contextmanager
    def _staging(self, place: Place, extent: Extent, *, staged: bool) -> Iterator[str]:
        """Memory for a large piece that somebody is about to read; "" where there is no use or no room for it.

        Where the disk may hang it is used for everything: a worker's thread hangs then, and not the worker.
        """
        with contextlib.ExitStack() as stack:
            path = None
            if (staged and len(extent) >= STAGED_BYTES_MIN) or self._disk.may_hang:
                with contextlib.suppress(OSError):
                    in_memory = self._places.in_memory(place, extent, stands_in=False, may_replace=self._disk.may_hang)
                    path = stack.enter_context(in_memory)
            yield path or ""

    @contextlib.asynccontextmanager
    async def landing(
        self, key: ObjectKey, extent: Extent, *, ahead: bool, staged: bool = False, to_keep: bool = False
    ) -> AsyncIterator[LandingPlace | None]:
        """Where a fetch of `extent` lands, with room taken for it while the block runs; see `ports.BlockStore`.

        Staged is what is large enough; small pieces go through the page cache, which writes them out when it pleases.
        """
        place = (key, extent.start // SEGMENT_BYTES)
        path = self._file_path(place)
        with self._staging(place, extent, staged=staged) if path else contextlib.nullcontext("") as staging:
            if path is None or not (staging or to_keep or self._pace.affordable()):
                with contextlib.nullcontext() if to_keep else self._standing_in(place, extent) as memory:
                    yield None if memory is None else LandingPlace(memory)
                return
            charged_s = 0.0 if staging or to_keep else self._pace.begin(len(extent))
            try:
                async with self._taken(len(extent), ahead=ahead, staged=bool(staging)) as granted:
                    if granted:
                        yield LandingPlace(path, staging)
                    elif ahead or to_keep:
                        yield None
                    else:
                        with self._standing_in(place, extent) as memory:
                            yield LandingPlace(memory)
            finally:
                self._pace.end(charged_s)

    def _taken(self, byte_count: int, *, ahead: bool, staged: bool) -> AbstractAsyncContextManager[bool]:
        """Room on the disk for `byte_count` bytes of one segment while the block runs, and whether there was any. What was
        `staged` and then given up may still be on its way to the disk when the block is over."""
        if self._room is None:
            return contextlib.nullcontext(enter_result=True)
        return self._room.taken(
            segment.bytes_on_disk_max(byte_count),
            patience_s=_ROOM_PATIENCE_AHEAD_S if ahead else ROOM_PATIENCE_S,
            given_up_after_s=ABANDONED_S if staged else 0.0,
        )

    def note_landed(self, byte_count: int, disk_wait_s: float) -> None:
        """See `ports.BlockStore`."""
        self._pace.waited(byte_count, disk_wait_s)

    def note_passed_by(self, byte_count: int) -> None:  # noqa: ARG002 - the port's signature
        """See `ports.BlockStore`."""
        self._pace.tell_once()

    def claim(self, key: ObjectKey, extent: Extent) -> bool:
        """Says that we fetch `extent`; False: another process is fetching some of it. See `ports.BlockStore`."""
        try:
            return self._disk.call(self._claims.claim, *self._places.blocks(key, extent))
        except NotAnsweringError:
            return True

    def unclaim(self, key: ObjectKey, extent: Extent) -> None:
        """Takes `claim` back."""
        self._disk.later(self._claims.release, *self._places.blocks(key, extent))

    def landing_failed(self, key: ObjectKey, offset: int, detail: str) -> None:
        """A worker could not land there: this segment, and new ones while the disk is sick, go to memory."""
        self._places.fault((key, offset // SEGMENT_BYTES))
        self._disk_refused(detail)

    def _disk_refused(self, detail: str) -> None:
        self._health.failed(detail)
        self._prepared = False  # the directory may have been deleted under us: made again when the disk is tried again
        self._fan_out_made.clear()
        self._disk.later(
            self._claims.close
        )  # on a file that may be gone; without them, at worst something is fetched twice
        self._places.forget_files()  # who deleted files to make room gets it only when nobody has them open

    def _prepare(self) -> None:
        if not self._prepared:
            self._disk.call(self._prepare_directory)
            self._prepared = True

    def _prepare_directory(self) -> None:
        directory.prepare(self._cache_dir)
        if not os.access(self._home, os.W_OK | os.X_OK):
            raise OSError(errno.EROFS, "not writable")

    def _make_fan_out(self, path: str) -> None:
        if path not in self._fan_out_made:
            with contextlib.suppress(FileExistsError):
                self._disk.call(os.mkdir, path, 0o700)
            self._fan_out_made.add(path)


def _reason(error: OSError | ConfigurationError) -> str:
    if isinstance(error, NotAnsweringError):
        return "it does not answer"
    return error.message if isinstance(error, ConfigurationError) else error.strerror or type(error).__name__
