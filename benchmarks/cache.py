"""`scripts/bench cache`: what the block cache costs by itself, without mount and network.

Opening and evicting in a cache of 1 TB (130,000 sparse segments), landing and reading back a stream, landing small objects.
Prints a table; the figures in docs/cache-format.md come from here. Reading from the disk is measured beside a plain file of
the same size on the same disk, both dropped from the page cache before.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from valohai_fuse.model import segment
from valohai_fuse.model.eviction import Budget
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.ports import NotHere, ObjectKey
from valohai_fuse.store import upkeep
from valohai_fuse.store.evictor import Evictor, scan
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.room import Room
from valohai_fuse.store.segments import SegmentStore

MIB = 1024 * 1024
SEGMENTS, SEGMENTS_QUICK = 130_000, 2_000
STREAM_BYTES, STREAM_BYTES_QUICK = 1024 * MIB, 64 * MIB
SMALL, SMALL_QUICK = 20_000, 1_000
SMALL_BYTES = 20 * 1024
READ_BYTES = MIB
READS_AT_ONCE = 4

Row = tuple[str, str, str]
"""What, how much, and what was promised."""


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began_s, time.process_time() - cpu_s


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _make_terabyte(cache_dir: str, count: int) -> None:
    """Segments of one object each with a full table and no data: as long as real ones, but holes."""
    home = os.path.join(cache_dir, segment.FORMAT_DIRECTORY)
    table = b"\1" * len(segment.EMPTY_TABLE)
    for fan_out in range(256):
        os.makedirs(os.path.join(home, f"{fan_out:02x}"), mode=0o700, exist_ok=True)
    for number in range(count):
        stable_id = f"datum:{number}"
        name = segment.segment_name(segment.object_digest(stable_id, SEGMENT_BYTES).hex(), 0)
        with open(os.path.join(home, name), "wb") as file:
            file.write(segment.encode_header(stable_id, SEGMENT_BYTES, 0, "v") + table)
            file.truncate(segment.DATA_OFFSET + SEGMENT_BYTES)


def _huge(root: Path, count: int) -> list[Row]:
    cache_dir = str(root / "huge")
    SegmentStore(cache_dir).close()
    os.chmod(cache_dir, 0o700)
    _make_terabyte(cache_dir, count)
    before_bytes = _resident_bytes()
    stores: list[SegmentStore] = []
    open_s, _ = _timed(lambda: stores.append(SegmentStore(cache_dir)))
    budget = Budget(bytes_max=count * segment.PAGE_BYTES * 9 // 10)
    room = Room(cache_dir, budget)
    evictor = Evictor(cache_dir, budget, room=room)
    pass_s, _ = _timed(evictor.run_pass)
    grown_bytes = _resident_bytes() - before_bytes
    info_s, _ = _timed(lambda: sum(1 for _ in upkeep.survey(cache_dir)))
    room.close()
    stores[0].close()
    return [
        (f"open a cache of {count:,} segments", f"{open_s * 1000:.1f} ms", "< 50 ms"),
        ("its first pass of eviction, a tenth goes", f"{pass_s:.2f} s", "< 5 s"),
        ("memory for all that", f"{grown_bytes / MIB:.1f} MiB", "< 20 MB"),
        ("`cache info` on it", f"{info_s:.1f} s", "seconds"),
    ]


def _small(root: Path, count: int) -> list[Row]:
    cache_dir = str(root / "small")
    store = SegmentStore(cache_dir)
    data = os.urandom(SMALL_BYTES)

    def land() -> None:
        for number in range(count):
            key = ObjectKey(f"datum:{number}", SMALL_BYTES)
            with SegmentWriter(store.segment_path(key, 0), key, 0, "v") as writer:
                writer.land(0, data)

    took_s, _ = _timed(land)
    held_bytes = sum(found.bytes_on_disk for found in scan(cache_dir))
    store.close()
    return [
        (f"landing {count:,} objects of 20 KiB", f"{count / took_s:,.0f} /s", "> 5,000 /s"),
        ("their bytes on disk", f"{held_bytes / (count * SMALL_BYTES):.2f} times", "< 1.3 times"),
    ]


def _drop(*paths: Path) -> None:
    """Out of the page cache, as far as the kernel follows the advice; written back first."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _read_plain(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(READ_BYTES):
            pass


def _read_store(cache_dir: str, key: ObjectKey) -> None:
    """As the engine does: at once where it is in the page cache, in a thread where not; READS_AT_ONCE, as the kernel's own
    readahead on a mount asks for them."""

    async def read() -> None:
        store = SegmentStore(cache_dir)
        offsets = iter(range(0, key.size, READ_BYTES))

        async def reader() -> None:
            for at in offsets:
                extent = Extent(at, min(at + READ_BYTES, key.size))
                found = store.read_nowait(key, "v", extent)
                if isinstance(found, NotHere):
                    found = await store.read(key, "v", extent)
                assert not isinstance(found, NotHere)

        async with trio.open_nursery() as nursery:
            for _ in range(READS_AT_ONCE):
                nursery.start_soon(reader)
        store.close()

    trio.run(read)


def _stream(root: Path, size: int, runs: int) -> list[Row]:
    cache_dir, plain = str(root / "stream"), root / "plain"
    store = SegmentStore(cache_dir)
    key, data = ObjectKey("datum:stream", size), os.urandom(SEGMENT_BYTES)

    def land() -> None:
        for start in range(0, size, SEGMENT_BYTES):
            with SegmentWriter(store.segment_path(key, start), key, start // SEGMENT_BYTES, "v") as writer:
                for at in range(0, SEGMENT_BYTES, MIB):
                    writer.land(start + at, data[at : at + MIB])

    _, land_cpu_s = _timed(land)
    with plain.open("wb") as file:
        for _ in range(size // SEGMENT_BYTES):
            file.write(data)
    store.close()
    segments = [Path(cache_dir, segment.FORMAT_DIRECTORY, found.name) for found in scan(cache_dir)]
    plain_s, ours_s, hot_s = [], [], []
    for _ in range(runs):
        _drop(plain)
        plain_s.append(_timed(lambda: _read_plain(plain))[0])
        _drop(*segments)
        ours_s.append(_timed(lambda: _read_store(cache_dir, key))[0])
        hot_s.append(_timed(lambda: _read_store(cache_dir, key))[0])
    plain_rate, ours_rate, hot_rate = (size / min(times) / 1e6 for times in (plain_s, ours_s, hot_s))
    return [
        ("landing a stream, CPU", f"{land_cpu_s * 1024 * MIB / size:.2f} s/GiB", "< 0.35 s/GiB"),
        ("a plain file from the disk", f"{plain_rate:,.0f} MB/s", ""),
        ("the cache from the disk, verified", f"{ours_rate:,.0f} MB/s ({ours_rate / plain_rate:.2f})", "> 0.7 of that"),
        ("the cache from the page cache, verified", f"{hot_rate:,.0f} MB/s", ""),
    ]


def main(argv: list[str]) -> int:
    """Measures in a directory of its own and takes it away again."""
    parser = argparse.ArgumentParser(prog="scripts/bench cache", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work, not how fast is it")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on the disk to measure")  # noqa: S108 - on a disk
    arguments = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="valohai-fuse-cache-", dir=arguments.dir))
    quick = arguments.quick
    try:
        rows = _stream(root, STREAM_BYTES_QUICK if quick else STREAM_BYTES, 1 if quick else 5)
        rows += _small(root, SMALL_QUICK if quick else SMALL)
        rows += _huge(root, SEGMENTS_QUICK if quick else SEGMENTS)
    finally:
        shutil.rmtree(root)
    width = max(len(what) for what, _, _ in rows)
    for what, figure, promised in rows:
        sys.stdout.write(f"{what:<{width}}  {figure:>20}  {promised}\n")
    return 0
