"""A cache disk that is slower than the network sets nobody's pace: a cold stream beside the same stream without a cache."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest

import valohai_fuse
from support.mounts import MountedSandbox
from valohai_fuse.sandbox import Sandbox, ramp

pytestmark = pytest.mark.mount

MIB = 1024 * 1024
SIZE = 1024 * MIB
ROUNDS = 5
SOURCES = Path(valohai_fuse.__file__).resolve().parent.parent

CAPPED = """
import os, time
from valohai_fuse.store import landing
def slow(write):
    def slow_write(fd, data, offset):
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd"):
            time.sleep(len(data) / 50e6)
        return write(fd, data, offset)
    return slow_write
landing.write_all = slow(landing.write_all)
landing._write_directly = slow(landing._write_directly)
"""
UNCACHED = """
from valohai_fuse.store import landing
landing.SegmentWriter.copy_out = lambda self, *where: None
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_disk_of_50_mb_s_costs_a_stream_a_fifth_at_most(
    own_directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaved rounds, each with an empty cache; "without" writes nothing behind. Some of it is cached all the same, and
    nothing is fetched twice: what waits for the disk drives nothing out that was not read yet."""
    rates: dict[str, list[float]] = {CAPPED: [], UNCACHED: []}
    kept_bytes = []
    for number in range(ROUNDS):
        for nth, (patch, done) in sorted(enumerate(rates.items()), reverse=bool(number % 2)):
            home = own_directories / f"{number}-{nth}"
            home.mkdir()
            (home / "sitecustomize.py").write_text(patch)
            monkeypatch.setenv("PYTHONPATH", f"{SOURCES}{os.pathsep}{home}")
            with (
                Sandbox({"data": {"big.bin": ramp(SIZE)}}, root=home / "valohai") as sandbox,
                MountedSandbox(
                    sandbox, expected_warnings=("event loop",)
                ) as mounted,  # its stalls are not the matter here
            ):
                done.append(_rate(mounted.path("data", "big.bin")))
                held = sum(path.stat().st_blocks * 512 for path in Path(mounted.cache_dir, "v1").rglob("*.*"))
                kept_bytes += [held] if patch is CAPPED else []
                assert mounted.sent_bytes() <= 1.02 * SIZE
    capped, uncached = (statistics.median(done) for done in rates.values())
    print(f"{capped:.0f} MB/s with the disk, {uncached:.0f} without: {capped / uncached:.2f}; {kept_bytes} bytes kept")
    assert capped >= 0.8 * uncached
    assert min(kept_bytes) > 16 * MIB


def _rate(path: Path) -> float:
    began_s, byte_count = time.perf_counter(), 0
    piece = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            byte_count += count
    assert byte_count == SIZE
    return byte_count / 1e6 / (time.perf_counter() - began_s)
