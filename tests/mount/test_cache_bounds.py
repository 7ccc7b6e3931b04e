"""`--cache-max-size` on a real mount: the bound holds at every moment, whatever is read, and every byte is right."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.mounts import MountInputs, read_elsewhere
from valohai_fuse.sandbox import ramp

MIB = 1024 * 1024


class Peak:
    """The most that a cache directory's segments took on disk, looked at again and again by a thread."""

    def __init__(self, cache_dir: str) -> None:
        self.bytes_max = 0
        self.looks = 0
        self._home = os.path.join(cache_dir, "v1")
        self._over = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Peak]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.bytes_max = max(self.bytes_max, self._look())
            self.looks += 1

    def _look(self) -> int:
        """What was there in a first look and still is in a second one: that much at one moment, for certain."""
        first, second = self._list(), self._list()
        return sum(min(byte_count, second.get(name, 0)) for name, byte_count in first.items())

    def _list(self) -> dict[str, int]:
        held = {}
        for directory, _, names in os.walk(self._home):
            for name in names:
                with contextlib.suppress(OSError):
                    held[name] = os.stat(os.path.join(directory, name)).st_blocks * 512
        return held


def test_the_bound_holds_at_every_moment(mount_inputs: MountInputs) -> None:
    """Eight readers of ten times the bound, which holds one segment of each: never more than 2 % above it on the disk, every
    byte right, and what was fetched ahead is still there when its reader comes."""
    bound = 64 * MIB
    files = {f"{n}.bin": ramp(80 * MIB + n * 1000) for n in range(8)}
    mounted = mount_inputs({"data": files}, options=("--cache-max-size=64M", "--cache-min-free=0"))
    with Peak(mounted.cache_dir).watched() as peak, ThreadPoolExecutor(8) as readers:

        def read(name: str) -> bool:
            expected = mounted.sandbox.expected_bytes("data", name)
            return read_elsewhere(mounted.path("data", name), timeout_s=60) == expected

        assert all(readers.map(read, files))
    assert peak.looks > 20
    assert peak.bytes_max <= 1.02 * bound
    assert peak.bytes_max > bound // 2, "the cache is used"
    total = sum(content.size for content in files.values())
    assert mounted.sent_bytes() < 1.1 * total


def test_a_file_larger_than_the_cache_streams_through(mount_inputs: MountInputs) -> None:
    """Each byte is fetched once, even though the cache holds a fifth of the file."""
    mounted = mount_inputs({"data": {"big.bin": ramp(160 * MIB)}}, options=("--cache-max-size=32M",))
    with Peak(mounted.cache_dir).watched() as peak:
        data = read_elsewhere(mounted.path("data", "big.bin"), timeout_s=60)
    assert data == mounted.sandbox.expected_bytes("data", "big.bin")
    assert peak.bytes_max <= 1.02 * 32 * MIB
    assert mounted.sent_bytes() <= 1.05 * 160 * MIB


def test_no_free_room_costs_the_cache_not_the_read(mount_inputs: MountInputs) -> None:
    """A disk that others have filled beyond `--cache-min-free`: nothing lands there, and everything can be read."""
    mounted = mount_inputs({"data": {"a.bin": ramp(24 * MIB)}}, options=("--cache-min-free=100%",))
    data = read_elsewhere(mounted.path("data", "a.bin"), timeout_s=60)
    assert data == mounted.sandbox.expected_bytes("data", "a.bin")
    home = Path(mounted.cache_dir, "v1")
    assert not [path for path in home.rglob("*.*") if path.stat().st_blocks]
