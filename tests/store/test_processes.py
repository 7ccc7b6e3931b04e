"""Several processes on one segment, and processes that die while they land: whatever happens, never a wrong byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from support.segment_paths import segment_path
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES, Extent
from valohai_fuse.ports import ABSENT, NotHere, ObjectKey
from valohai_fuse.store.segments import SegmentStore

pytestmark = pytest.mark.expect_warnings("the cache directory takes no writes")

SIZE = 2 * SEGMENT_BYTES - 1000
KEY = ObjectKey("shared", SIZE)
PERIOD = bytes(range(251))
SCRIPT = str(Path(__file__).with_name("landing_process.py"))


def ramp(extent: Extent) -> bytes:
    first = extent.start % 251
    return (PERIOD * (len(extent) // 251 + 2))[first : first + len(extent)]


def block_extent(index: int, block: int) -> Extent:
    start = index * SEGMENT_BYTES + block * BLOCK_BYTES
    return Extent(start, min(start + BLOCK_BYTES, SIZE))


def present_blocks(store: SegmentStore, index: int, version: str) -> set[int]:
    """Blocks that a read gives; each is compared with the object."""
    present = set()
    for block in range(SEGMENT_BLOCKS):
        extent = block_extent(index, block)
        found = trio.run(store.read, KEY, version, extent)
        if isinstance(found, NotHere):
            assert found is ABSENT
        else:
            assert bytes(found) == ramp(extent)
            present.add(block)
    return present


def lander(path: str, index: int, version: str, seed: int, *more: str) -> subprocess.Popen[bytes]:
    arguments = [path, str(SIZE), str(index), version, str(seed), *more]
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, pipesize=4096)


def reported(process: subprocess.Popen[bytes], count: int) -> set[int]:
    assert process.stdout is not None
    return {int(process.stdout.readline()) for _ in range(count)}


def rest(process: subprocess.Popen[bytes]) -> set[int]:
    """What else it said before it ended; a line that was cut by the kill does not count."""
    out, _ = process.communicate()
    return {int(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")}


@pytest.mark.parametrize("index", [0, 1])
def test_several_processes_land_in_one_segment_at_once(tmp_path: Path, index: int) -> None:
    """All of what each of them landed is there, though nobody locks: the table only gains entries."""
    store = SegmentStore(str(tmp_path / "cache"))
    path = segment_path(store, KEY, index * SEGMENT_BYTES)
    processes = [lander(path, index, "v", seed, "once") for seed in range(3)]
    for process in processes:
        rest(process)
        assert process.returncode == 0
    assert present_blocks(store, index, "v") == set(range(SEGMENT_BLOCKS))
    assert store.missing(KEY, "v", Extent(index * SEGMENT_BYTES, min((index + 1) * SEGMENT_BYTES, SIZE))) == []
    store.close()


@pytest.mark.parametrize("lines", [1, 2, 3, 5, 20, 60])
def test_kill_9_while_landing(tmp_path: Path, lines: int) -> None:
    """What a killed writer reported as landed is there, the rest is absent or right, and another one completes it."""
    store = SegmentStore(str(tmp_path / "cache"))
    path = segment_path(store, KEY, 0)
    process = lander(path, 0, "v", lines)
    landed = reported(process, lines)
    os.kill(process.pid, signal.SIGKILL)
    landed |= rest(process)
    present = present_blocks(store, 0, "v")
    assert landed <= present
    assert len(present) <= len(landed) + 1, "no more than the block that was under way"
    assert len(present) < SEGMENT_BLOCKS, "proves nothing: the writer was done before it was killed"
    store.close()

    later = SegmentStore(str(tmp_path / "cache"))
    assert present_blocks(later, 0, "v") == present
    completing = lander(path, 0, "v", 99, "once")
    rest(completing)
    assert completing.returncode == 0
    assert present_blocks(later, 0, "v") == set(range(SEGMENT_BLOCKS))
    later.close()


def test_two_versions_fight_for_one_segment(tmp_path: Path) -> None:
    """Writers of two versions at once: one takes the segment from the other; no read mixes them."""
    store = SegmentStore(str(tmp_path / "cache"))
    path = segment_path(store, KEY, 0)
    processes = [lander(path, 0, version, seed, "once") for seed, version in enumerate(["v1", "v2", "v1", "v2"])]
    for process in processes:
        rest(process)
        assert process.returncode == 0
    winner = store.version(KEY, 0)
    assert winner in {"v1", "v2"}
    for block in present_blocks(store, 0, winner):
        loser = {"v1": "v2", "v2": "v1"}[winner]
        assert isinstance(trio.run(store.read, KEY, loser, block_extent(0, block)), NotHere)
    store.close()


def test_a_worker_lands_in_the_memory_of_the_daemon(tmp_path: Path) -> None:
    """The path of a memory segment means something in another process of the same user."""
    store = SegmentStore(str(tmp_path / "cache"))
    store.landing_failed(KEY, 0, "test")
    path = segment_path(store, KEY, 0)
    assert path.startswith("/proc/")
    process = lander(path, 0, "v", 1, "once")
    rest(process)
    assert process.returncode == 0
    assert present_blocks(store, 0, "v") == set(range(SEGMENT_BLOCKS))
    assert list((tmp_path / "cache" / "v1").rglob("*.0")) == []
    store.close()
