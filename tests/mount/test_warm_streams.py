"""Sequential reads of what is cached on the disk but not in memory, on a real mount."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.cache_damage import paths
from support.mounts import MountedSandbox, MountInputs, run_program, wait_until
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
        drop_pages(file)
    if all(cached_pages(file) for file in files):
        pytest.skip(
            "the temporary directory's file system keeps its pages: it is in memory; choose another by --basetemp"
        )
    for file in files:  # what another processor has just put down goes a little later
        wait_until(f"{file.name} is on the disk only", lambda file=file: drop_pages(file) == 0)  # type: ignore[misc]
    assert mounted.mount().returncode == 0
    return files


def drop_pages(file: Path) -> int:
    """Has the kernel drop what it has of it in the page cache; returns how many pages it keeps all the same."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return cached_pages(file)


def cached_pages(file: Path) -> int:
    """How much of it is in the page cache; to look does not change it, as to read would."""
    return int(run_program(["fincore", "--noheadings", "--output", "PAGES", str(file)], cwd=file.parent))


def test_a_warm_stream_is_exact_needs_no_store_and_fills_no_page_cache_but_its_own(mount_inputs: MountInputs) -> None:
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE)}})
    by_memory = 0
    for _ in range(3):  # a reader may be ahead of the loads for a while where the loop's thread gets no processor
        files = cool(mounted)
        sent = mounted.sent_bytes()
        assert mounted.path("data", "a.bin").read_bytes() == mounted.sandbox.expected_bytes("data", "a.bin")
        assert mounted.sent_bytes() == sent
        segment_pages = SEGMENT_BYTES // segment.PAGE_BYTES
        by_memory = sum(cached_pages(file) < segment_pages // 2 for file in files[:-1])
        if by_memory >= SEGMENTS - 3:
            break
    assert by_memory >= SEGMENTS - 3, "what came before it was worth it is read through the page cache"


def test_rot_under_a_warm_stream_is_fetched_again(mount_inputs: MountInputs) -> None:
    """In the middle of what is loaded: every byte is right, and one block comes from the store."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE)}}, expected_warnings=("failed its check",))
    cool(mounted, rotten=5)
    sent = mounted.sent_bytes()
    assert mounted.path("data", "a.bin").read_bytes() == mounted.sandbox.expected_bytes("data", "a.bin")
    assert 0 < mounted.sent_bytes() - sent <= 2 * 1024 * 1024
    assert "block 42 of cache file" in mounted.log()
