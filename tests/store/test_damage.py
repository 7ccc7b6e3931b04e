"""Cache files that rot, are cut or are written to by others: never a wrong byte, and no more is lost than what was harmed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.segment_paths import segment_path
from support.segment_rig import (
    ALL,
    BLOCKS,
    KEY,
    SIZE,
    Clock,
    assert_never_wrong,
    block_extent,
    flip,
    land,
    overwrite,
    ramp,
    read,
    regrow,
)
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.ports import ABSENT
from valohai_fuse.store.calls import DiskCalls
from valohai_fuse.store.opened import Contents, OpenSegment
from valohai_fuse.store.places import FAULT_MEMORY_S
from valohai_fuse.store.segments import SegmentStore

pytestmark = pytest.mark.expect_warnings(
    "valohai_fuse.store: (block|the cache|a cache file)", "failed its check", "in memory"
)

HEADER_FIELDS = {
    "magic": 0,
    "format": 8,
    "block bytes": 12,
    "segment index": 16,
    "object size": 24,
    "identity length": 32,
    "version length": 34,
    "padding": 37,
    "checksum": 40,
    "identity": 48,
    "version": 55,
    "rest": 3000,
}
DAMAGE_TO_ALL: dict[str, Callable[[str], None]] = {
    **{f"flip in {name}": partial(flip, offset=at) for name, at in HEADER_FIELDS.items()},
    **{f"cut to {size}": partial(os.truncate, length=size) for size in (0, 1, 47, 3071, 3072, 4095)},
    "header zeroed": lambda path: overwrite(path, 0, bytes(3072)),
    "page zeroed": lambda path: overwrite(path, 0, bytes(4096)),
    "table zeroed": lambda path: overwrite(path, 3072, bytes(1024)),
    "all zeroed": lambda path: overwrite(path, 0, bytes(4096 + SIZE)),
    "another object's header": lambda path: overwrite(path, 0, segment.encode_header("datum:y", SIZE, 0, "v")),
}
DAMAGE_TO_ONE: dict[str, tuple[Callable[[str], None], list[int]]] = {
    **{f"flip in entry {n}": (partial(flip, offset=3072 + 8 * n + 3), [n]) for n in (0, 2, 5)},
    "entry set to 1": (lambda path: overwrite(path, 3072 + 8, b"\1" + bytes(7)), [1]),
    "entry all ones": (lambda path: overwrite(path, 3072 + 16, b"\xff" * 8), [2]),
    "entry of a neighbour": (
        lambda path: overwrite(path, 3072 + 8, Path(path).read_bytes()[3072 + 16 : 3072 + 24]),
        [1],
    ),
    "first byte of data": (lambda path: flip(path, 4096), [0]),
    "last byte of data": (lambda path: flip(path, 4096 + SIZE - 1), [5]),
    "a byte inside": (lambda path: flip(path, 4096 + 3 * BLOCK_BYTES + 777), [3]),
    "a hole": (lambda path: overwrite(path, 4096 + BLOCK_BYTES + 4096, bytes(4096)), [1]),
    "two blocks swapped": (
        lambda path: overwrite(
            path,
            4096,
            Path(path).read_bytes()[4096 + BLOCK_BYTES : 4096 + 2 * BLOCK_BYTES]
            + Path(path).read_bytes()[4096 : 4096 + BLOCK_BYTES],
        ),
        [0, 1],
    ),
    "cut to the page": (lambda path: os.truncate(path, 4096), [0, 1, 2, 3, 4, 5]),
    "cut by a byte": (lambda path: os.truncate(path, 4096 + SIZE - 1), [5]),
    "cut inside a block": (lambda path: os.truncate(path, 4096 + 2 * BLOCK_BYTES + 1), [2, 3, 4, 5]),
    "cut between blocks": (lambda path: os.truncate(path, 4096 + 2 * BLOCK_BYTES), [2, 3, 4, 5]),
    "cut and grown again": (lambda path: regrow(path, 4096 + BLOCK_BYTES), [1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("warm", [True, False], ids=["while open", "before it is opened"])
@pytest.mark.parametrize("damage", list(DAMAGE_TO_ALL))
def test_damage_to_header_or_table_loses_the_segment_and_heals(cache: str, damage: str, warm: bool) -> None:
    """A bad header is noticed by whoever opens the file; whoever has it open may go on with blocks that still verify."""
    store = SegmentStore(cache)
    path = land(store)
    if warm:
        assert read(store) == ramp(ALL)
    DAMAGE_TO_ALL[damage](path)
    absent = assert_never_wrong(store)
    fresh = SegmentStore(cache)
    assert assert_never_wrong(fresh) == list(range(BLOCKS))
    assert warm or absent == list(range(BLOCKS))
    for each in (store, fresh):
        land(each)
        assert read(each) == ramp(ALL)
        each.close()
    again = SegmentStore(cache)
    assert again.missing(KEY, "v", ALL) == [], "the file itself was mended"
    again.close()


@pytest.mark.parametrize("warm", [True, False], ids=["while open", "before it is opened"])
@pytest.mark.parametrize("damage", list(DAMAGE_TO_ONE))
def test_damage_to_a_block_loses_that_block_and_heals(store: SegmentStore, damage: str, warm: bool) -> None:
    """Also when it happens after the block was read once: nothing is believed because it was right before."""
    path = land(store)
    if warm:
        assert read(store) == ramp(ALL)
    harm, expected = DAMAGE_TO_ONE[damage]
    harm(path)
    found = [read(store, block_extent(block)) for block in range(BLOCKS)]
    for block in range(BLOCKS):
        assert found[block] in {ABSENT, ramp(block_extent(block))}
    if not (warm and "entry" in damage):  # who remembers the entry sees that the data is still right
        assert {block for block in range(BLOCKS) if found[block] is ABSENT} >= set(expected)
        assert store.missing(KEY, "v", ALL) != [], "absent to who plans the next fetch, too"
    for gap in store.missing(KEY, "v", ALL):
        land(store, gap)
    assert read(store) == ramp(ALL)


def test_a_flipped_bit_costs_one_block_only(store: SegmentStore, caplog: pytest.LogCaptureFixture) -> None:
    """The neighbours stay, the log says it once, and the file is mended on disk."""
    path = land(store)
    flip(path, 4096 + 2 * BLOCK_BYTES)
    assert read(store) is ABSENT
    assert store.missing(KEY, "v", ALL) == [block_extent(2)]
    assert land(store, block_extent(2)) == path
    assert read(store) == ramp(ALL)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "block 2 of cache file" in caplog.text
    assert "datum:x" not in caplog.text
    assert store.statistics().blocks_distrusted == 1


def test_a_block_beyond_the_end_of_a_file_that_others_write_to_is_on_its_way(cache: str) -> None:
    """Another host has landed it, and how long the file is by now is not known here yet: the entry stays, for all hosts."""
    store = SegmentStore(cache, disk=DiskCalls(may_hang=True))
    path = land(store)
    whole = Path(path).read_bytes()
    os.truncate(path, 4096 + 3 * BLOCK_BYTES)
    assert read(store) is ABSENT
    assert Path(path).read_bytes() == whole[: 4096 + 3 * BLOCK_BYTES]
    Path(path).write_bytes(whole)
    assert read(store) == ramp(ALL)
    assert store.statistics().blocks_distrusted == 0
    flip(path, 4096 + 2 * BLOCK_BYTES)
    assert read(store) is ABSENT
    assert store.statistics().blocks_distrusted == 1, "as anywhere else"
    store.close()


def test_a_block_that_came_meanwhile_is_not_distrusted(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others write: it was not there when it was read, and is when that is looked into."""
    store = SegmentStore(cache, disk=DiskCalls(may_hang=True))
    path = land(store)
    whole = Path(path).read_bytes()
    flip(path, 4096)
    read_blocks = OpenSegment.read_blocks

    def read_and_mend(
        opened: OpenSegment, contents: Contents, first: int, into: memoryview, *, nowait: bool
    ) -> int | None:
        bad = read_blocks(opened, contents, first, into, nowait=nowait)
        if bad is not None:
            Path(path).write_bytes(whole)
        return bad

    monkeypatch.setattr(OpenSegment, "read_blocks", read_and_mend)
    assert read(store) == ramp(ALL)
    assert store.statistics().blocks_distrusted == 0
    store.close()


def test_a_block_that_rots_again_and_again_moves_to_memory(store: SegmentStore, clock: Clock) -> None:
    """A sector that never gives back what it was given must not send a reader round in circles."""
    rounds = 0
    while True:
        path = land(store)
        if not path.startswith("/proc/"):
            flip(path, 4096)
        if read(store) == ramp(ALL):
            break
        rounds += 1
        assert rounds < 4
    assert rounds == 2
    assert store.statistics().memory_segments == 1
    clock.now_s += FAULT_MEMORY_S
    assert not segment_path(store, KEY, 0).startswith("/proc/"), "tried again later"


@settings(max_examples=60, deadline=None)
@given(
    harm=st.lists(
        st.one_of(
            st.tuples(st.just("flip"), st.integers(0, 4096 + SIZE - 1), st.just(0)),
            st.tuples(st.just("zero"), st.integers(0, 4096 + SIZE - 1), st.integers(1, 3 * BLOCK_BYTES)),
            st.tuples(st.just("cut"), st.integers(0, 4096 + SIZE), st.just(0)),
        ),
        min_size=1,
        max_size=4,
    ),
    warm=st.booleans(),
)
def test_any_damage_anywhere_is_never_a_wrong_byte(harm: list[tuple[str, int, int]], warm: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = SegmentStore(folder + "/cache")
        path = land(store)
        if warm:
            assert read(store) == ramp(ALL)
        for kind, at, length in harm:
            if kind == "flip" and at < os.path.getsize(path):
                flip(path, at)
            elif kind == "zero":
                overwrite(path, at, bytes(min(length, 4096 + SIZE - at)))
            elif kind == "cut":
                os.truncate(path, at)
        for _ in range(3):  # each round one bad block may be found; from the second on the segment lives in memory
            assert_never_wrong(store)
            for gap in store.missing(KEY, "v", ALL):
                land(store, gap)
        assert read(store) == ramp(ALL)
        store.close()
