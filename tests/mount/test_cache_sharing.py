"""One cache directory, several mounts at once: what one has fetched the other has, and nobody may tamper with it."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import ssh
from support.mounts import MountedSandbox, OtherExecution, read_elsewhere, run_cli
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.ports import ObjectKey
from valohai_fuse.sandbox import Sandbox, ramp
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.opened import OpenSegment

MIB = 1024 * 1024
SIZE = 40 * MIB + 777
FILES = {"big.bin": ramp(SIZE), "small.bin": ramp(70_000)}
TOTAL = SIZE + 70_000


@contextlib.contextmanager
def executions(root: Path, *cache_dirs: str, expected_warnings: tuple[str, ...] = ()) -> Iterator[list[MountedSandbox]]:
    """One execution for each cache directory, all of the same inputs."""
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox({"data": FILES}, root=root / "valohai"))
        yield [
            stack.enter_context(
                OtherExecution(sandbox, root, f"e{number}", cache_dir=cache_dir, expected_warnings=expected_warnings)
            )
            for number, cache_dir in enumerate(cache_dirs)
        ]


def is_right(mounted: MountedSandbox, name: str) -> bool:
    """Reads a whole file."""
    return read_elsewhere(mounted.path("data", name), timeout_s=90) == mounted.sandbox.expected_bytes("data", name)


def test_what_one_has_read_the_next_need_not_fetch(own_directories: Path) -> None:
    """Also while the first one is still mounted."""
    cache_dir = str(own_directories / "cache")
    with executions(own_directories, cache_dir, cache_dir) as (first, second):
        assert all(is_right(first, name) for name in FILES)
        sent = first.sent_bytes()
        assert all(is_right(second, name) for name in FILES)
        assert first.sent_bytes() == sent


def test_two_who_read_the_same_at_once_fetch_it_once(own_directories: Path) -> None:
    """Three executions start on one file in the same moment, as the nodes of a distributed training do."""
    cache_dir = str(own_directories / "cache")
    with executions(own_directories, *[cache_dir] * 3) as mounts, ThreadPoolExecutor(3) as readers:
        assert all(readers.map(lambda mounted: is_right(mounted, "big.bin"), mounts))
        assert mounts[0].sent_bytes() <= 1.1 * SIZE


@pytest.mark.skipif(not ssh.is_installed(), reason="needs sshfs and sshd")
def test_on_a_network_file_system(own_directories: Path) -> None:
    """Two hosts, each with the cache over sshfs: every byte right while both read at once, and afterwards from the cache
    alone, with the store gone."""
    shared = own_directories / "shared"
    shared.mkdir()
    with contextlib.ExitStack() as stack:
        options = stack.enter_context(ssh.server(own_directories / "ssh"))
        hosts = [
            stack.enter_context(ssh.mounted(options, shared, own_directories / f"host{number}")) for number in range(2)
        ]
        # A look-up is waited for, and a loopback sshd on a busy machine has been seen to take 0.28 s for one.
        slow = ("the event loop (has stood|stood) still",)
        directories = (str(host.mountpoint / "cache") for host in hosts)
        with executions(own_directories, *directories, expected_warnings=slow) as mounts:
            with ThreadPoolExecutor(2) as readers:
                assert all(readers.map(lambda mounted: is_right(mounted, "big.bin"), mounts))
            assert all(is_right(mounted, "small.bin") for mounted in mounts)
            mounts[0].sandbox.stop_store()
            mounts[0].sandbox.stop_api()
            for mounted in mounts:
                assert mounted.unmount().returncode == 0
                assert mounted.mount().returncode == 0
                assert all(is_right(mounted, name) for name in FILES)


@pytest.mark.skipif(not ssh.is_installed(), reason="needs sshfs and sshd")
@pytest.mark.parametrize("kept", [False, True])
def test_what_the_kernel_has_may_be_older_than_what_another_host_wrote(own_directories: Path, kept: bool) -> None:
    """It has read ahead where nothing was yet. Once another host has landed its block there the block is read all the same,
    even when the kernel cannot forget what it has (`kept`: somebody maps it): to distrust it would take it from all hosts."""
    shared = own_directories / "shared"
    shared.mkdir()
    key, block = ObjectKey("datum:x", 2 * BLOCK_BYTES), b"x" * BLOCK_BYTES
    name = "segment"

    def land(offset: int) -> None:
        with SegmentWriter(str(shared / name), key, 0, "v") as writer:
            writer.land(offset, block)

    land(BLOCK_BYTES)
    with contextlib.ExitStack() as stack:
        options = stack.enter_context(ssh.server(own_directories / "ssh"))
        host = stack.enter_context(ssh.mounted(options, shared, own_directories / "host"))
        here = OpenSegment.open(str(host.mountpoint / name), key, 0, never_waits=False)
        there = OpenSegment.open(str(shared / name), key, 0, never_waits=False)
        assert not any(os.pread(here.fd, BLOCK_BYTES, segment.DATA_OFFSET)), "the hole"
        if kept:
            mapped = stack.enter_context(mmap.mmap(here.fd, 0, prot=mmap.PROT_READ))
            assert not any(mapped[segment.DATA_OFFSET :][:BLOCK_BYTES])
        land(0)
        contents = there.refresh(nowait=False)
        assert contents is not None
        assert not any(os.pread(here.fd, BLOCK_BYTES, segment.DATA_OFFSET)), "what the kernel has"
        got = bytearray(BLOCK_BYTES)
        assert here.read_blocks(contents, 0, memoryview(got), nowait=False) is None
        assert got == block
        del here  # before its file system goes


@pytest.mark.parametrize("trouble", ["symlink", "foreign", "open to others"])
def test_a_cache_that_others_could_tamper_with_is_refused(own_directories: Path, trouble: str) -> None:
    """By `mount` and by the `cache` commands, in a sentence."""
    if trouble == "foreign" and os.geteuid() != 0:
        pytest.skip("only root can make a directory that is somebody else's")
    cache_dir = own_directories / "cache"
    if trouble == "symlink":
        (own_directories / "real").mkdir(mode=0o700)
        cache_dir.symlink_to(own_directories / "real")
    else:
        cache_dir.mkdir(mode=0o700)
        if trouble == "foreign":
            os.chown(cache_dir, 12345, 12345)
        else:
            cache_dir.chmod(0o777)
    with Sandbox({"data": FILES}, root=own_directories / "valohai") as sandbox:
        refused = MountedSandbox(sandbox, cache_dir=str(cache_dir))
        for outcome in (refused.mount(), run_cli("cache", "clear", *refused.places)):
            assert outcome.returncode == 3
            assert "cache directory" in outcome.stderr
            assert "Traceback" not in outcome.stderr
