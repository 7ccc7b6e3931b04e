"""An in-memory BlockStore for tests of the engine: same contract as the real one (tests/contracts/test_block_store.py runs on
both), no threads, so it lives under an autojump clock.

Blocks are landed with `land` (by key) or `land_order` (by the path that an order carries). Wishes for trouble: `cold`,
`cold_s`, `lose`, `evict`; counters for what a test wants to be sure of.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES, Extent, block_ceil, block_floor
from valohai_fuse.ports import ABSENT, COLD, FOREIGN, FetchOrder, LandingPlace, NotHere, ObjectKey, Version


@dataclass(slots=True)
class _Segment:
    version: Version
    blocks: dict[int, bytes] = field(default_factory=dict)
    """By block number, counted from the start of the object."""


class FakeBlockStore:
    """`ports.BlockStore` in a dict."""

    def __init__(self) -> None:
        self.cold = False
        """True: `read_nowait` answers COLD for what is present, as if nothing was in the page cache."""
        self.cold_s = 0.0
        """How long `read` takes, on trio's clock."""
        self.loadable = False
        """True: `load` brings what is present to memory, where it is not cold."""
        self.load_s = 0.0
        """How long that takes."""
        self.expected: list[ObjectKey] = []
        self.expected_reads: list[Extent] = []
        self.loads: list[int] = []
        """Offsets asked for."""
        self._loaded: set[tuple[ObjectKey, int]] = set()
        self.looked_for: list[Extent] = []
        """What `missing` was asked about."""
        self.reads = 0
        self.reads_nowait = 0
        self.full = False
        """True: nothing is granted to what nobody waits for."""
        self.refuses_disk = False
        """True: nothing is granted to what is to be kept on the disk."""
        self.landings = 0
        self.staged: list[Extent] = []
        """What was to land in memory, if there is room."""
        """Under way."""
        self.claimed: list[tuple[ObjectKey, Extent]] = []
        self.claimed_by_others: list[tuple[ObjectKey, Extent]] = []
        """What another process says that it fetches."""
        self.landings_failed: list[tuple[ObjectKey, int, str]] = []
        self._segments: dict[tuple[ObjectKey, int], _Segment] = {}
        self._places: dict[str, tuple[ObjectKey, int]] = {}
        self._elsewhere: set[tuple[ObjectKey, int]] = set()

    # --- what a worker does -------------------------------------------------------------------------------------------

    def land(self, key: ObjectKey, offset: int, data: bytes, version: Version = "") -> None:
        """Makes the whole blocks in `data` present; a segment of another version is replaced."""
        stop = offset + len(data)
        if offset % BLOCK_BYTES or not data or (stop % BLOCK_BYTES and stop != key.size) or stop > key.size:
            raise ValueError(f"not whole blocks: [{offset}, {stop}) of {key.size} bytes")
        for at in range(offset, stop, BLOCK_BYTES):
            place = (key, at // SEGMENT_BYTES)
            segment = self._segments.get(place)
            if segment is None or segment.version != version:
                segment = self._segments[place] = _Segment(version)
            segment.blocks[at // BLOCK_BYTES] = bytes(data[at - offset : at - offset + BLOCK_BYTES])

    def land_order(self, order: FetchOrder, offset: int, data: bytes, version: Version) -> None:
        """The same by an order's path, which must have come from this store: what `FakeFetcher` wants as its `land`."""
        key, index = self._places[order.segment_path]
        if not index * SEGMENT_BYTES <= offset < offset + len(data) <= (index + 1) * SEGMENT_BYTES:
            raise ValueError(f"[{offset}, {offset + len(data)}) is not in segment {index}")
        self.land(key, offset, data, version)

    # --- wishes -------------------------------------------------------------------------------------------------------

    def lose(self, key: ObjectKey, extent: Extent) -> None:
        """Every block that overlaps `extent` becomes absent, as after bit rot."""
        for number in range(extent.start // BLOCK_BYTES, -(-extent.stop // BLOCK_BYTES)):
            segment = self._segments.get((key, number * BLOCK_BYTES // SEGMENT_BYTES))
            if segment is not None:
                segment.blocks.pop(number, None)

    def evict(self, key: ObjectKey) -> None:
        """All segments of the object go, as when another daemon needs the room."""
        for place in [place for place in self._segments if place[0] == key]:
            del self._segments[place]

    # --- the port -----------------------------------------------------------------------------------------------------

    def read_nowait(self, key: ObjectKey, version: Version, extent: Extent, *, lend: bool = False) -> bytes | NotHere:
        """See `ports.BlockStore`; lends nothing."""
        self.reads_nowait += 1
        found = self._read(key, version, extent)
        is_loaded = (key, extent.start // SEGMENT_BYTES) in self._loaded
        return COLD if self.cold and not is_loaded and isinstance(found, bytes) and found else found

    async def read(self, key: ObjectKey, version: Version, extent: Extent) -> bytes | NotHere:
        """See `ports.BlockStore`."""
        self.reads += 1
        await trio.sleep(self.cold_s)
        return self._read(key, version, extent)

    def expect(self, key: ObjectKey) -> bool:
        """See `ports.BlockStore`."""
        self.expected.append(key)
        version = self.version(key, 0)
        first = Extent(0, min(key.size, SEGMENT_BYTES))
        return version is not None and not self.missing(key, version, first)

    def expect_read(self, key: ObjectKey, extent: Extent) -> None:
        """See `ports.BlockStore`."""
        assert not self.missing(key, self.version(key, extent.start) or "", extent)
        self.expected_reads.append(extent)

    async def load(self, key: ObjectKey, version: Version, offset: int) -> bool:
        """See `ports.BlockStore`; what was loaded stays so."""
        self.loads.append(offset)
        await trio.sleep(self.load_s)
        place = (key, offset // SEGMENT_BYTES)
        if not self.loadable or place not in self._segments or self._segments[place].version != version:
            return False
        self._loaded.add(place)
        return len(self._segments[place].blocks) == SEGMENT_BLOCKS

    def _read(self, key: ObjectKey, version: Version, extent: Extent) -> bytes | NotHere:
        stop = min(extent.stop, key.size)
        if extent.start >= stop:
            return b""
        parts: list[bytes] = []
        for number in range(extent.start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            segment = self._segments.get((key, number * BLOCK_BYTES // SEGMENT_BYTES))
            if segment is None:
                return ABSENT
            if segment.version != version:
                return FOREIGN
            if number not in segment.blocks:
                return ABSENT
            parts.append(segment.blocks[number])
        base = block_floor(extent.start)
        return b"".join(parts)[extent.start - base : stop - base]

    def missing(self, key: ObjectKey, version: Version, extent: Extent, *, to_keep: bool = False) -> list[Extent]:
        """See `ports.BlockStore`."""
        self.looked_for.append(extent)
        gaps: list[Extent] = []
        if extent.start >= min(extent.stop, key.size):
            return gaps
        stop = block_ceil(extent.stop, key.size)
        for at in range(block_floor(extent.start), stop, BLOCK_BYTES):
            segment = self._segments.get((key, at // SEGMENT_BYTES))
            if segment is not None and segment.version == version and at // BLOCK_BYTES in segment.blocks:
                continue
            if gaps and gaps[-1].stop == at:
                gaps[-1] = Extent(gaps[-1].start, min(at + BLOCK_BYTES, stop))
            else:
                gaps.append(Extent(at, min(at + BLOCK_BYTES, stop)))
        return gaps

    def version(self, key: ObjectKey, offset: int) -> Version | None:
        """See `ports.BlockStore`."""
        segment = self._segments.get((key, offset // SEGMENT_BYTES))
        return None if segment is None else segment.version

    def segment_path(self, key: ObjectKey, offset: int) -> str:
        """A made-up path that `land_order` understands; another one after `landing_failed`."""
        place = (key, offset // SEGMENT_BYTES)
        where = "memory" if place in self._elsewhere else "disk"
        path = f"/fake/{where}/{key.size}/{place[1]:x}/{key.stable_id}"
        self._places[path] = place
        return path

    @contextlib.asynccontextmanager
    async def landing(
        self, key: ObjectKey, extent: Extent, *, ahead: bool, staged: bool = False, to_keep: bool = False
    ) -> AsyncIterator[LandingPlace | None]:
        """See `ports.BlockStore`; there is room unless `full`, and a disk for what is to be kept unless `refuses_disk`."""
        if (self.full and ahead) or (self.refuses_disk and to_keep):
            yield None
            return
        self.landings += 1
        if staged:
            self.staged.append(extent)
        try:
            yield LandingPlace(self.segment_path(key, extent.start))
        finally:
            self.landings -= 1

    def note_landed(self, byte_count: int, disk_wait_s: float) -> None:
        """See `ports.BlockStore`."""

    def note_passed_by(self, byte_count: int) -> None:
        """See `ports.BlockStore`."""

    def claim(self, key: ObjectKey, extent: Extent) -> bool:
        """See `ports.BlockStore`."""
        if any(other == key and claimed.overlaps(extent) for other, claimed in self.claimed_by_others):
            return False
        self.claimed.append((key, extent))
        return True

    def unclaim(self, key: ObjectKey, extent: Extent) -> None:
        """See `ports.BlockStore`."""
        self.claimed.remove((key, extent))

    def landing_failed(self, key: ObjectKey, offset: int, detail: str) -> None:
        """See `ports.BlockStore`."""
        self.landings_failed.append((key, offset, detail))
        self._elsewhere.add((key, offset // SEGMENT_BYTES))

    def cached_bytes(self, key: ObjectKey) -> int:
        """See `ports.BlockStore`."""
        return sum(len(b) for (other, _), s in self._segments.items() if other == key for b in s.blocks.values())
