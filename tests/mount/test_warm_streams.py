"""Sequential reads of what is cached on the disk but not in memory, on a real mount."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.cache_damage import paths
from support.mounts import MountedSandbox, MountInputs
from valohai_fuse.model import segment
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.sandbox.content import ramp

SEGMENTS = 9
SIZE = SEGMENTS * SEGMENT_BYTES + 12345


def cool(mounted: MountedSandbox, *, rotten: int | None = None) -> list[Path]:
    """Fetches all of it, mounts it anew and drops the cache files' pages, so that it is on the disk only: the files, in order. Of
    one, the `rotten`, a block is spoilt."""
    # Not by reading: of a stream that is faster than the disk only a part is kept.
    assert mounted.cli("prefetch", str(mounted.path("data"))).returncode == 0
    assert mounted.unmount().returncode == 0
    files = sorted(paths(mounted.cache_dir), key=lambda file: int(file.suffix[1:], 16))
    if rotten is not None:
        with files[rotten].open("r+b") as opened:
            opened.seek(segment.DATA_OFFSET + SEGMENT_BYTES // 3)
            opened.write(b"rot!")
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    assert mounted.mount().returncode == 0
    if not any(is_on_disk_only(file) for file in files):
        pytest.skip(
            "the temporary directory's file system keeps its pages: it is in memory; choose another by --basetemp"
        )
    return files


def is_on_disk_only(file: Path) -> bool:
    """Whether the page in the middle of the segment would have to be waited for."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(1)], SEGMENT_BYTES // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_a_warm_stream_is_exact_needs_no_store_and_fills_no_page_cache_but_its_own(mount_inputs: MountInputs) -> None:
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE)}})
    files = cool(mounted)
    sent = mounted.sent_bytes()
    assert mounted.path("data", "a.bin").read_bytes() == mounted.sandbox.expected_bytes("data", "a.bin")
    assert mounted.sent_bytes() == sent
    by_memory = [is_on_disk_only(file) for file in files[:-1]]
    assert sum(by_memory) >= SEGMENTS - 3, "what came before it was worth it is read through the page cache"


def test_rot_under_a_warm_stream_is_fetched_again(mount_inputs: MountInputs) -> None:
    """In the middle of what is loaded: every byte is right, and one block comes from the store."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE)}}, expected_warnings=("failed its check",))
    cool(mounted, rotten=5)
    sent = mounted.sent_bytes()
    assert mounted.path("data", "a.bin").read_bytes() == mounted.sandbox.expected_bytes("data", "a.bin")
    assert 0 < mounted.sent_bytes() - sent <= 2 * 1024 * 1024
    assert "block 42 of cache file" in mounted.log()
