"""A cache disk that is slow, full or gone costs cached bytes, not reads; and all is well when it is well again."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import valohai_fuse
from support.mounts import MountInputs, read_elsewhere, run_cli, wait_until
from valohai_fuse.sandbox import ramp

MIB = 1024 * 1024
SOURCES = Path(valohai_fuse.__file__).resolve().parent.parent

SLOW_DISK = """
import os, time
from valohai_fuse.store import landing
fast = landing.write_all
def slow(fd, data, offset):
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd"):
        time.sleep(len(data) / 20e6)
    fast(fd, data, offset)
landing.write_all = slow
directly = landing._write_directly
def slow_directly(fd, data, offset):
    time.sleep(len(data) / 20e6)
    return directly(fd, data, offset)
landing._write_directly = slow_directly
"""


def test_a_slow_disk_is_used_less(mount_inputs: MountInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB/s: the file is read right and fetched once, most of it passes the disk by, and some of it is cached."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    monkeypatch.setenv("PYTHONPATH", f"{SOURCES}{os.pathsep}{tmp_path}")
    mounted = mount_inputs({"data": {"big.bin": ramp(160 * MIB)}})
    assert read_elsewhere(mounted.path("data", "big.bin"), timeout_s=90) == mounted.sandbox.expected_bytes(
        "data", "big.bin"
    )
    assert mounted.sent_bytes() <= 1.05 * 160 * MIB
    held = sum(path.stat().st_blocks * 512 for path in Path(mounted.cache_dir, "v1").rglob("*.*"))
    assert MIB < held < 120 * MIB
    assert "the cache disk holds fetches up" in mounted.log()


def test_prefetch_waits_for_a_slow_disk(
    mount_inputs: MountInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of what it says is there can be read by the next mount, without a store."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK.replace("20e6", "80e6"))
    monkeypatch.setenv("PYTHONPATH", f"{SOURCES}{os.pathsep}{tmp_path}")
    files = {f"{n}.bin": ramp(48 * MIB + n) for n in range(8)}
    mounted = mount_inputs({"data": files})
    outcome = mounted.cli("prefetch", str(mounted.path("data")))
    assert outcome.returncode == 0, outcome.stderr
    assert mounted.sent_bytes() == sum(48 * MIB + n for n in range(8))
    assert mounted.unmount().returncode == 0
    assert mounted.mount().returncode == 0
    mounted.sandbox.stop_store()
    for name in files:
        assert read_elsewhere(mounted.path("data", name)) == mounted.sandbox.expected_bytes("data", name)


def test_prefetch_fetches_little_for_a_disk_that_takes_no_more(
    mount_inputs: MountInputs, own_directories: Path
) -> None:
    """Out of inodes. Each file is told once, what the disk has refused is not fetched for it again, and reads go on from memory."""
    disk = own_directories / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m,nr_inodes=12,mode=700", "tmpfs", disk], check=False
    )
    if mount.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        mounted = mount_inputs(
            {"data": {f"{n}.bin": ramp(8 * MIB + n) for n in range(20)}},
            options=(f"--cache-dir={disk}/cache", "--cache-min-free=0"),
            expected_warnings=("takes no writes",),
        )
        outcome = mounted.cli("prefetch", str(mounted.path("data")))
        assert outcome.returncode != 0
        assert "the cache directory takes no writes" in outcome.stderr
        assert mounted.sent_bytes() < 20 * 8 * MIB
        assert read_elsewhere(mounted.path("data", "7.bin")) == mounted.sandbox.expected_bytes("data", "7.bin")
        assert mounted.unmount().returncode == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_deleted_cache_is_made_again(mount_inputs: MountInputs) -> None:
    """`rm -rf` of the whole directory below a live mount: reads go on, and soon what is read is cached again."""
    files = {f"{n}.bin": ramp(MIB + n) for n in range(60)}
    mounted = mount_inputs({"data": files}, expected_warnings=("takes no writes",))

    def is_right(name: str) -> bool:
        return read_elsewhere(mounted.path("data", name)) == mounted.sandbox.expected_bytes("data", name)

    assert is_right("0.bin")
    shutil.rmtree(mounted.cache_dir)
    names = iter(files)

    def cached_again() -> bool:
        assert is_right(next(names))
        return any(Path(mounted.cache_dir).glob("v1/??/*"))

    wait_until("something is cached again", cached_again)
    assert all(is_right(name) for name in files)


def test_a_full_disk_costs_the_cache_not_the_read(mount_inputs: MountInputs, own_directories: Path) -> None:
    """ENOSPC in the middle of a stream, for real: a file system of 24 MiB below the cache. Once there is room again, the
    mount uses it."""
    disk = own_directories / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", disk], check=False)
    if mount.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(12 * MIB))
        mounted = mount_inputs(
            {"data": {"big.bin": ramp(40 * MIB)} | {f"{n}.bin": ramp(MIB + n) for n in range(120)}},
            options=(f"--cache-dir={disk}/cache", "--cache-min-free=0"),
            expected_warnings=("takes no writes",),
        )
        big = mounted.path("data", "big.bin")
        assert read_elsewhere(big, timeout_s=90) == mounted.sandbox.expected_bytes("data", "big.bin")
        ballast.unlink()
        assert mounted.status()["mounts"][0]["metrics"]["cache_errors"] > 0

        assert run_cli("cache", "prune", f"--cache-dir={disk}/cache", "--to=0").returncode == 0
        unread = (
            f"{n}.bin" for n in range(120)
        )  # of what was read the kernel has the pages: nobody would fetch it again

        def cached() -> bool:
            threading.Event().wait(0.5)  # the files shall last until the disk's backoff is over
            name = next(unread)
            assert read_elsewhere(mounted.path("data", name)) == mounted.sandbox.expected_bytes("data", name)
            return any(path.stat().st_blocks for path in disk.glob("cache/v1/??/*"))

        wait_until("the disk is used again", cached, timeout_s=60)
        assert mounted.unmount().returncode == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
