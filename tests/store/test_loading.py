"""Segments are loaded from their files into memory: whole, verified on each read, bounded, and never mistaken for others."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from support.segment_paths import segment_path
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent
from valohai_fuse.ports import ABSENT, COLD, NotHere, ObjectKey
from valohai_fuse.store import loading
from valohai_fuse.store.calls import DiskCalls
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.opened import OpenSegment
from valohai_fuse.store.segments import SegmentStore

FULL = segment.PAGE_BYTES + SEGMENT_BYTES
KEY = ObjectKey("datum:warm", 4 * SEGMENT_BYTES + 1000)
PERIOD = bytes(range(251)) * (SEGMENT_BYTES // 251 + 2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SegmentStore]:
    """With memory for two segments, its files on a disk."""
    store = SegmentStore(str(tmp_path / "cache"), memory_bytes_max=2 * FULL)
    if store._places._never_waits:
        pytest.skip("pytest's temporary directory is in memory; --basetemp on a disk lets this run")
    yield store
    store.close()


def nth(index: int) -> Extent:
    return Extent(index * SEGMENT_BYTES, min((index + 1) * SEGMENT_BYTES, KEY.size))


def content(extent: Extent) -> bytes:
    shift = extent.start % 251
    return PERIOD[shift : shift + len(extent)]


def land(store: SegmentStore, *extents: Extent, version: str = "v") -> None:
    """In the files, of which nothing stays in the page cache."""
    for extent in extents:
        path = segment_path(store, KEY, extent.start)
        with SegmentWriter(path, KEY, extent.start // SEGMENT_BYTES, version) as writer:
            writer.land(extent.start, content(extent))
        drop_pages(path)


def drop_pages(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def load(store: SegmentStore, *indexes: int, version: str = "v") -> list[bool]:
    async def main() -> list[bool]:
        return [await store.load(KEY, version, index * SEGMENT_BYTES) for index in indexes]

    return trio.run(main)


def lent(store: SegmentStore, extent: Extent) -> bytes | NotHere:
    """What is in memory: a lent read of a file's bytes would copy them, and is cold here."""
    found = store.read_nowait(KEY, "v", extent, lend=True)
    return found if isinstance(found, NotHere) else bytes(found)


def read(store: SegmentStore, extent: Extent) -> bytes | NotHere:
    found = trio.run(store.read, KEY, "v", extent)
    return found if isinstance(found, NotHere) else bytes(found)


def test_what_was_loaded_is_read_from_memory(store: SegmentStore) -> None:
    """And its file has no pages in the page cache but at its ends, where it was looked at."""
    land(store, nth(0), nth(1))
    assert lent(store, nth(1)) is COLD
    assert load(store, 1) == [True]
    assert lent(store, nth(1)) == content(nth(1))
    assert store.statistics().memory_bytes == FULL
    fd = os.open(segment_path(store, KEY, nth(1).start), os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        os.preadv(fd, [bytearray(1)], FULL // 2, os.RWF_NOWAIT)
    os.close(fd)


def test_only_the_blocks_that_are_there_are_loaded(store: SegmentStore) -> None:
    """In as many pieces as there are; what lands meanwhile, in the file, is found there."""
    there = [Extent(BLOCK_BYTES, 2 * BLOCK_BYTES), Extent(50 * BLOCK_BYTES, 90 * BLOCK_BYTES)]
    land(store, *there)
    assert load(store, 0) == [False], "not all of it"
    assert [lent(store, extent) for extent in there] == [content(extent) for extent in there]
    assert read(store, Extent(0, BLOCK_BYTES)) is ABSENT
    missing = [
        Extent(0, BLOCK_BYTES),
        Extent(2 * BLOCK_BYTES, 50 * BLOCK_BYTES),
        Extent(90 * BLOCK_BYTES, SEGMENT_BYTES),
    ]
    assert store.missing(KEY, "v", nth(0)) == missing
    assert store.missing(KEY, "v", nth(0), to_keep=True) == missing
    land(store, *missing)
    assert read(store, nth(0)) == content(nth(0))


def test_what_is_no_use_is_not_loaded_and_takes_no_memory(store: SegmentStore) -> None:
    """Nothing there, another version, a segment that is short, one that the page cache has. What is in memory already is."""
    land(store, nth(0), nth(4))
    land(store, nth(1), version="w")
    assert load(store, 2, 1, 4) == [False, False, False]
    assert load(store, 0, 0) == [True, True]
    assert store.statistics().memory_segments == 1
    land(store, nth(3))
    assert read(store, nth(3)) == content(nth(3)), "through the page cache"
    assert load(store, 3) == [False]
    assert store.statistics().memory_segments == 1


def test_memory_is_bounded_and_used_again(store: SegmentStore) -> None:
    """What has been read to its end goes first; each segment is what it says, in whosoever's memory it lies."""
    land(store, *map(nth, range(4)))
    for index in range(4):
        assert load(store, index) == [True]
        assert lent(store, nth(index)) == content(nth(index))
        assert store.statistics().memory_bytes <= 2 * FULL


@pytest.mark.expect_warnings("failed its check")
def test_rot_on_the_disk_is_found_and_the_file_is_told_once(store: SegmentStore) -> None:
    """The copy does not verify, so the file is asked, and does not either: absent there and here."""
    land(store, nth(0))
    path = segment_path(store, KEY, 0)
    with open(path, "r+b") as file:
        file.seek(segment.DATA_OFFSET + 5 * BLOCK_BYTES + 7)
        file.write(b"rot!")
    drop_pages(path)
    assert load(store, 0) == [True]
    rotten = Extent(5 * BLOCK_BYTES, 6 * BLOCK_BYTES)
    assert lent(store, rotten) is COLD, "to be looked into in a thread"
    assert read(store, rotten) is ABSENT
    assert store.missing(KEY, "v", nth(0)) == [rotten]
    assert not store._places.avoids_file((KEY, 0)), "one block that failed its check is one fault of its file"
    land(store, rotten)
    assert read(store, nth(0)) == content(nth(0))


@pytest.mark.expect_warnings("failed its check")
def test_memory_that_is_spoilt_is_no_fault_of_the_file(store: SegmentStore) -> None:
    land(store, nth(0))
    for _ in range(5):
        assert load(store, 0) == [True]
        opened = store._places.at_hand((KEY, 0))
        assert opened is not None
        assert opened.room is not None
        opened.room[segment.DATA_OFFSET + 3] ^= 1
        assert read(store, nth(0)) == content(nth(0))
        store._places._memory.clear()
        drop_pages(segment_path(store, KEY, 0))
    assert not store._places.avoids_file((KEY, 0))


@pytest.mark.expect_warnings("failed its check")
def test_a_file_that_is_evicted_or_cut_short_while_it_is_loaded(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unlinked file still has its bytes; one that ends early is not loaded."""
    land(store, nth(0), nth(1))
    whole = loading.load_segment

    def unlinked(source: OpenSegment, version: str, into: OpenSegment, *rest: Any) -> int:
        os.unlink(segment_path(store, KEY, 0))
        return whole(source, version, into, *rest)

    def shortened(source: OpenSegment, version: str, into: OpenSegment, *rest: Any) -> int:
        os.truncate(segment_path(store, KEY, SEGMENT_BYTES), FULL // 2)
        return whole(source, version, into, *rest)

    monkeypatch.setattr(loading, "load_segment", unlinked)
    assert load(store, 0) == [True]
    assert lent(store, nth(0)) == content(nth(0))
    monkeypatch.setattr(loading, "load_segment", shortened)
    assert load(store, 1) == [False]
    assert lent(store, nth(1)) is COLD
    assert read(store, nth(1)) is ABSENT


def test_loads_have_turns_in_the_order_in_which_they_are_begun(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all objects: what was begun first is what a reader comes to first."""
    land(store, nth(0), nth(1), nth(2))
    turns: list[int] = []
    whole = loading.load_segment

    def noted(source: OpenSegment, version: str, into: OpenSegment, *rest: Any) -> int:
        turns.append(rest[-1])
        return whole(source, version, into, *rest)

    monkeypatch.setattr(loading, "load_segment", noted)
    assert load(store, 2, 0, 1) == [True] * 3
    assert turns == sorted(set(turns))


def test_a_worker_that_lands_meanwhile_lands_in_the_file(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half is on the disk and is loaded; the other half is fetched at the same time, and both are read."""
    half = Extent(0, SEGMENT_BYTES // 2)
    rest = Extent(half.stop, SEGMENT_BYTES)
    land(store, half)
    encode = segment.pack_entries
    began, go_on = trio.Event(), trio.Event()

    def packed(entries: Sequence[int]) -> bytes:
        if not began.is_set():
            trio.from_thread.run_sync(began.set)
            trio.from_thread.run(go_on.wait)
        return encode(entries)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.load, KEY, "v", 0)
            await began.wait()
            async with store.landing(KEY, rest, ahead=False, staged=True) as place:
                assert place is not None
                assert place.staging_path == ""
                with SegmentWriter(place.segment_path, KEY, 0, "v") as writer:
                    monkeypatch.undo()
                    writer.land(rest.start, content(rest))
                go_on.set()

    monkeypatch.setattr(segment, "pack_entries", packed)
    trio.run(main)
    assert lent(store, nth(0)) == content(nth(0))


def test_a_load_that_is_cancelled_keeps_its_memory_until_the_disk_has_answered(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(store, nth(0), nth(1), nth(2))
    whole = loading.load_segment
    began, answers = trio.Event(), threading.Event()

    def slow(source: OpenSegment, version: str, into: OpenSegment, *rest: Any) -> int:
        trio.from_thread.run_sync(began.set)
        answers.wait(30)
        return whole(source, version, into, *rest)

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.load, KEY, "v", 0)
                await began.wait()
                scope.cancel()
        monkeypatch.setattr(loading, "load_segment", whole)
        assert [await store.load(KEY, "v", index * SEGMENT_BYTES) for index in (1, 2)] == [True, True]
        assert lent(store, nth(1)) is COLD, "the other memory was used again, not the one that is written to"
        answers.set()
        with trio.fail_after(10):
            while lent(store, nth(0)) is COLD:  # noqa: ASYNC110 - an abandoned thread tells nobody
                await trio.sleep(0.01)
        assert lent(store, nth(0)) == content(nth(0))

    monkeypatch.setattr(loading, "load_segment", slow)
    trio.run(main)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_without_direct_reads_is_asked_once(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Any other error only means that this was not loaded: the reader meets it by the usual way."""
    land(store, nth(0))
    tried = []

    def refuses(source: OpenSegment, version: str, into: OpenSegment, *rest: Any) -> int:
        tried.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(loading, "load_segment", refuses)
    assert load(store, 0, 0, 0) == [False] * 3
    assert len(tried) == (1 if number == errno.EINVAL else 3)
    assert store.statistics().memory_segments == 0
    assert read(store, nth(0)) == content(nth(0))


def test_a_disk_that_may_hang_is_not_loaded_from(tmp_path: Path) -> None:
    """Its calls go one after the other through a thread that is waited for; a load would be in nobody's view."""
    store = SegmentStore(str(tmp_path / "cache"), disk=DiskCalls(may_hang=True))
    land(store, nth(0))
    assert load(store, 0) == [False]
    store.close()
