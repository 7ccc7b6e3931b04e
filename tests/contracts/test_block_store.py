"""The contract of `ports.BlockStore`, on the real store and on the fake that the engine's tests use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import trio

from support.fake_store import FakeBlockStore
from support.segment_paths import segment_path
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent, split_by_segment
from valohai_fuse.ports import ABSENT, COLD, FOREIGN, BlockStore, FetchOrder, Lease, NotHere, ObjectKey, Version
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.segments import SegmentStore

pytestmark = pytest.mark.expect_warnings("the cache directory takes no writes")

PERIOD = bytes(range(251))
SIZE = 2 * SEGMENT_BYTES + 3 * BLOCK_BYTES + 777
KEY = ObjectKey("datum:one", SIZE)


class Rig(Protocol):
    """A store, and what a worker does to it."""

    store: BlockStore

    def land(self, key: ObjectKey, offset: int, data: bytes, version: Version) -> None:
        """Makes the blocks present that `data` holds, over any number of segments."""
        ...

    def path(self, key: ObjectKey, offset: int) -> str:
        """Where the segment that holds byte `offset` would land now."""
        ...


class RealRig:
    def __init__(self, cache_dir: Path) -> None:
        self.real = SegmentStore(str(cache_dir))
        self.store: BlockStore = self.real

    def land(self, key: ObjectKey, offset: int, data: bytes, version: Version) -> None:
        for part in split_by_segment(Extent(offset, offset + len(data))):
            with SegmentWriter(self.path(key, part.start), key, part.start // SEGMENT_BYTES, version) as writer:
                writer.land(part.start, data[part.start - offset : part.stop - offset])

    def path(self, key: ObjectKey, offset: int) -> str:
        return segment_path(self.real, key, offset)


class MemoryRig(RealRig):
    """The real store with a disk that takes nothing."""

    def __init__(self, cache_dir: Path) -> None:
        super().__init__(cache_dir)
        self.real._placement._health.takes_writes = lambda: False  # type: ignore[method-assign] # sick for good, without a clock


class FakeRig:
    def __init__(self) -> None:
        self.fake = FakeBlockStore()
        self.store: BlockStore = self.fake

    def land(self, key: ObjectKey, offset: int, data: bytes, version: Version) -> None:
        for part in split_by_segment(Extent(offset, offset + len(data))):
            order = FetchOrder(key, part, Lease("https://store/x"), None, self.path(key, part.start))
            self.fake.land_order(order, part.start, data[part.start - offset : part.stop - offset], version)

    def path(self, key: ObjectKey, offset: int) -> str:
        return self.fake.segment_path(key, offset)


@pytest.fixture(params=["disk", "memory", "fake"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param == "fake":
        yield FakeRig()
        return
    real = RealRig(tmp_path / "cache") if request.param == "disk" else MemoryRig(tmp_path / "cache")
    yield real
    real.real.close()


def ramp(start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the test object: a ramp modulo 251, so that a shift shows."""
    first = start % 251
    return (PERIOD * ((stop - start) // 251 + 2))[first : first + stop - start]


def read(store: BlockStore, key: ObjectKey, version: Version, extent: Extent) -> bytes | NotHere:
    """By `read_nowait`, lent and given, and where that is cold by `read`; they must not differ otherwise."""
    lent = store.read_nowait(key, version, extent, lend=True)
    now = store.read_nowait(key, version, extent)
    assert lent == now
    later = trio.run(store.read, key, version, extent)
    assert later is not COLD
    if now is not COLD:
        assert now == later
    return later if isinstance(later, NotHere) else bytes(later)


def test_an_empty_store_has_nothing(rig: Rig) -> None:
    store = rig.store
    assert read(store, KEY, "v", Extent(0, 10)) is ABSENT
    assert store.missing(KEY, "v", Extent(5, 10)) == [Extent(0, BLOCK_BYTES)]
    assert store.version(KEY, 0) is None
    assert store.cached_bytes(KEY) == 0


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, 1),
        (0, BLOCK_BYTES),
        (BLOCK_BYTES - 1, BLOCK_BYTES + 1),
        (SEGMENT_BYTES - 3, SEGMENT_BYTES + 3),
        (SEGMENT_BYTES - BLOCK_BYTES, SEGMENT_BYTES + BLOCK_BYTES),
        (0, SIZE),
        (1, SIZE - 1),
        (SIZE - 1, SIZE),
        (2 * SEGMENT_BYTES + 3 * BLOCK_BYTES, SIZE),
    ],
)
def test_what_landed_is_read_back_exactly(rig: Rig, start: int, stop: int) -> None:
    """Any alignment, over the borders of blocks and segments, the short last block included."""
    rig.land(KEY, 0, ramp(0, SIZE), "v")
    assert read(rig.store, KEY, "v", Extent(start, stop)) == ramp(start, stop)


def test_a_read_beyond_the_end_gives_what_there_is(rig: Rig) -> None:
    rig.land(KEY, 0, ramp(0, SIZE), "v")
    assert read(rig.store, KEY, "v", Extent(SIZE - 5, SIZE + 100)) == ramp(SIZE - 5, SIZE)
    assert read(rig.store, KEY, "v", Extent(SIZE, SIZE + 100)) == b""
    assert read(rig.store, KEY, "v", Extent(7, 7)) == b""


def test_one_missing_block_makes_the_extent_absent(rig: Rig) -> None:
    rig.land(KEY, 0, ramp(0, BLOCK_BYTES), "v")
    rig.land(KEY, 2 * BLOCK_BYTES, ramp(2 * BLOCK_BYTES, 3 * BLOCK_BYTES), "v")
    assert read(rig.store, KEY, "v", Extent(0, BLOCK_BYTES)) == ramp(0, BLOCK_BYTES)
    assert read(rig.store, KEY, "v", Extent(0, BLOCK_BYTES + 1)) is ABSENT
    assert read(rig.store, KEY, "v", Extent(2 * BLOCK_BYTES + 9, 3 * BLOCK_BYTES)) == ramp(
        2 * BLOCK_BYTES + 9, 3 * BLOCK_BYTES
    )


def test_what_lands_after_a_read_is_seen_by_the_next(rig: Rig) -> None:
    """A reader that was woken by a landing finds the bytes, whatever it had remembered."""
    for block in range(4):
        start, stop = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
        assert read(rig.store, KEY, "v", Extent(start, stop)) is ABSENT
        rig.land(KEY, start, ramp(start, stop), "v")
        assert read(rig.store, KEY, "v", Extent(0, stop)) == ramp(0, stop)


def test_missing_is_merged_ascending_and_block_aligned(rig: Rig) -> None:
    block = BLOCK_BYTES
    rig.land(KEY, 2 * block, ramp(2 * block, 4 * block), "v")
    rig.land(KEY, SEGMENT_BYTES, ramp(SEGMENT_BYTES, SEGMENT_BYTES + block), "v")
    assert rig.store.missing(KEY, "v", Extent(block + 5, 5 * block - 7)) == [
        Extent(block, 2 * block),
        Extent(4 * block, 5 * block),
    ]
    assert rig.store.missing(KEY, "v", Extent(0, SIZE)) == [
        Extent(0, 2 * block),
        Extent(4 * block, SEGMENT_BYTES),
        Extent(SEGMENT_BYTES + block, SIZE),
    ]
    assert rig.store.missing(KEY, "v", Extent(2 * block, 4 * block)) == []
    assert rig.store.missing(KEY, "v", Extent(SIZE, SIZE + 5)) == []
    assert rig.store.missing(KEY, "v", Extent(3, 3)) == []


def test_another_version_is_foreign_never_data(rig: Rig) -> None:
    rig.land(KEY, 0, ramp(0, BLOCK_BYTES), "v1")
    assert rig.store.version(KEY, 0) == "v1"
    assert read(rig.store, KEY, "v2", Extent(0, 10)) is FOREIGN
    assert rig.store.missing(KEY, "v2", Extent(0, 10)) == [Extent(0, BLOCK_BYTES)]


def test_a_landing_of_another_version_replaces_the_segment(rig: Rig) -> None:
    rig.land(KEY, 0, ramp(0, 2 * BLOCK_BYTES), "v1")
    assert read(rig.store, KEY, "v1", Extent(0, 10)) == ramp(0, 10)
    other = bytes(reversed(ramp(0, BLOCK_BYTES)))
    rig.land(KEY, 0, other, "v2")
    assert rig.store.version(KEY, 0) == "v2"
    assert read(rig.store, KEY, "v2", Extent(0, BLOCK_BYTES)) == other
    assert read(rig.store, KEY, "v2", Extent(0, 2 * BLOCK_BYTES)) is ABSENT


def test_versions_are_per_segment(rig: Rig) -> None:
    rig.land(KEY, 0, ramp(0, BLOCK_BYTES), "v1")
    rig.land(KEY, SEGMENT_BYTES, ramp(0, BLOCK_BYTES), "v2")
    assert [rig.store.version(KEY, at) for at in (5, SEGMENT_BYTES + 5, 2 * SEGMENT_BYTES)] == ["v1", "v2", None]


@pytest.mark.parametrize("version", ["", '"abc"', 'W/"ä-1"', "x" * 1024])
def test_versions_come_back_as_they_went_in(rig: Rig, version: Version) -> None:
    """A store that sends no ETag is as good as any."""
    rig.land(KEY, 0, ramp(0, BLOCK_BYTES), version)
    assert rig.store.version(KEY, 0) == version
    assert read(rig.store, KEY, version, Extent(0, 9)) == ramp(0, 9)


@pytest.mark.parametrize("stable_id", ["x", "https://store/ä b%20/\ud800", "u" * 5000, "", "a\0b"])
def test_objects_are_told_apart_by_identity_and_size(rig: Rig, stable_id: str) -> None:
    key = ObjectKey(stable_id, 1000)
    rig.land(key, 0, ramp(0, 1000), "v")
    assert read(rig.store, key, "v", Extent(0, 1000)) == ramp(0, 1000)
    assert read(rig.store, ObjectKey(stable_id, 1001), "v", Extent(0, 1000)) is ABSENT
    assert read(rig.store, ObjectKey(stable_id + "y", 1000), "v", Extent(0, 1000)) is ABSENT


def test_cached_bytes_counts_blocks_and_the_short_end(rig: Rig) -> None:
    rig.land(KEY, BLOCK_BYTES, ramp(BLOCK_BYTES, 3 * BLOCK_BYTES), "v")
    end = 2 * SEGMENT_BYTES + 3 * BLOCK_BYTES
    rig.land(KEY, end, ramp(end, SIZE), "v")
    assert rig.store.cached_bytes(KEY) == 2 * BLOCK_BYTES + 777


def test_cached_bytes_of_an_object_of_many_segments(rig: Rig) -> None:
    key = ObjectKey("huge", 1000 * SEGMENT_BYTES)
    for index in (0, 17, 999):
        rig.land(key, index * SEGMENT_BYTES, ramp(0, BLOCK_BYTES), "v")
    assert rig.store.cached_bytes(key) == 3 * BLOCK_BYTES


def test_after_a_failed_landing_the_segment_lives_elsewhere_and_loses_nothing(rig: Rig) -> None:
    rig.land(KEY, 0, ramp(0, BLOCK_BYTES), "v")
    before = rig.path(KEY, 0)
    rig.store.landing_failed(KEY, 0, "No space left on device")
    after = rig.path(KEY, 0)
    rig.land(KEY, 0, ramp(0, 2 * BLOCK_BYTES), "v")
    assert read(rig.store, KEY, "v", Extent(0, 2 * BLOCK_BYTES)) == ramp(0, 2 * BLOCK_BYTES)
    assert rig.store.missing(KEY, "v", Extent(0, 2 * BLOCK_BYTES)) == []
    assert after != before or before.startswith("/proc/")


def test_a_load_changes_nothing_but_where_the_bytes_are(rig: Rig) -> None:
    """Of what is there, of what is not, and of another version; whether it says that it was of use or not."""
    rig.land(KEY, 0, ramp(0, SEGMENT_BYTES + BLOCK_BYTES), "v")

    async def load_all() -> None:
        for version in ("v", "w"):
            for offset in (0, SEGMENT_BYTES, SIZE - 1):
                await rig.store.load(KEY, version, offset)

    trio.run(load_all)
    there = Extent(0, SEGMENT_BYTES + BLOCK_BYTES)
    assert read(rig.store, KEY, "v", there) == ramp(there.start, there.stop)
    assert rig.store.missing(KEY, "v", Extent(0, SIZE)) == [Extent(there.stop, SIZE)]
    assert read(rig.store, KEY, "v", Extent(SIZE - 5, SIZE)) is ABSENT
    assert read(rig.store, KEY, "w", Extent(0, 5)) is FOREIGN
    assert rig.store.version(KEY, 0) == rig.store.version(KEY, SEGMENT_BYTES) == "v"
    assert rig.store.cached_bytes(KEY) == len(there)
