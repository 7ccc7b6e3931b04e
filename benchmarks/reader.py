"""Reads files in one pattern and says how that went: a process of its own, started as a script with a task on stdin.

Its CPU is its own and is kept apart from the mount's. It imports nothing of the project and, but for tables, only the standard
library, and it checks a sample of what each read returned against the ramp of `dataset`: a benchmark that reads wrong bytes fails.

Task (JSON): {"pattern", "files": [[path, size, phase | null], ...], "threads", "batch", "block_bytes",
"count", "step_bytes", "seed"}.
Answer (JSON): {"elapsed_s", "bytes", "files", "cpu_s", "latencies_s": [...]}, latencies per read or per file.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

File = tuple[str, int, int | None]
Task = dict[str, Any]
_CHECKED_BYTES = 8
_TABLE_COLUMN = 2


class WrongBytesError(Exception):
    """What was read is not what is in the store."""


def check(data: memoryview | bytes, offset: int, wanted: int, file: File) -> None:
    """Length, and the first and last bytes. Raises WrongBytesError."""
    path, size, phase = file
    if len(data) != min(wanted, size - offset):
        raise WrongBytesError(f"{path}: {len(data)} bytes at {offset} instead of {min(wanted, size - offset)}")
    if phase is None or not data:
        return
    for start in (0, max(0, len(data) - _CHECKED_BYTES)):
        got = bytes(data[start : start + _CHECKED_BYTES])
        if got != bytes((offset + start + i + phase) % 251 for i in range(len(got))):
            raise WrongBytesError(f"{path}: wrong bytes at {offset + start}")


class Lane:
    """What one thread reads and what it found."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.files = 0
        self.latencies_s: list[float] = []
        self.error: BaseException | None = None

    def offsets(self, file: File, offsets: Iterator[int], block_bytes: int) -> None:
        """One pread per offset on one descriptor; the opening counts into the first."""
        buffer = memoryview(bytearray(block_bytes))
        began_s = time.perf_counter()
        fd = os.open(file[0], os.O_RDONLY)
        try:
            for offset in offsets:
                got = os.preadv(fd, [buffer], offset)
                ended_s = time.perf_counter()
                self.latencies_s.append(ended_s - began_s)
                check(buffer[:got], offset, block_bytes, file)
                self.bytes_read += got
                began_s = time.perf_counter()
        finally:
            os.close(fd)
        self.files += 1

    def records(self, file: File, offsets: Iterator[int], block_bytes: int) -> None:
        """Seek and read of one buffered file, as indexes into text are used."""
        with open(file[0], "rb") as records:
            for offset in offsets:
                began_s = time.perf_counter()
                records.seek(offset)
                data = records.read(block_bytes)
                self.latencies_s.append(time.perf_counter() - began_s)
                check(data, offset, block_bytes, file)
                self.bytes_read += len(data)
        self.files += 1

    def whole(self, file: File, block_bytes: int) -> None:
        """Open, read to the end, close: one latency for the file."""
        buffer = memoryview(bytearray(min(block_bytes, file[1] + 1)))
        began_s = time.perf_counter()
        fd = os.open(file[0], os.O_RDONLY)
        try:
            offset = 0
            while got := os.preadv(fd, [buffer], offset):
                check(buffer[:got], offset, len(buffer), file)
                offset += got
        finally:
            os.close(fd)
        self.latencies_s.append(time.perf_counter() - began_s)
        if offset != file[1]:
            raise WrongBytesError(f"{file[0]}: ends at {offset} instead of {file[1]}")
        self.bytes_read += offset
        self.files += 1

    def mapped(self, file: File, offsets: Iterator[int], block_bytes: int) -> None:
        """Copies blocks out of a mapping; each touches pages that may have to be fetched."""
        fd = os.open(file[0], os.O_RDONLY)
        try:
            with mmap.mmap(fd, file[1], prot=mmap.PROT_READ) as pages:
                for offset in offsets:
                    began_s = time.perf_counter()
                    data = pages[offset : offset + block_bytes]
                    self.latencies_s.append(time.perf_counter() - began_s)
                    check(data, offset, block_bytes, file)
                    self.bytes_read += len(data)
        finally:
            os.close(fd)
        self.files += 1


def offsets_of(pattern: str, size: int, task: Task, lane: int) -> Iterator[int]:
    """The offsets that a pattern reads, in order; `lane` tells threads of one task apart."""
    block = task["block_bytes"]
    step = task.get("step_bytes") or block
    match pattern:
        case "forward":
            yield from range(0, size, step)
        case "backward":
            yield from range((size - 1) // block * block, -1, -block)
        case "random":
            chooser = random.Random(task["seed"] * 1000 + lane)
            for _ in range(task["count"] // task["threads"]):
                yield chooser.randrange(max(1, size // block)) * block
        case _:
            raise ValueError(f"no such order: {pattern}")


def _limited(offsets: Iterator[int], count: int) -> Iterator[int]:
    for number, offset in enumerate(offsets):
        if count and number >= count:
            return
        yield offset


def _zip_members(lane: Lane, file: File, task: Task) -> None:
    with zipfile.ZipFile(file[0]) as archive:
        names = archive.namelist()
        random.Random(task["seed"]).shuffle(names)
        for name in names:
            began_s = time.perf_counter()
            lane.bytes_read += len(archive.read(name))  # zipfile checks the CRC
            lane.latencies_s.append(time.perf_counter() - began_s)
            lane.files += 1


_LISTINGS = {"find": ["find", "-type", "f", "-ls"], "ls": ["ls", "-lR"]}


def _list(lane: Lane, directory: File, pattern: str) -> None:
    program, *options = _LISTINGS[pattern]
    paths_first = pattern == "find"
    command = [program, directory[0], *options] if paths_first else [program, *options, directory[0]]
    with tempfile.TemporaryFile() as listing:
        subprocess.run(command, stdout=listing, check=True)
        listing.seek(0)
        lane.files = sum(paths_first or line.startswith(b"-") for line in listing)
    if lane.files != directory[1]:
        raise WrongBytesError(f"{directory[0]}: {lane.files} files instead of {directory[1]}")


def _parquet_column(lane: Lane, file: File) -> None:
    """All of the third column, or of the last, as pyarrow's datasets read it."""
    parquet = importlib.import_module("pyarrow.parquet")  # has been imported before the clock started
    began_s = time.perf_counter()
    with parquet.ParquetFile(file[0], pre_buffer=True) as table:
        name = table.schema_arrow.names[:3][-1]
        column = table.read(columns=[name]).column(name)
    lane.latencies_s.append(time.perf_counter() - began_s)
    ours = name == f"column_{_TABLE_COLUMN}"
    if ours and (column[0].as_py(), column[-1].as_py()) != (
        _TABLE_COLUMN << 40,
        (_TABLE_COLUMN << 40) + len(column) - 1,
    ):
        raise WrongBytesError(f"{file[0]}: wrong values in {name}")
    lane.bytes_read += column.nbytes
    lane.files += 1


def share_of(files: list[File], task: Task, number: int) -> Iterator[File]:
    """What one of several readers takes: batch after batch in turn."""
    batch, threads = task["batch"], task["threads"]
    for start in range(number * batch, len(files), threads * batch):
        yield from files[start : start + batch]


def _lane_work(task: Task, number: int, lane: Lane) -> None:
    pattern, block = task["pattern"], task["block_bytes"]
    files: list[File] = [tuple(f) for f in task["files"]]
    if pattern in _LISTINGS:
        _list(lane, files[0], pattern)
    elif pattern == "parquet":
        _parquet_column(lane, files[0])
    elif pattern == "records":
        lane.records(files[0], offsets_of("random", files[0][1], task, number), block)
    elif pattern == "zip":
        _zip_members(lane, files[0], task)
    elif pattern == "whole":
        for file in share_of(files, task, number):
            lane.whole(file, block)
    elif pattern == "first":
        for file in share_of(files, task, number):
            lane.offsets(file, iter([0]), block)
    elif pattern.startswith("mmap-"):
        lane.mapped(files[0], offsets_of(pattern.removeprefix("mmap-"), files[0][1], task, number), block)
    else:
        file = files[number % len(files)]
        count = task["count"] if pattern != "random" else 0
        lane.offsets(file, _limited(offsets_of(pattern, file[1], task, number), count), block)


def perform(task: Task) -> dict[str, Any]:
    """Runs the task on as many threads as it names. Raises what the first failing thread raised."""
    if task["pattern"] == "parquet":
        importlib.import_module("pyarrow.parquet")
    threads = task["threads"]
    lanes = [Lane() for _ in range(threads)]
    barrier = threading.Barrier(threads + 1)

    def run(number: int, work: Callable[[Task, int, Lane], None]) -> None:
        barrier.wait()
        try:
            work(task, number, lanes[number])
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, raised there
            lanes[number].error = error

    if task.get("primed"):  # the first file only warms a connection
        primer = Lane()
        primer.offsets(tuple(task["files"].pop(0)), iter([0]), task["block_bytes"])
    workers = [threading.Thread(target=run, args=(n, _lane_work)) for n in range(threads)]
    for worker in workers:
        worker.start()
    before = _cpu_s()
    barrier.wait()
    began_s = time.perf_counter()
    for worker in workers:
        worker.join()
    elapsed_s = time.perf_counter() - began_s
    for lane in lanes:
        if lane.error is not None:
            raise lane.error
    return {
        "elapsed_s": elapsed_s,
        "bytes": sum(lane.bytes_read for lane in lanes),
        "files": sum(lane.files for lane in lanes),
        "cpu_s": _cpu_s() - before,
        "latencies_s": [latency for lane in lanes for latency in lane.latencies_s],
    }


def _cpu_s() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    json.dump(perform(json.load(sys.stdin)), sys.stdout)
