"""The block cache on a directory: never a wrong byte, whatever became of its files; trouble with the disk is absence."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.segment_paths import segment_path
from support.segment_rig import ALL, KEY, SIZE, Clock, block_extent, flip, land, ramp, read
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES, Extent
from valohai_fuse.ports import ABSENT, COLD, FOREIGN, ObjectKey
from valohai_fuse.store import health
from valohai_fuse.store.opened import AHEAD_BYTES
from valohai_fuse.store.segments import SegmentStore

pytestmark = pytest.mark.expect_warnings(
    "valohai_fuse.store: (block|the cache|a cache file)", "failed its check", "in memory"
)


# --- landing and reading in any order ----------------------------------------------------------------------------------

BIG = SEGMENT_BYTES + 5 * BLOCK_BYTES + 123
BIG_KEY = ObjectKey("datum:big", BIG)
BIG_BLOCKS = segment.blocks_in(BIG)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_landings_by_several_writers_in_any_order(data: st.DataObject) -> None:
    """The store is a set of blocks: exactly what was landed is read, whoever landed it, in whatever order."""
    with tempfile.TemporaryDirectory() as folder:
        stores = [SegmentStore(folder + "/cache", descriptors_max=count) for count in (1, 50)]
        landed: set[int] = set()
        near_the_border = st.one_of(
            st.integers(SEGMENT_BLOCKS - 3, BIG_BLOCKS - 1), st.integers(0, BIG_BLOCKS - 1), st.integers(0, 4)
        )
        for _ in range(data.draw(st.integers(1, 12))):
            store = stores[data.draw(st.integers(0, 1))]
            first = data.draw(near_the_border)
            stop = min(first + data.draw(st.integers(1, 4)), BIG_BLOCKS)
            if data.draw(st.booleans()):
                for block in range(first, stop):
                    land(store, block_extent(block, BIG), key=BIG_KEY)
                    landed.add(block)
            else:
                start = first * BLOCK_BYTES + data.draw(st.integers(0, 99))
                extent = Extent(start, max(start, min(stop * BLOCK_BYTES - data.draw(st.integers(0, 99)), BIG)))
                found = read(store, extent, key=BIG_KEY)
                wanted = set(range(first, stop))
                assert found == (ramp(extent) if wanted <= landed else ABSENT)
                gaps = store.missing(BIG_KEY, "v", extent)
                assert {at // BLOCK_BYTES for gap in gaps for at in range(gap.start, gap.stop, BLOCK_BYTES)} == (
                    wanted - landed
                )
        for store in stores:
            store.close()


# --- others at work in the same directory -------------------------------------------------------------------------------


def test_evicted_under_an_open_reader(store: SegmentStore) -> None:
    """An unlinked segment is absent to who looks anew; who holds it open may still read right bytes."""
    path = land(store, block_extent(0))
    assert read(store, block_extent(0)) == ramp(block_extent(0))
    os.unlink(path)
    assert read(store, block_extent(0)) in {ABSENT, ramp(block_extent(0))}
    assert read(store, block_extent(1)) is ABSENT
    assert read(store, block_extent(0)) is ABSENT, "looked anew"
    land(store, block_extent(1))
    assert read(store, block_extent(1)) == ramp(block_extent(1))


def test_evicted_and_landed_anew_by_another_daemon(store: SegmentStore, cache: str) -> None:
    other = SegmentStore(cache)
    path = land(store, block_extent(0))
    assert read(store, block_extent(0)) == ramp(block_extent(0))
    os.unlink(path)
    land(other, Extent(BLOCK_BYTES, SIZE))
    assert read(store, block_extent(3)) == ramp(block_extent(3))
    assert store.missing(KEY, "v", ALL) == [block_extent(0)]
    other.close()


def test_truncated_to_give_its_room_back_at_once(store: SegmentStore) -> None:
    """An evictor may cut a file that it unlinked: who has it open reads nothing wrong and looks anew."""
    path = land(store)
    assert read(store) == ramp(ALL)
    fd = os.open(path, os.O_RDWR)
    os.unlink(path)
    os.ftruncate(fd, 0)
    os.close(fd)
    assert not isinstance(store.read_nowait(KEY, "v", ALL), bytes | bytearray | memoryview)
    assert read(store) is ABSENT
    assert store.statistics().blocks_distrusted == 0, "nothing was wrong with it"
    land(store)
    assert read(store) == ramp(ALL)


def test_replaced_by_another_version_while_open(store: SegmentStore, cache: str) -> None:
    """Who has the old version open goes on reading it; who asks for the new one gets the new one."""
    land(store, version="v1")
    assert read(store, version="v1") == ramp(ALL)
    other = SegmentStore(cache)
    land(other, block_extent(0), version="v2")
    assert read(store, block_extent(0), version="v2") == ramp(block_extent(0))
    assert read(store, version="v1") is FOREIGN
    assert store.version(KEY, 0) == "v2"
    other.close()


def test_other_formats_are_left_alone(cache: str) -> None:
    """A cache of an older or newer version of this program lies beside this one's."""
    newer = Path(cache) / "v2" / "00"
    newer.mkdir(parents=True, mode=0o700)
    os.chmod(cache, 0o700)
    (newer / "thing").write_bytes(b"theirs")
    store = SegmentStore(cache)
    land(store)
    assert read(store) == ramp(ALL)
    assert (newer / "thing").read_bytes() == b"theirs"
    store.close()


# --- descriptors, memory and threads -----------------------------------------------------------------------------------


def test_descriptors_are_bounded_and_given_back(cache: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = SegmentStore(cache, descriptors_max=3)
    keys = [ObjectKey(f"datum:{n}", 10) for n in range(20)]
    for key in keys:
        land(store, Extent(0, 10), key=key)
    for key in keys + keys:
        assert read(store, Extent(0, 10), key=key) == ramp(Extent(0, 10))
    assert store.statistics().open_segments == 3
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_out_of_descriptors_is_not_the_disks_fault(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    land(store)
    real = os.open
    refused: list[str] = []

    def no_descriptor(path: str, flags: int, mode: int = 0o777) -> int:
        if not refused:
            refused.append(path)
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", no_descriptor)
    assert read(store) == ramp(ALL)
    assert refused


def test_the_disk_reads_ahead_of_a_sequential_reader(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is asked for once, before it is read, also those of the next segment; a reader that jumps gets no more than
    what it wants."""
    key = ObjectKey("datum:long", 2 * SEGMENT_BYTES + 5)
    opened_index: dict[int, int] = {}
    asked: dict[int, list[tuple[int, int]]] = {}

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        index = opened_index.setdefault(fd, int(os.readlink(f"/proc/self/fd/{fd}")[-1], 16))
        asked.setdefault(index, []).append((offset, offset + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    store = SegmentStore(cache)
    for start in range(0, key.size, SEGMENT_BYTES):
        land(store, Extent(start, min(start + SEGMENT_BYTES, key.size)), key=key)
    step = 4 * BLOCK_BYTES
    for start in range(0, 2 * SEGMENT_BYTES, step):
        wanted = Extent(start, start + step)
        assert store.read_blocking(key, "v", wanted) == ramp(wanted)
        index, within = divmod(start, SEGMENT_BYTES)
        assert max(stop for _, stop in asked[index]) >= segment.DATA_OFFSET + within + step
        if within >= SEGMENT_BYTES - AHEAD_BYTES // 2:
            assert index + 1 in asked
    for index in (0, 1):
        starts = sorted(asked[index])
        assert all(before[1] <= after[0] for before, after in pairwise(starts))
    asked.clear()
    jump = Extent(20 * BLOCK_BYTES, 21 * BLOCK_BYTES)
    assert store.read_blocking(key, "v", jump) == ramp(jump)
    assert asked == {0: [(segment.DATA_OFFSET + jump.start, segment.DATA_OFFSET + jump.stop)]}
    store.close()


def test_what_is_not_in_the_page_cache_is_cold(store: SegmentStore) -> None:
    """`read_nowait` never waits for the disk; where the file system cannot say, it does not try."""
    path = land(store)
    assert read(store) == ramp(ALL)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    now = store.read_nowait(KEY, "v", ALL)
    if now is not COLD:
        pytest.skip("this file system does not drop its pages")
    assert read(store) == ramp(ALL)
    assert store.read_nowait(KEY, "v", ALL) == ramp(ALL)


def test_a_file_system_that_cannot_say_is_read_in_threads(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    land(store)
    real = os.preadv

    def no_nowait(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", no_nowait)
    assert store.read_nowait(KEY, "v", ALL) is COLD
    assert read(store) == ramp(ALL)
    assert store.read_nowait(KEY, "v", ALL) is COLD


def test_a_disk_that_hangs_is_not_waited_for(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the store's patience the segment is absent, and its next landing goes to memory."""
    store = SegmentStore(cache, patience_s=0.05)
    land(store)
    real, released = os.preadv, os.eventfd(0)

    def hangs(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError(errno.EAGAIN, "cold")
        os.eventfd_read(released)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", hangs)
    assert store.read_nowait(KEY, "v", ALL) is COLD
    assert read(store) is ABSENT
    monkeypatch.undo()
    os.eventfd_write(released, 1000)
    assert segment_path(store, KEY, 0).startswith("/proc/")
    land(store)
    assert read(store) == ramp(ALL)
    store.close()
    os.close(released)


def test_an_unreadable_sector_is_absence(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EIO: one warning, and the segment lives in memory until the disk gets another chance."""
    path = land(store)
    inode = os.stat(path).st_ino
    real = os.preadv

    def bad_sector(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if os.fstat(fd).st_ino == inode and offset >= 4096:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", bad_sector)
    assert store.read_nowait(KEY, "v", ALL) is COLD
    assert read(store) is ABSENT
    assert store.missing(KEY, "v", ALL) == [ALL]
    assert land(store).startswith("/proc/")
    assert read(store) == ramp(ALL)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Input/output error" in caplog.text


def test_memory_is_bounded(cache: str) -> None:
    """The least recently used segment goes first; there is always room for one."""
    room = 2 * (segment.PAGE_BYTES + SEGMENT_BYTES)
    for bytes_max, expected in ((room, [False, True, True]), (0, [False, False, True])):
        store = SegmentStore(cache, memory_bytes_max=bytes_max)
        keys = [ObjectKey(f"datum:{n}", SEGMENT_BYTES) for n in range(3)]
        for key in keys:
            store.landing_failed(key, 0, "test")
            land(store, block_extent(0), key=key)
        assert [read(store, block_extent(0), key=key) == ramp(block_extent(0)) for key in keys] == expected
        assert store.statistics().memory_bytes <= max(bytes_max, segment.PAGE_BYTES + SEGMENT_BYTES)
        store.close()


# --- sick disks -------------------------------------------------------------------------------------------------------


def mounted(source: str, target: Path, *options: str) -> None:
    """Mounts or skips the test: needs root and a kernel that lets it."""
    target.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, source, str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    mounted("tmpfs", disk, "-t", "tmpfs", "-o", "size=640k,mode=0700")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_costs_speed_not_data(small_disk: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """ENOSPC in the middle of a landing: what does not fit is kept in memory, one WARNING; room is used when there is some."""
    store = SegmentStore(str(small_disk / "cache"), monotonic=clock)
    keys = [ObjectKey(f"datum:{n}", SIZE) for n in range(6)]
    places = [land(store, key=key) for key in keys]
    assert not places[0].startswith("/proc/")
    assert places[-1].startswith("/proc/")
    for _ in range(2):
        assert [read(store, key=key) for key in keys] == [ramp(ALL)] * len(keys)
    assert [record.levelname for record in caplog.records] == ["WARNING"]

    os.unlink(places[0])
    store.landing_failed(keys[-1], 0, "No space left on device")  # upon which files are let go that are gone by now
    clock.now_s += health.BACKOFF_FIRST_S
    key = ObjectKey("datum:later", 1000)
    assert not land(store, Extent(0, 1000), key=key).startswith("/proc/"), "without a remount"
    clock.now_s += health.PROOF_S
    segment_path(store, key, 0)
    assert store.statistics().disk_well
    store.close()


def test_a_cache_that_has_become_read_only_is_still_read(tmp_path: Path, cache: str) -> None:
    """Warm data is served from it, new data from memory, bad blocks are not given out for lack of a way to mark them."""
    writable = SegmentStore(cache)
    path = land(writable, block_extent(0))
    land(writable, block_extent(1))
    writable.close()
    flip(path, 4096 + BLOCK_BYTES)
    view = tmp_path / "view"
    mounted(cache, view, "--bind", "-o", "ro")
    try:
        store = SegmentStore(str(view))
        assert not store.statistics().disk_well
        assert read(store, block_extent(0)) == ramp(block_extent(0))
        assert read(store, block_extent(1)) is ABSENT
        assert block_extent(1).start in [gap.start for gap in store.missing(KEY, "v", block_extent(1))]
        for gap in store.missing(KEY, "v", ALL):
            assert land(store, gap).startswith("/proc/")
        assert read(store) == ramp(ALL)
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(view)], check=True)


def test_a_directory_that_cannot_be_made_means_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = SegmentStore(str(tmp_path / "file" / "cache"))
    assert land(store).startswith("/proc/")
    assert read(store) == ramp(ALL)
    assert store.cached_bytes(KEY) == SIZE
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    store.close()


def test_a_directory_deleted_while_mounted_is_made_again(store: SegmentStore, cache: str, clock: Clock) -> None:
    """Reads go on, and after a pause so does caching on disk."""
    path = land(store)
    assert read(store) == ramp(ALL)
    subprocess.run(["rm", "-r", cache], check=True)
    assert read(store, block_extent(0)) in {ABSENT, ramp(block_extent(0))}
    key = ObjectKey("datum:next", SIZE)
    assert store.missing(key, "v", ALL) == [ALL]
    land(store, key=key)
    assert read(store, key=key) == ramp(ALL)
    later = ObjectKey("datum:later", SIZE)
    clock.now_s += health.BACKOFF_FIRST_S
    assert land(store, key=later).startswith(cache)
    assert read(store, key=later) == ramp(ALL)
    assert not os.path.exists(path)
    assert os.stat(cache).st_mode & 0o777 == 0o700


def test_a_link_planted_in_a_segments_place_is_not_followed(store: SegmentStore, tmp_path: Path) -> None:
    path = land(store)
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    assert read(store) is ABSENT
    assert land(store).startswith("/proc/")
    assert read(store) == ramp(ALL)
