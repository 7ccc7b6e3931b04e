"""What is known of a read before it comes: the disk is asked for it, and it is found sooner."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio

from support.segment_rig import ALL, KEY, SIZE, Clock, land
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent, block_floor, split_by_segment
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store.calls import DiskCalls
from valohai_fuse.store.places import EXPECTED_S
from valohai_fuse.store.segments import EXPECTED_BYTES, SegmentStore


def test_what_an_open_has_found_the_first_look_behind_it_need_not_look_for(store: SegmentStore, clock: Clock) -> None:
    """Once, and for a moment only: whoever looks later finds what has taken the file's place."""
    for age_s, first_version in ((0.0, "v"), (EXPECTED_S, "w")):
        path = land(store, version="v")
        assert store.version(KEY, 0) == "v"
        store.expect(KEY)
        os.unlink(path)
        land(store, version="w")
        clock.now_s += age_s
        assert store.version(KEY, 0) == first_version
        assert store.version(KEY, 0) == "w"
        os.unlink(path)


def test_the_disk_is_asked_for_what_an_open_expects(
    store: SegmentStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table and first bytes, for they may have gone from memory since they were read, but not within a moment; what is not there is
    no trouble."""
    land(store)
    first = min(KEY.size, EXPECTED_BYTES)
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *how: asked.append(how))
    store.expect(ObjectKey("never seen", 1))
    store.expect(ObjectKey("empty", 0))
    assert asked == []
    for age_s, times in ((0.0, 1), (EXPECTED_S / 2, 1), (EXPECTED_S, 2)):
        clock.now_s += age_s
        store.expect(KEY)
        assert asked == [(0, segment.DATA_OFFSET + first, os.POSIX_FADV_WILLNEED)] * times


@pytest.mark.parametrize("size", [1, SIZE, SEGMENT_BYTES, SEGMENT_BYTES + 1])
def test_what_a_file_occupies_tells_whether_it_is_whole(store: SegmentStore, clock: Clock, size: int) -> None:
    """Not so long as any block is absent; whether a later segment is there is not asked."""
    key = ObjectKey("datum:x", size)
    whole = Extent(0, min(size, SEGMENT_BYTES))
    assert not store.expect(key)
    last = block_floor(whole.stop - 1)
    for part in (Extent(last, whole.stop), Extent(0, last)) if last else ():
        path = land(store, part, key=key)
        assert not store.expect(key)
        os.unlink(path)
        clock.now_s += EXPECTED_S
    land(store, whole, key=key)
    assert store.expect(key)


def test_the_disk_is_asked_for_what_a_jumping_reader_comes_to(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These blocks of several segments and no others; nothing is looked for that was not looked at before."""
    key = ObjectKey("datum:y", 2 * SEGMENT_BYTES)
    wanted = Extent(SEGMENT_BYTES - 2 * BLOCK_BYTES, SEGMENT_BYTES + 3 * BLOCK_BYTES)
    for part in split_by_segment(wanted):
        land(store, part, key=key)
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *how: asked.append(how))
    store.expect_read(key, wanted)
    assert asked == []
    assert store.missing(key, "v", wanted) == []
    store.expect_read(key, wanted)
    last_two = segment.DATA_OFFSET + SEGMENT_BYTES - 2 * BLOCK_BYTES
    assert asked == [
        (last_two, 2 * BLOCK_BYTES, os.POSIX_FADV_WILLNEED),
        (segment.DATA_OFFSET, 3 * BLOCK_BYTES, os.POSIX_FADV_WILLNEED),
    ]


def test_a_disk_that_may_hang_is_asked_for_what_an_open_expects_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: even the asking may hang."""
    store = SegmentStore(str(tmp_path / "own"), disk=DiskCalls(may_hang=True))
    land(store)
    asked: list[threading.Thread] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: asked.append(threading.current_thread()))

    async def expect() -> bool:
        return store.expect(KEY)

    assert trio.run(expect)
    assert len(asked) == 1
    assert asked[0] is not threading.current_thread()
    store.close()


@pytest.mark.parametrize("may_hang", [False, True])
def test_a_disk_that_may_hang_is_asked_for_nothing_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, may_hang: bool
) -> None:
    """The event loop asks, and would hang with it."""
    store = SegmentStore(str(tmp_path / "own"), disk=DiskCalls(may_hang=may_hang))
    land(store)
    assert store.missing(KEY, "v", ALL) == []
    asked: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fadvise", lambda fd, *_: asked.append(fd))
        store.expect_read(KEY, ALL)
    assert bool(asked) is not may_hang
    store.close()
