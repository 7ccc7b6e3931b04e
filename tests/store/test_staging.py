"""Streams land in memory first: read there, bounded, used again, given back; and never a wrong byte meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from valohai_fuse.model import segment
from valohai_fuse.model.eviction import Budget
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent
from valohai_fuse.ports import ABSENT, COLD, LandingPlace, NotHere, ObjectKey
from valohai_fuse.store.calls import DiskCalls
from valohai_fuse.store.landing import SegmentWriter, is_memory_path
from valohai_fuse.store.placement import STAGED_BYTES_MIN
from valohai_fuse.store.places import ABANDONED_S, STAGED_IDLE_S
from valohai_fuse.store.room import Room
from valohai_fuse.store.segments import SegmentStore

FULL = segment.PAGE_BYTES + SEGMENT_BYTES
KEY = ObjectKey("datum:stream", 6 * SEGMENT_BYTES)
HALVES = Extent(0, SEGMENT_BYTES // 2), Extent(SEGMENT_BYTES // 2, SEGMENT_BYTES)
"""Of its first segment."""


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[SegmentStore]:
    """With memory for two segments."""
    store = SegmentStore(str(tmp_path / "cache"), memory_bytes_max=2 * FULL, monotonic=clock)
    yield store
    store.close()


def nth(index: int) -> Extent:
    return Extent(index * SEGMENT_BYTES, (index + 1) * SEGMENT_BYTES)


def content(extent: Extent) -> bytes:
    return bytes([extent.start // SEGMENT_BYTES + 1]) * len(extent)


@asynccontextmanager
async def landed(store: SegmentStore, extent: Extent, version: str = "v") -> AsyncIterator[LandingPlace]:
    """A fetch of `extent` that has landed and whose order is not over yet."""
    async with store.landing(KEY, extent, ahead=False, staged=True) as place:
        assert place is not None
        where = place.staging_path or place.segment_path
        with SegmentWriter(where, KEY, extent.start // SEGMENT_BYTES, version) as writer:
            writer.land(extent.start, content(extent))
        yield place


async def given_up(store: SegmentStore, extent: Extent) -> int:
    """A fetch of `extent` has landed and is cancelled before its order is over; the inode of the memory where."""
    memory = 0
    with trio.CancelScope() as scope:
        async with landed(store, extent) as place:
            memory = os.stat(place.staging_path).st_ino
            scope.cancel()
            await trio.sleep_forever()
    return memory


def read(store: SegmentStore, extent: Extent) -> bytes | NotHere:
    found = store.read_nowait(KEY, "v", extent)
    return found if isinstance(found, NotHere) else bytes(found)


def test_a_stream_is_read_from_memory_and_nothing_is_on_the_disk_yet(store: SegmentStore) -> None:
    """What is only staged is there for a reader, and missing for who wants it kept."""

    async def main() -> None:
        async with landed(store, nth(0)) as place:
            assert is_memory_path(place.staging_path)
            assert not is_memory_path(place.segment_path)
            assert read(store, nth(0)) == content(nth(0))
            assert store.missing(KEY, "v", nth(0)) == []
            assert store.missing(KEY, "v", nth(0), to_keep=True) == [nth(0)]

    trio.run(main)


def test_what_is_fetched_to_be_kept_waits_for_a_slow_disk(store: SegmentStore) -> None:
    """What a reader waits for lands in memory then, which is no place to keep anything."""

    async def main() -> None:
        store.note_landed(len(nth(0)), disk_wait_s=5)
        async with store.landing(KEY, nth(0), ahead=False, to_keep=True) as kept:
            assert kept is not None
            assert not is_memory_path(kept.segment_path)
        async with store.landing(KEY, nth(1), ahead=False) as place:
            assert place is not None
            assert is_memory_path(place.segment_path)
            with SegmentWriter(place.segment_path, KEY, 1, "v") as writer:
                writer.land(nth(1).start, content(nth(1)))
        assert store.missing(KEY, "v", nth(1)) == []
        assert store.missing(KEY, "v", nth(1), to_keep=True) == [nth(1)]

    trio.run(main)


def test_small_pieces_and_what_nobody_reads_land_in_the_file(store: SegmentStore) -> None:
    async def main() -> None:
        small = Extent(0, STAGED_BYTES_MIN - BLOCK_BYTES)
        for extent, staged in ((small, True), (nth(0), False)):
            async with store.landing(KEY, extent, ahead=True, staged=staged) as place:
                assert place is not None
                assert place.staging_path == ""

    trio.run(main)


def test_what_was_read_to_its_end_goes_first(store: SegmentStore) -> None:
    """Not the oldest: that may be what somebody is about to read."""

    async def main() -> None:
        for index in (0, 1):
            async with landed(store, nth(index)):
                pass
        assert read(store, nth(1)) == content(nth(1))
        async with landed(store, nth(2)):
            pass
        assert [read(store, nth(n)) != ABSENT for n in range(3)] == [True, False, True]
        assert store.statistics().memory_bytes == 2 * FULL

    trio.run(main)


def test_memory_that_was_read_is_used_again_although_there_is_room(tmp_path: Path) -> None:
    """But not what stands in for the disk, nor what is short."""
    store = SegmentStore(str(tmp_path / "cache"), memory_bytes_max=5 * FULL)

    async def scenario() -> None:
        for index in range(4):
            async with landed(store, nth(index)):
                pass
            assert read(store, nth(index)) == content(nth(index))
            assert store.statistics().memory_segments == 1
        for index in (4, 5):
            async with landed(store, nth(index)):
                pass
        assert store.statistics().memory_segments == 2
        assert read(store, nth(5)) == content(nth(5))
        assert read(store, nth(4)) == content(nth(4))

    trio.run(scenario)
    store.close()


def test_an_end_that_overtook_the_rest_takes_no_memory_away(store: SegmentStore) -> None:
    """The kernel asks for several pieces at once: what it has not been given yet stays, though it is the newest."""

    async def main() -> None:
        for index in (0, 1):
            async with landed(store, nth(index)):
                pass
        middle = nth(1).start + SEGMENT_BYTES // 2
        rest, end = Extent(nth(1).start, middle), Extent(middle, nth(1).stop)
        assert read(store, end) == content(nth(1))[: len(end)]
        async with landed(store, nth(2)):
            pass
        assert [read(store, nth(n)) != ABSENT for n in (0, 2)] == [False, True]
        assert read(store, rest) == content(nth(1))[: len(rest)]
        async with landed(store, nth(3)):
            pass
        assert [read(store, nth(n)) != ABSENT for n in (1, 2, 3)] == [False, True, True], "now it has been read"

    trio.run(main)


def test_under_a_fetch_no_memory_goes_and_without_memory_the_file_is_landed_in(store: SegmentStore) -> None:
    async def main() -> None:
        async with landed(store, nth(0)), landed(store, nth(1)), landed(store, nth(2)) as third:
            assert third.staging_path == ""
            assert [read(store, nth(n)) for n in range(3)] == [content(nth(n)) for n in range(3)]

    trio.run(main)


def test_memory_that_is_used_again_serves_nothing_of_before(store: SegmentStore) -> None:
    """Neither as what it was nor as what it is now, and a writer of the former segment is turned away."""

    async def main() -> None:
        async with landed(store, nth(0)) as first, landed(store, nth(1)):
            pass
        assert read(store, nth(0)) == content(nth(0))
        opened = store._places.at_hand((KEY, 0))
        assert opened is not None
        memory = os.fstat(opened.fd).st_ino
        async with store.landing(KEY, nth(2), ahead=False, staged=True) as place:
            assert place is not None
            assert os.stat(place.staging_path).st_ino == memory, "this test is about the same memory"
            assert read(store, nth(2)) is ABSENT
            assert read(store, nth(0)) is ABSENT
            with pytest.raises(OSError, match="memory segment is gone"):
                SegmentWriter(place.staging_path, KEY, 0, "v")
        assert first.staging_path

    trio.run(main)


def test_what_was_given_up_may_still_be_written(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled fetch's memory is not used again, and its room not given away, while its worker may be at it."""
    monkeypatch.setattr(time, "monotonic", clock)
    cache = str(tmp_path / "cache")
    room = Room(cache, Budget(bytes_max=1000 * FULL))
    store = SegmentStore(cache, room=room, memory_bytes_max=FULL, monotonic=clock)

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with landed(store, nth(0)) as place:
                assert is_memory_path(place.staging_path)
                scope.cancel()
                await trio.sleep_forever()
        assert room.reserved_bytes() > SEGMENT_BYTES
        async with landed(store, nth(1)) as place:
            assert place.staging_path == "", "the only memory is not free"
        clock.now_s += ABANDONED_S
        async with landed(store, nth(2)) as place:
            assert is_memory_path(place.staging_path)
        assert room.reserved_bytes() == 0
        store.close()

    trio.run(main)


def test_where_a_fetch_was_given_up_nothing_else_lands_in_memory(tmp_path: Path, clock: Clock) -> None:
    """Its worker may not have heard of it for as long as it likes: that part is landed in the file, the rest beside it in
    memory, and the memory is not used again."""
    store = SegmentStore(str(tmp_path / "cache"), memory_bytes_max=FULL, monotonic=clock)
    lower, upper = HALVES

    async def main() -> None:
        memory = await given_up(store, lower)
        clock.now_s += 1000 * ABANDONED_S
        async with store.landing(KEY, lower, ahead=False, staged=True) as place:
            assert place is not None
            assert (place.staging_path, is_memory_path(place.segment_path)) == ("", False)
        async with landed(store, upper) as place:
            assert os.stat(place.staging_path).st_ino == memory
        assert read(store, nth(0)) == content(nth(0)), "what had landed is still there"
        async with landed(store, nth(1)) as place:
            assert os.stat(place.staging_path).st_ino != memory

    trio.run(main)
    store.close()


def test_while_a_segment_is_loaded_nothing_lands_in_its_memory(store: SegmentStore) -> None:
    async def main() -> None:
        into = store._places.begin_loading((KEY, 0))
        assert into is not None
        async with store.landing(KEY, nth(0), ahead=False, staged=True) as place:
            assert place is not None
            assert place.staging_path == ""
        store._places.end_loading(into, loaded=True)
        async with landed(store, nth(0)) as place:
            assert os.stat(place.staging_path).st_ino == os.fstat(into.opened.fd).st_ino

    trio.run(main)


def test_on_a_disk_that_may_hang_other_memory_is_found(tmp_path: Path, clock: Clock) -> None:
    """For there nothing is landed in the file directly; unless something lands in the old memory, which must stay."""
    disk = DiskCalls(may_hang=True)
    store = SegmentStore(str(tmp_path / "cache"), disk=disk, memory_bytes_max=3 * FULL, monotonic=clock)
    lower, upper = HALVES

    async def main() -> None:
        memory = await given_up(store, lower)
        async with landed(store, upper) as place:
            assert os.stat(place.staging_path).st_ino == memory
            async with store.landing(KEY, lower, ahead=False, staged=True) as other:
                assert other is not None
                assert other.staging_path == ""
        async with landed(store, lower) as place:
            assert os.stat(place.staging_path).st_ino != memory
        assert read(store, lower) == content(lower)

    trio.run(main)
    store.close()


def test_what_is_lent_is_not_copied_and_what_is_given_stays(store: SegmentStore) -> None:
    """A reader passes lent bytes on before the memory can be used again; everybody else has his own."""

    async def main() -> None:
        async with landed(store, nth(0)), landed(store, nth(1)):
            pass
        given, lent = (store.read_nowait(KEY, "v", nth(0), lend=lend) for lend in (False, True))
        assert isinstance(lent, memoryview)
        assert lent.readonly
        assert bytes(given) == bytes(lent) == content(nth(0))  # type: ignore[arg-type]
        async with landed(store, nth(2)):
            pass
        assert bytes(lent) == content(nth(2)), "this test is about the same memory"
        assert bytes(given) == content(nth(0))  # type: ignore[arg-type]
        part = Extent(nth(2).start + 17, nth(2).start + 5 * BLOCK_BYTES + 1)
        assert store.read_nowait(KEY, "v", part, lend=True) == content(nth(2))[: len(part)]

    trio.run(main)


def test_what_is_spoilt_in_memory_is_not_lent(store: SegmentStore, caplog: pytest.LogCaptureFixture) -> None:
    """It is looked into in a thread, and is absent then."""

    async def main() -> None:
        async with landed(store, nth(0)) as place:
            memory = os.open(place.staging_path, os.O_WRONLY)
            os.pwrite(memory, b"another", segment.DATA_OFFSET + 3 * BLOCK_BYTES + 17)
            os.close(memory)
        assert store.read_nowait(KEY, "v", nth(0), lend=True) is COLD
        assert await store.read(KEY, "v", nth(0)) is ABSENT
        sound = Extent(0, 3 * BLOCK_BYTES)
        assert store.read_nowait(KEY, "v", sound, lend=True) == content(sound)

    trio.run(main)
    assert "block 3 of cache file" in caplog.text


def test_another_version_in_memory_is_not_served(store: SegmentStore) -> None:
    async def main() -> None:
        async with landed(store, nth(0), version="other"):
            assert isinstance(read(store, nth(0)), NotHere)

    trio.run(main)


def test_memory_is_given_back_when_nobody_streams(store: SegmentStore, clock: Clock) -> None:
    """After a while, by the evictor's pass; not while something lands in it."""

    async def main() -> None:
        async with landed(store, nth(0)):
            pass
        async with landed(store, nth(1)):
            clock.now_s += STAGED_IDLE_S - 1
            store.touch_used()
            assert store.statistics().memory_segments == 2
            clock.now_s += 2
            store.touch_used()
            assert store.statistics().memory_segments == 1
            assert read(store, nth(1)) == content(nth(1))
        store.touch_used()
        assert store.statistics().memory_segments == 0

    trio.run(main)
