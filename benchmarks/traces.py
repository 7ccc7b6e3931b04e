"""Traces: which reads reach a mount, in which order, and how long the program thinks in between.

One JSON object a line: `{"handle": 1, "offset": 0, "size": 4096, "think_s": 0}`, and where it matters `"file"` (handles on one
file share what was fetched; by default each has its own), `"file_bytes"` (by default the end of the furthest read) and
`"overlaps": true` (the kernel's readahead: asked for while the read before it is still under way, so two are).

A real mount is recorded by its log: at `--log-level DEBUG` the daemon writes a line for each read, and `recorded` makes a
trace of those. A reader's thinking is then the time since the answer that it had to wait for.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

KIB, MIB, GIB = 1024, 1024**2, 1024**3
_CONSUMED_BYTES_S = 3e9
"""How quickly a program takes what is there: a copy out of the page cache."""


@dataclass(frozen=True, slots=True)
class Read:
    """One request of the kernel. A handle's first read comes `think_s` after the beginning, each other one `think_s` after
    the end of the one before it, or with `overlaps` after the end of the last but one."""

    handle: int
    offset: int
    size: int
    think_s: float = 0.0
    overlaps: bool = False
    file: str = ""
    file_bytes: int = 0


Trace = list[Read]


def load(path: Path) -> Trace:
    """Reads a file of JSON lines, or a daemon's log. Raises ValueError naming the line that is neither."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    trace = recorded(lines)
    if trace:
        return trace
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                trace.append(_checked(Read(**json.loads(line))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a read: {error}") from None
    if not trace:
        raise ValueError(f"{path}: no reads in it (a log has them when the mount ran with --log-level DEBUG)")
    return trace


def dump(trace: Iterable[Read]) -> str:
    """The JSON lines of a trace."""
    return "".join(json.dumps(asdict(read)) + "\n" for read in trace)


def _checked(read: Read) -> Read:
    if not all(isinstance(value, int) for value in (read.handle, read.offset, read.size, read.file_bytes)):
        raise ValueError("handle, offset, size and file_bytes are whole numbers")
    if read.offset < 0 or read.size <= 0 or not 0 <= read.think_s < math.inf:
        raise ValueError(f"offset {read.offset}, size {read.size}, think_s {read.think_s}")
    if read.file_bytes and read.offset >= read.file_bytes:
        raise ValueError(f"offset {read.offset} lies behind the end of a file of {read.file_bytes} bytes")
    return read


_LOGGED = re.compile(
    r"DEBUG (.*)engine\.reader: read handle=(\d+) file=(\d+) offset=(\d+) size=(\d+) of=(\d+) at=([\d.]+) took=([\d.]+)$"
)
_MOUNTED = re.compile(r"INFO (.*)daemon: mounted at ")


def recorded(lines: Iterable[str]) -> Trace:
    """The reads that a log tells of, in the order in which they came; empty when it tells of none.

    A log may be of several mounts at once, each with a clock and with handles of its own, and of one mount after the other;
    then of each input its last mount counts.
    """
    found: dict[str, list[_Logged]] = {}
    for line in lines:
        if match := _LOGGED.search(line):
            subject = match[1]
            handle, file, offset, size, file_bytes = map(int, match.groups()[1:6])
            read = Read(handle, offset, size, file=f"{subject}{file}", file_bytes=file_bytes)
            found.setdefault(subject, []).append((float(match[7]), float(match[8]), read))
        elif match := _MOUNTED.search(line):
            found.pop(match[1], None)
    trace: list[tuple[float, Read]] = []
    handles: dict[tuple[str, int], int] = {}
    for subject, logged in found.items():
        for since_s, read in _timed(logged):
            number = handles.setdefault((subject, read.handle), len(handles) + 1)
            trace.append((since_s, replace(read, handle=number)))
    return [read for _, read in sorted(trace, key=lambda one: one[0])]


_Logged = tuple[float, float, Read]
"""When it began (by the daemon's own clock), how long it took, and what was read."""


def _timed(logged: list[_Logged]) -> Iterator[tuple[float, Read]]:
    """The reads of one mount in the order in which they came, with the thinking before each, and when it came, counted from
    the first."""
    logged = sorted(logged, key=lambda one: one[0])
    began_s = logged[0][0]
    ends: dict[int, list[float]] = {}
    for at_s, took_s, read in logged:
        before = ends.setdefault(read.handle, [])
        overlaps = bool(before) and at_s < before[-1]
        awaited = before[:-1] if overlaps else before
        think_s = max(0.0, at_s - max(awaited, default=began_s))
        yield at_s - began_s, replace(read, think_s=round(think_s, 6), overlaps=overlaps)
        before.append(at_s + took_s)


# --- made ones ---


def _streamed(start: int, stop: int, *, handle: int = 1, step_bytes: int = MIB) -> Iterator[Read]:
    """What a tuned kernel asks for when a program reads [start, stop) in order: 16 KiB first, then growing to 1 MiB, the next
    one always under way."""
    position, step = start, 16 * KIB
    while position < stop:
        size = min(step, stop - position)
        yield Read(handle, position, size, size / _CONSUMED_BYTES_S, overlaps=position > start)
        position += size
        step = min(2 * step, step_bytes)


def _sized(reads: Iterable[Read], file_bytes: int) -> Trace:
    """The same reads, each of a file of `file_bytes`."""
    return [replace(read, file_bytes=file_bytes) for read in reads]


def _pieces(starts: Iterable[int], piece_bytes: int) -> Iterator[Read]:
    """Reads by a program that seeks: each of its reads reaches us in pieces of 1 MiB at the most, one after the other."""
    for start in starts:
        for at in range(start, start + piece_bytes, MIB):
            yield Read(1, at, min(MIB, start + piece_bytes - at))


def _random(piece_bytes: int) -> Trace:
    dice = random.Random(1)
    return _sized((Read(1, dice.randrange(512 * MIB // 4096) * 4096, piece_bytes) for _ in range(2000)), 512 * MIB)


def _mapped() -> Trace:
    """A mapping that is walked in order: faults ask for 1 MiB around them, and neighbours come the wrong way round."""
    reads = list(_streamed(0, 256 * MIB))
    for first in range(8, len(reads) - 1, 2):
        reads[first], reads[first + 1] = reads[first + 1], reads[first]
    return _sized(reads, 256 * MIB)


def _interleaved() -> Trace:
    """One descriptor, four threads, each with a part of the file of its own."""
    parts = [list(_pieces([part * 256 * MIB], 64 * MIB)) for part in range(4)]
    return _sized((read for together in zip(*parts, strict=True) for read in together), GIB)


def _column_scan() -> Trace:
    """Parquet: the footer, then of each row group (24 MiB, about) the chunk of one column (1 MiB, about)."""
    dice = random.Random(2)
    footer = [Read(1, GIB - 64 * KIB, 64 * KIB)]
    starts = [group * 24 * MIB + 7 * MIB + dice.randrange(512) * 4 * KIB for group in range(42)]
    return _sized((*footer, *_pieces(starts, MIB + 128 * KIB)), GIB)


def _members(size: int) -> Trace:
    """An archive's directory at the end, then members of 20 to 500 KiB in shuffled order."""
    dice = random.Random(3)
    reads = [Read(1, size - MIB, 64 * KIB), Read(1, size - MIB + 64 * KIB, MIB - 64 * KIB)]
    starts = [member * 512 * KIB for member in range(size // (512 * KIB) - 12)]
    dice.shuffle(starts)
    for start in starts[:500]:
        reads += [Read(1, start, 16 * KIB), Read(1, start + 16 * KIB, dice.randrange(1, 120) * 4 * KIB)]
    return _sized(reads, size)


def _files(count: int) -> Trace:
    return [read for handle in range(1, count + 1) for read in _streamed(0, 256 * MIB, handle=handle)]


MADE: Mapping[str, tuple[str, Callable[[], Trace]]] = {
    "sequential": ("1 GiB in order", lambda: list(_streamed(0, GIB))),
    "files-4": ("four files of 256 MiB in order, at once", lambda: _files(4)),
    "head": ("the first 4 KiB of 1 GiB", lambda: [Read(1, 0, 16 * KIB, file_bytes=GIB)]),
    "stopping": ("the first 16 MiB of 1 GiB", lambda: _sized(_streamed(0, 16 * MIB), GIB)),
    "random-4k": ("2,000 times 4 KiB anywhere in 512 MiB", lambda: _random(4 * KIB)),
    "random-128k": ("the same with 128 KiB", lambda: _random(128 * KIB)),
    "strided": ("128 KiB of every 4 MiB", lambda: _sized(_pieces(range(0, GIB, 4 * MIB), 128 * KIB), GIB)),
    "backwards": ("512 MiB in steps of 1 MiB, last first", lambda: list(_pieces(range(511 * MIB, -1, -MIB), MIB))),
    "skip-17m": ("1 MiB of every 17 MiB", lambda: _sized(_pieces(range(0, GIB - MIB, 17 * MIB), MIB), GIB)),
    "mmap": ("256 MiB mapped, in order, neighbours swapped", _mapped),
    "interleaved": ("four streams of 64 MiB in turn through one handle", _interleaved),
    "column-scan": ("a parquet column: 1 MiB of each 24 MiB, about", _column_scan),
    "zip": ("members of a zip of 256 MiB in shuffled order", lambda: _members(256 * MIB)),
    "archive": ("the same, 500 of 100 GiB", lambda: _members(100 * GIB)),
}
"""Name -> (what it is, how it is made). The same each time."""
