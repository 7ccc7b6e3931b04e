"""`scripts/bench cache`: what the block cache costs by itself, without mount and network.

Opening, evicting and `cache info` in a cache of 1 TB (130,000 sparse segments) and of a million small objects, landing and
reading back a stream, landing small objects. Prints a table; with --write `scripts/bench --write` puts it into docs/.

Ours stands beside plain files: a stream is read from a plain file of the same size on the same disk, both dropped from the
page cache before; small objects are landed beside plain files in the same directories. Nothing is deleted before the end:
ext4 avoids the inodes of what was deleted in the last minutes, one by one, and making any file takes ten times as long then.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio
import trio.lowlevel

from benchmarks.meters import drop_page_cache
from benchmarks.provision import settle_memory
from valohai_fuse.engine.loads import Loads
from valohai_fuse.engine.objects import Handle, RemoteObject
from valohai_fuse.model import segment
from valohai_fuse.model.eviction import Budget
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.model.tree import Inode
from valohai_fuse.ports import COLD, FileRef, NotHere, ObjectKey
from valohai_fuse.store import upkeep
from valohai_fuse.store.calls import DiskCalls
from valohai_fuse.store.directory import Home
from valohai_fuse.store.evictor import Evictor, scan
from valohai_fuse.store.landing import Landings, SegmentWriter
from valohai_fuse.store.room import Room
from valohai_fuse.store.segments import SegmentStore

MIB = 1024 * 1024
SEGMENTS, SEGMENTS_QUICK = 130_000, 2_000
STREAM_BYTES, STREAM_BYTES_QUICK = 1024 * MIB, 64 * MIB
SMALL, SMALL_QUICK = 5_000, 1_000
MANY = 1_000_000
SMALL_BYTES = 20 * 1024
READ_BYTES = MIB
READS_AT_ONCE = 4
RECEIVED_BYTES = 256 * 1024
"""What a worker vouches for at a time."""

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


def _made(place: Path, count: int, size: int) -> str:
    """A cache with that many objects of `size` bytes, all of them there by their tables; as long as real ones, but holes."""
    cache_dir = str(place)
    SegmentStore(cache_dir).close()
    home = os.path.join(cache_dir, segment.FORMAT_DIRECTORY)
    blocks = segment.blocks_in(size)
    table = (b"\1" * segment.ENTRY_BYTES * blocks).ljust(len(segment.EMPTY_TABLE), b"\0")
    for fan_out in range(256):
        os.makedirs(os.path.join(home, f"{fan_out:02x}"), mode=0o700, exist_ok=True)
    for number in range(count):
        stable_id = f"datum:{number}"
        name = segment.segment_name(segment.object_digest(stable_id, size).hex(), 0)
        with open(os.path.join(home, name), "wb", buffering=0) as file:
            file.write(segment.encode_header(stable_id, size, 0, "v") + table)
            file.truncate(segment.DATA_OFFSET + size)
    return cache_dir


def _huge(root: Path, count: int) -> list[Row]:
    cache_dir = _made(root / "huge", count, SEGMENT_BYTES)
    before_bytes = _resident_bytes()
    stores: list[SegmentStore] = []
    open_s, _ = _timed(lambda: stores.append(SegmentStore(cache_dir)))
    first_s, again_s, evicted = _passes(cache_dir, count)
    grown_bytes = _resident_bytes() - before_bytes
    info_s, _ = _timed(lambda: upkeep.summarize(cache_dir))
    stores[0].close()
    return [
        (f"open a cache of {count:,} segments", f"{open_s * 1000:.1f} ms", "< 50 ms"),
        (f"its first pass of eviction, {evicted:,} go", f"{first_s:.2f} s", "< 5 s"),
        ("a pass that finds nothing to do", f"{again_s:.2f} s", ""),
        ("memory for all that", f"{grown_bytes / MIB:.1f} MiB", "< 20 MB"),
        ("`cache info` on it", f"{info_s:.1f} s", "seconds"),
    ]


def _many(root: Path, count: int) -> list[Row]:
    cache_dir = _made(root / "many", count, SMALL_BYTES)
    info_s, _ = _timed(lambda: upkeep.summarize(cache_dir))
    cold = "not as root"
    if os.geteuid() == 0:
        drop_page_cache()
        cold = f"{_timed(lambda: upkeep.summarize(cache_dir))[0]:.1f} s"
    first_s, again_s, evicted = _passes(cache_dir, count)
    return [
        (f"`cache info` on {count:,} objects of 20 KiB", f"{info_s:.1f} s", "seconds"),
        ("the same with nothing in the page cache", cold, "seconds"),
        (f"the first pass of eviction there, {evicted:,} go", f"{first_s:.1f} s", "seconds"),
        ("a pass that finds nothing to do there", f"{again_s:.1f} s", ""),
    ]


def _passes(cache_dir: str, count: int) -> tuple[float, float, int]:
    """Seconds of a first pass that has something to do, and of a second that has not; how many segments went."""
    budget = Budget(bytes_max=count * segment.PAGE_BYTES * 98 // 100)
    room = Room(cache_dir, budget)
    evictor = Evictor(cache_dir, budget, room=room)
    first_s, _ = _timed(evictor.run_pass)
    again_s, _ = _timed(evictor.run_pass)
    room.close()
    return first_s, again_s, count - sum(1 for _ in scan(cache_dir))


def _small(root: Path, count: int, runs: int) -> list[Row]:
    cache_dir = str(root / "small")
    home = Path(cache_dir, segment.FORMAT_DIRECTORY)
    store, files = SegmentStore(cache_dir), Home(cache_dir, DiskCalls(may_hang=False))
    data = os.urandom(SMALL_BYTES)
    for fan_out in range(256):
        (home / f"{fan_out:02x}").mkdir(0o700)
    numbers = range(count)

    def plain() -> None:
        for number in numbers:
            with (home / f"{number % 256:02x}" / f"plain{number}").open("wb", buffering=0) as file:
                file.write(data)

    def land() -> None:
        for number in numbers:
            key = ObjectKey(f"datum:{number}", SMALL_BYTES)
            with SegmentWriter(_segment_path(files, key, 0), key, 0, "v") as writer:
                writer.land(0, data)

    plain_rates, rates = [], []
    for nth in range(runs):
        numbers = range(nth * count, (nth + 1) * count)
        plain_rates.append(count / _timed(plain)[0])
        rates.append(count / _timed(land)[0])
    held_bytes = sum(found.bytes_on_disk for found in scan(cache_dir))
    store.close()
    rate, plain_rate = statistics.median(rates), statistics.median(plain_rates)
    return [
        ("writing files of 20 KiB", f"{plain_rate:,.0f} /s", ""),
        ("landing objects of 20 KiB", f"{rate:,.0f} /s ({rate / plain_rate:.2f})", "> 5,000 /s"),
        ("their bytes on disk", f"{held_bytes / (runs * count * SMALL_BYTES):.2f} times", "< 1.3 times"),
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
    """As the engine does: at once where it is in memory, from where it was loaded ahead, in a thread where neither;
    READS_AT_ONCE, as the kernel's own readahead on a mount asks for them."""
    obj = RemoteObject(Inode(2), key, FileRef("data", None, "stream", None, None, None, 0), "stream")
    obj.version = "v"
    handle = Handle(obj, window_bytes_max=0)

    async def read() -> None:
        store = SegmentStore(cache_dir)
        offsets = iter(range(0, key.size, READ_BYTES))

        async def reader(loads: Loads) -> None:
            for at in offsets:
                extent = Extent(at, min(at + READ_BYTES, key.size))
                plan = handle.planner.on_read(extent.start, extent.stop)
                found = store.read_nowait(key, "v", extent, lend=True)
                if found is COLD and await loads.on_cold(handle, extent, plan):
                    found = store.read_nowait(key, "v", extent, lend=True)
                if found is COLD:
                    found = await store.read(key, "v", extent)
                else:
                    loads.on_hit(handle, extent)
                    await trio.lowlevel.checkpoint()  # a reader has its bytes now
                assert not isinstance(found, NotHere)

        async with trio.open_nursery() as nursery:
            loads = Loads(store, nursery)
            for _ in range(READS_AT_ONCE):
                nursery.start_soon(reader, loads)
        store.close()

    trio.run(read)


def _segment_path(home: Home, key: ObjectKey, start: int) -> str:
    digest = segment.object_digest(key.stable_id, key.size).hex()
    path = os.path.join(home.path, segment.segment_name(digest, start // SEGMENT_BYTES))
    home.make_fan_out(os.path.dirname(path))
    return path


def _land_to_keep(home: Home, key: ObjectKey, data: bytes) -> None:
    """As `prefetch` does: into the file."""
    for start in range(0, key.size, SEGMENT_BYTES):
        with SegmentWriter(_segment_path(home, key, start), key, start // SEGMENT_BYTES, "v") as writer:
            for at in range(0, SEGMENT_BYTES, MIB):
                writer.land(start + at, data[at : at + MIB])


async def _land_behind(store: SegmentStore, key: ObjectKey, data: bytes, cached: bool) -> None:
    """As the workers do for a reader: into memory, hashed there, and from there to the file. Not `cached`: only the first."""
    landings = Landings()
    for start in range(0, key.size, SEGMENT_BYTES):
        stop = start + SEGMENT_BYTES
        async with store.landing(key, Extent(start, stop), ahead=False, staged=True) as place:
            assert place is not None, "somebody waits for it"
            with landings.open(place.staging_path, key, start // SEGMENT_BYTES, "v") as writer:
                writer.map(start, stop)
                for at in range(0, SEGMENT_BYTES, RECEIVED_BYTES):
                    room = writer.room(RECEIVED_BYTES)
                    room[:] = data[at : at + RECEIVED_BYTES]
                    if cached:
                        writer.took(room)
                        writer.vouch(start + at, start + at + RECEIVED_BYTES)
                if cached:
                    writer.copy_out(place.segment_path, key, "v", start, stop)


def _stream(root: Path, size: int, runs: int) -> list[Row]:
    cache_dir, plain = str(root / "stream"), root / "plain"
    store = SegmentStore(cache_dir)
    key, data = ObjectKey("datum:stream", size), os.urandom(SEGMENT_BYTES)

    _, prefetch_cpu_s = _timed(lambda: _land_to_keep(Home(cache_dir, DiskCalls(may_hang=False)), key, data))
    for found in scan(cache_dir):
        os.unlink(os.path.join(cache_dir, segment.FORMAT_DIRECTORY, found.name))
    trio.run(_land_behind, store, key, data, False)  # memory's first touch is nobody's
    _, copy_cpu_s = _timed(lambda: trio.run(_land_behind, store, key, data, False))
    _, land_cpu_s = _timed(lambda: trio.run(_land_behind, store, key, data, True))
    land_cpu_s -= copy_cpu_s
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
    plain_rate, ours_rate, hot_rate = (size / statistics.median(times) / 1e6 for times in (plain_s, ours_s, hot_s))
    return [
        ("landing a stream behind its readers, CPU", f"{land_cpu_s * 1024 * MIB / size:.2f} s/GiB", "< 0.35 s/GiB"),
        ("landing what is prefetched, CPU", f"{prefetch_cpu_s * 1024 * MIB / size:.2f} s/GiB", ""),
        ("a plain file from the disk", f"{plain_rate:,.0f} MB/s", ""),
        ("the cache from the disk, verified", f"{ours_rate:,.0f} MB/s ({ours_rate / plain_rate:.2f})", "> 0.7 of that"),
        ("the cache from the page cache, verified", f"{hot_rate:,.0f} MB/s", ""),
    ]


def main(argv: list[str], kept_path: Path) -> int:
    """Measures in a directory of its own and takes it away again. `kept_path` has the results of the other benches."""
    parser = argparse.ArgumentParser(prog="scripts/bench cache", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work, not how fast is it")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on the disk to measure")  # noqa: S108 - on a disk
    parser.add_argument("--write", action="store_true", help="keep the figures for the next `scripts/bench --write`")
    arguments = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="valohai-fuse-cache-", dir=arguments.dir))
    quick = arguments.quick
    if not quick:
        settle_memory()
    try:
        rows = _small(root, SMALL_QUICK if quick else SMALL, 1 if quick else 5)
        rows += _stream(root, STREAM_BYTES_QUICK if quick else STREAM_BYTES, 1 if quick else 5)
        rows += _huge(root, SEGMENTS_QUICK if quick else SEGMENTS)
        rows += _many(root, SEGMENTS_QUICK if quick else MANY)
    finally:
        shutil.rmtree(root)
    width = max(len(what) for what, _, _ in rows)
    for what, figure, promised in rows:
        sys.stdout.write(f"{what:<{width}}  {figure:>20}  {promised}\n")
    if arguments.write:
        kept = json.loads(kept_path.read_text()) if kept_path.exists() else {"workloads": {}}
        kept["cache"] = {"date": dt.datetime.now(dt.UTC).date().isoformat(), "rows": rows}
        kept_path.write_text(json.dumps(kept))
    return 0
