"""What the `cache` commands do to a directory: `store.upkeep` and `store.export`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.segment_paths import segment_path
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent, split_by_segment
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store import upkeep
from valohai_fuse.store.export import export
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.segments import SegmentStore
from valohai_fuse.store.upkeep import Holding

SIZE = SEGMENT_BYTES + 3 * BLOCK_BYTES + 777
KEYS = [ObjectKey(f"datum:{n}", SIZE) for n in range(3)]
PERIOD = bytes(range(251))
DATA = (PERIOD * (SIZE // 251 + 1))[:SIZE]
ON_DISK = SIZE // 4096 * 4096 + 3 * 4096
"""Two headers and the last page's rest."""


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def store(cache: str) -> Iterator[SegmentStore]:
    """Three objects of two segments, the first used longest ago."""
    store = SegmentStore(cache)
    for age, key in enumerate(reversed(KEYS)):
        land(store, key)
        for offset in (0, SEGMENT_BYTES):
            os.utime(segment_path(store, key, offset), (10**9 - age * 100, 10**9 - age * 100))
    yield store
    store.close()


def land(store: SegmentStore, key: ObjectKey, version: str = "v") -> None:
    for part in split_by_segment(Extent(0, SIZE)):
        with SegmentWriter(segment_path(store, key, part.start), key, part.start // SEGMENT_BYTES, version) as writer:
            writer.land(part.start, DATA[part.start : part.stop])


def cached(cache: str) -> list[int]:
    """Bytes that each of the three has, as a fresh store sees it."""
    fresh = SegmentStore(cache)
    found = [fresh.cached_bytes(key) for key in KEYS]
    fresh.close()
    return found


def test_the_survey_sees_what_is_there(store: SegmentStore, cache: str) -> None:
    held = list(upkeep.survey(cache))
    assert sum(one.content_bytes for one in held) == 3 * SIZE
    assert sum(one.blocks for one in held) == 3 * (128 + 4)
    assert sum(one.file.bytes_on_disk for one in held) == 3 * ON_DISK
    assert {one.header.stable_id for one in held if one.header} == {b"datum:0", b"datum:1", b"datum:2"}


@pytest.mark.parametrize("alone_max", [0, 10**9])
def test_a_summary_is_the_survey_summed_up(
    store: SegmentStore, cache: str, monkeypatch: pytest.MonkeyPatch, alone_max: int
) -> None:
    """By one process as by several; of single objects only those that were asked for. Small objects are not even opened."""
    for size in (1, 20_000, BLOCK_BYTES):
        small = ObjectKey("datum:small", size)
        with SegmentWriter(segment_path(store, small, 0), small, 0, "v") as writer:
            writer.land(0, DATA[:size])
    monkeypatch.setattr(upkeep, "_ALONE_MAX", alone_max)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    held = list(upkeep.survey(cache))
    wanted = next(one for one in held if one.file.length > 8 * BLOCK_BYTES).digest_hex
    found = upkeep.summarize(cache, {wanted, "0" * 40})
    assert (found.segments, found.objects) == (len(held), len({one.digest_hex for one in held}))
    assert found.total.blocks == sum(one.blocks for one in held)
    assert found.total.content_bytes == sum(one.content_bytes for one in held)
    assert found.total.bytes_on_disk == sum(one.file.bytes_on_disk for one in held)
    assert (found.used_first_ns, found.used_last_ns) == (
        min(one.file.used_at_ns for one in held),
        max(one.file.used_at_ns for one in held),
    )
    assert found.of == {wanted: Holding(132, SIZE, ON_DISK)}


@pytest.mark.parametrize("missing", [True, False])
def test_nothing_is_summed_up_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, missing: bool) -> None:
    """A cache that nobody has used yet, or nobody has made."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert upkeep.summarize(str(tmp_path / "none" if missing else tmp_path)) == upkeep.Summary()


def test_looking_leaves_no_descriptor_behind(store: SegmentStore, cache: str) -> None:
    before = os.listdir("/proc/self/fd")
    looking = upkeep.survey(cache)
    next(looking)
    looking.close()  # type: ignore[attr-defined]  # a generator
    assert os.listdir("/proc/self/fd") == before


def test_a_sound_cache_verifies(store: SegmentStore, cache: str) -> None:
    steps: list[int] = []
    done = upkeep.verify(cache, lambda done: steps.append(done.segments))
    assert done == upkeep.Verified(segments=6, blocks=3 * 132, content_bytes=3 * SIZE)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_verify_takes_away_exactly_what_is_bad(store: SegmentStore, cache: str) -> None:
    """A flipped bit costs its block, a truncated file what was cut off, a ruined header or a wrong name the file."""
    with open(segment_path(store, KEYS[0], 0), "r+b") as file:
        file.seek(4096 + 5 * BLOCK_BYTES + 100)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.truncate(segment_path(store, KEYS[1], 0), 4096 + 120 * BLOCK_BYTES)
    with open(segment_path(store, KEYS[2], SEGMENT_BYTES), "r+b") as file:
        file.seek(30)
        file.write(b"rot")
    os.rename(segment_path(store, KEYS[0], SEGMENT_BYTES), segment_path(store, KEYS[2], SEGMENT_BYTES) + "1")
    for found in Path(cache).rglob("*.*"):
        os.utime(found, (10**9, 10**9))
    done = upkeep.verify(cache)
    assert (done.bad_blocks, done.bad_segments) == (1 + 8, 2)
    assert cached(cache) == [SEGMENT_BYTES - BLOCK_BYTES, SIZE - 8 * BLOCK_BYTES, SEGMENT_BYTES]
    again = upkeep.verify(cache)
    assert (again.bad_blocks, again.bad_segments) == (0, 0)


def test_a_file_in_the_making_is_left_alone(store: SegmentStore, cache: str) -> None:
    path = Path(segment_path(store, ObjectKey("datum:new", 5), 0))
    path.write_bytes(b"half a head")
    assert upkeep.verify(cache).bad_segments == 0
    assert path.exists()


def test_prune_takes_the_least_recently_used(store: SegmentStore, cache: str) -> None:
    removed = upkeep.prune(cache, to_bytes=2 * ON_DISK)
    assert removed == upkeep.Removed(2, ON_DISK)
    assert cached(cache) == [0, SIZE, SIZE]
    assert upkeep.prune(cache, to_bytes=2 * ON_DISK) == upkeep.Removed(0, 0)
    assert upkeep.prune(cache, to_bytes=0).segments == 4


def test_prune_by_age(store: SegmentStore, cache: str) -> None:
    os.utime(segment_path(store, KEYS[1], 0))
    assert upkeep.prune(cache, older_than_s=3600).segments == 5
    assert cached(cache) == [0, SEGMENT_BYTES, 0]


def test_clear_leaves_nothing_of_ours(store: SegmentStore, cache: str) -> None:
    other = Path(cache, "v2", "00", "0" * 40 + ".0")
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another format")
    assert upkeep.clear(cache) == upkeep.Removed(6, 3 * ON_DISK)
    assert cached(cache) == [0, 0, 0]
    assert other.read_bytes() == b"another format"


def test_a_cached_object_becomes_a_plain_file(store: SegmentStore, tmp_path: Path) -> None:
    target = tmp_path / "plain.bin"
    assert export(store, KEYS[0], str(target))
    assert target.read_bytes() == DATA
    assert export(store, ObjectKey("datum:empty", 0), str(tmp_path / "empty"))
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.expect_warnings("failed its check")
@pytest.mark.parametrize("trouble", ["nothing", "hole", "rot", "versions"])
def test_what_is_not_whole_is_not_exported(store: SegmentStore, tmp_path: Path, trouble: str) -> None:
    """Not one byte of it, and nothing half-done is left."""
    path = segment_path(store, KEYS[0], SEGMENT_BYTES)
    if trouble == "nothing":
        os.unlink(segment_path(store, KEYS[0], 0))
    elif trouble == "hole":
        os.truncate(path, 4096 + BLOCK_BYTES)
    elif trouble == "rot":
        with open(path, "r+b") as file:
            file.seek(5000)
            file.write(b"rot")
    else:
        with SegmentWriter(path, KEYS[0], 1, "other") as writer:
            writer.land(SEGMENT_BYTES, DATA[SEGMENT_BYTES:])
    (tmp_path / "to").mkdir()
    assert not export(store, KEYS[0], str(tmp_path / "to" / "plain.bin"))
    assert not list((tmp_path / "to").iterdir())
