"""The cache directory stays within its budget, and nobody who reads or lands there is hurt: `store.evictor`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from support.segment_paths import segment_path
from valohai_fuse.model.eviction import Budget, Segment
from valohai_fuse.model.extents import BLOCK_BYTES, Extent
from valohai_fuse.ports import ABSENT, NotHere, ObjectKey
from valohai_fuse.store import evictor
from valohai_fuse.store.evictor import Evictor, Pass
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.room import Room
from valohai_fuse.store.segments import SegmentStore

SIZE = 4 * BLOCK_BYTES
ALL = Extent(0, SIZE)
KEYS = [ObjectKey(f"datum:{n}", SIZE) for n in range(10)]
DATA = (bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]
ON_DISK = 4096 + SIZE


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def store(cache: str) -> Iterator[SegmentStore]:
    """Ten objects, the first used longest ago."""
    store = SegmentStore(cache)
    for age, key in enumerate(reversed(KEYS)):
        land(store, key)
        os.utime(segment_path(store, key, 0), (10**9 - age * 100, 10**9 - age * 100))
    yield store
    store.close()


def land(store: SegmentStore, key: ObjectKey) -> None:
    with SegmentWriter(segment_path(store, key, 0), key, 0, "v") as writer:
        writer.land(0, DATA)


def kept(cache: str) -> list[int]:
    """Which of the ten are still there, as a fresh store sees it."""
    fresh = SegmentStore(cache)
    found = [n for n, key in enumerate(KEYS) if not fresh.missing(key, "v", ALL)]
    fresh.close()
    return found


def test_a_scan_names_our_files_only(store: SegmentStore, cache: str) -> None:
    home = Path(cache) / "v1"
    (home / "notes.txt").write_bytes(b"")
    (home / "zz").mkdir()
    (home / "zz" / ("0" * 40 + ".0")).write_bytes(b"not in a directory of ours")
    found = list(evictor.scan(cache))
    assert len(found) == 10
    assert {segment.bytes_on_disk for segment in found} == {ON_DISK}


def test_the_least_recently_used_go_first(store: SegmentStore, cache: str) -> None:
    budget = Budget(bytes_max=6 * ON_DISK + ON_DISK // 2)
    done = Evictor(cache, budget).run_pass()
    assert done == Pass(True, 10, 10 * ON_DISK, 4, 4 * ON_DISK)
    assert kept(cache) == [4, 5, 6, 7, 8, 9]
    assert Evictor(cache, budget).run_pass() == Pass(True, 6, 6 * ON_DISK)


def test_what_is_read_counts_as_used(store: SegmentStore, cache: str) -> None:
    """By whichever process, for all of them: reading touches the file, a pass at a time."""
    for n in (0, 2):
        assert not isinstance(trio.run(store.read, KEYS[n], "v", ALL), NotHere)
    Evictor(cache, Budget(bytes_max=3 * ON_DISK), touch_used=store.touch_used).run_pass()
    assert kept(cache) == [0, 2]


def test_reading_again_counts_again(store: SegmentStore) -> None:
    path = segment_path(store, KEYS[0], 0)
    for _ in range(3):
        os.utime(path, (1000, 1000))
        assert not isinstance(trio.run(store.read, KEYS[0], "v", ALL), NotHere)
        store.touch_used()
        assert os.stat(path).st_mtime > 1000
        os.utime(path, (1000, 1000))
        store.touch_used()
        assert os.stat(path).st_mtime == 1000, "not read since"


def test_nothing_goes_while_all_is_within_bounds(store: SegmentStore, cache: str) -> None:
    assert Evictor(cache, Budget(bytes_max=10 * ON_DISK)).run_pass().evicted_segments == 0
    assert Evictor(cache, Budget(free_min_bytes=1)).run_pass() == Pass(), "not even a scan"
    assert Evictor(cache, Budget()).run_pass() == Pass()
    assert kept(cache) == list(range(10))


def test_room_on_the_file_system_is_kept(store: SegmentStore, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--cache-min-free`: others may be the ones who fill the disk."""
    real = os.statvfs(cache)
    fields = list(real)
    fields[0] = fields[1] = 1
    fields[2], fields[4] = 1000 * ON_DISK, 97 * ON_DISK
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    done = Evictor(cache, Budget(free_min_share=0.1)).run_pass()
    assert done.evicted_segments == 4, "three are lacking, and one percent of a hundred more"
    assert kept(cache) == [4, 5, 6, 7, 8, 9]


def test_the_room_of_an_open_segment_is_free_at_once(store: SegmentStore, cache: str) -> None:
    """A reader that has it open finds it absent, not wrong; what it reads next is landed anew."""
    assert trio.run(store.read, KEYS[0], "v", ALL) == DATA
    fd = os.open(segment_path(store, KEYS[0], 0), os.O_RDONLY)
    Evictor(cache, Budget(bytes_max=1)).run_pass()
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)
    assert trio.run(store.read, KEYS[0], "v", ALL) is ABSENT
    land(store, KEYS[0])
    assert trio.run(store.read, KEYS[0], "v", ALL) == DATA
    assert store.statistics().blocks_distrusted == 0


def test_a_writer_under_way_is_not_hurt(store: SegmentStore, cache: str) -> None:
    """It goes on into a file that nobody sees any more; that segment is fetched again."""
    path = segment_path(store, KEYS[0], 0)
    with SegmentWriter(path, KEYS[0], 0, "v") as writer:
        Evictor(cache, Budget(bytes_max=1)).run_pass()
        writer.land(0, DATA)
    assert trio.run(store.read, KEYS[0], "v", ALL) is ABSENT
    land(store, KEYS[0])
    assert trio.run(store.read, KEYS[0], "v", ALL) == DATA


def test_what_was_used_since_the_scan_stays(store: SegmentStore, cache: str) -> None:
    (oldest,) = [segment for segment in evictor.scan(cache) if segment.used_at_ns == (10**9 - 900) * 10**9]
    os.utime(segment_path(store, KEYS[0], 0))
    assert not evictor.evict(cache, oldest)
    assert not evictor.evict(cache, Segment(0, "00/nothing", 1))
    assert kept(cache) == list(range(10))


def test_one_evictor_at_a_time(store: SegmentStore, cache: str) -> None:
    """Two that see the same excess would throw away twice as much."""
    fd = os.open(os.path.join(cache, "v1"), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert Evictor(cache, Budget(bytes_max=1)).run_pass() == Pass()
    os.close(fd)
    assert Evictor(cache, Budget(bytes_max=1)).run_pass().evicted_segments == 10


def test_no_locks_on_this_file_system(store: SegmentStore, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert Evictor(cache, Budget(bytes_max=1)).run_pass().evicted_segments == 10


def test_a_directory_that_is_gone_is_no_excess(tmp_path: Path) -> None:
    assert Evictor(str(tmp_path / "none"), Budget(bytes_max=1)).run_pass() == Pass()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each scan of a directory."""
    found: list[str] = []
    real = evictor.scan

    def noted(cache_dir: str) -> Iterator[Segment]:
        found.append(cache_dir)
        return real(cache_dir)

    monkeypatch.setattr(evictor, "scan", noted)
    return found


def test_the_first_pass_looks_once_where_the_cache_was_kept_near_its_bound(
    store: SegmentStore, cache: str, looks: list[str]
) -> None:
    budget = Budget(bytes_max=975 * ON_DISK // 100)
    room = Room(cache, budget)
    assert Evictor(cache, budget, room=room).run_pass().evicted_segments == 2, "an eighth of the bound is slack"
    assert len(looks) == 1
    room.close()


def test_a_pass_that_knows_what_it_wants_looks_once(store: SegmentStore, cache: str, looks: list[str]) -> None:
    """A bound that was lowered takes a second look; what landed since is known beforehand."""
    budget = Budget(bytes_max=8 * ON_DISK)
    room = Room(cache, budget)
    watched = Evictor(cache, budget, room=room)
    assert watched.run_pass().evicted_segments == 3, "an eighth of the bound is slack"
    assert len(looks) == 2
    assert room.reserve(ON_DISK)
    land(store, ObjectKey("datum:new", SIZE))
    room.release(ON_DISK)
    assert watched.run_pass().evicted_segments == 1
    assert len(looks) == 3
    assert kept(cache) == [4, 5, 6, 7, 8, 9]
    room.close()


def test_it_runs_until_cancelled(store: SegmentStore, cache: str) -> None:
    """One pass after the other, in threads."""

    async def main() -> None:
        token, second_pass, passes = trio.lowlevel.current_trio_token(), trio.Event(), [0]

        def touch_used() -> None:
            passes[0] += 1
            if passes[0] == 2:
                token.run_sync_soon(second_pass.set)

        watched = Evictor(cache, Budget(bytes_max=1), touch_used=touch_used, interval_s=0.001)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.run)
            with trio.fail_after(30):
                await second_pass.wait()
            assert kept(cache) == []
            nursery.cancel_scope.cancel()

    trio.run(main)
