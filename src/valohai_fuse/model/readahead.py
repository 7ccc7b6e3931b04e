"""What to fetch when something reads: how much for the read itself, and how far ahead of it.

The governing trade-off: a sequential reader wants many bytes under way long before it asks (a round trip of 20 ms at
500 MB/s is 10 MB), a random reader wants not one byte more than it asked for, and both look alike on their first read.
So trust is earned: a stream's window is a multiple of what was read in sequence so far. The one guess is that a read at
offset 0 begins a sequence; it costs 1 MiB at the most.

Life of a stream: a read near the cursor of a known stream belongs to it (the kernel's own readahead may arrive out of
order, and a short skip keeps what is in flight); any other read begins a new stream and forgets the least recently used
one. A window is refilled when a whole segment fits into it (a small one when it is half empty), in parts that end on segment
boundaries: extending it on every read was measured at 232 GETs for 256 MiB, so at 35. Refilling large windows when they were
half empty let requests come in bursts: where a connection gives 80 MB/s, a window of 64 MiB made 408 MB/s, now 503.

Pure: the same reads in, the same plans out. Ahead never overlaps demand, never leaves the file, never exceeds the window.
Knows nothing of what is cached or in flight; the engine subtracts that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent, align
from valohai_fuse.model.stride import Stride

FIRST_READ_BYTES = 1024 * 1024
"""Fetched upon a first read at offset 0: `head -c 4096` must cost at most 1.25 MiB."""

RANDOM_READ_BYTES = 128 * 1024
"""The least that a read anywhere else fetches (two blocks): half of the 256 KiB that a random read may cost."""

RECORDS_SEEN = 5
RECORD_BYTES_MAX = 2 * 1024 * 1024
"""Who reads at new places reads as much at each as at the places before it: a header and then what that says the length of, or a
chunk. So each such read fetches as much as the second largest of the last RECORDS_SEEN had, up to this: what comes behind the
header costs no round trip. And whoever does not read on from there is no stream, ahead of which one might fetch."""

TRUSTED_RUN_BYTES = 192 * 1024
"""Read in sequence before anything is fetched ahead: two full requests of an untuned kernel, and more than the one that a buffered
file makes for a record (33 pages)."""

WINDOW_BYTES_MIN = 1024 * 1024
WINDOW_GROWTH = 2
"""The window is this many times what was read in sequence: a stream that stops costs at most twice as much again, and five
round trips until the window hides one have become three."""

REORDER_BYTES = 2 * 1024 * 1024
"""How far behind the cursor a late piece of the kernel's readahead may lie (two of its 1 MiB windows)."""

SKIP_BYTES_MAX = 1024 * 1024
"""A forward jump of up to this stays in its stream even when nothing is planned there."""

STREAMS_MAX = 8
"""Streams told apart on one handle: interleaved readers on one descriptor, an mmap read by several threads."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Whole blocks: `demand` covers the read and is waited for; `ahead` follows it (possibly empty) and is not, nor are the
    pieces of `elsewhere`, where a reader that jumps regularly will read next.

    `run_bytes`: read in order up to here, of the stream that the read belongs to. `is_scattered`: it continues nothing, nor is
    it where anything begins."""

    demand: Extent
    ahead: Extent
    elsewhere: tuple[Extent, ...] = ()
    run_bytes: int = 0
    is_scattered: bool = False


@dataclass(slots=True)
class _Stream:
    start: int
    cursor: int  # the end of what was read: where the next sequential read begins
    run_bytes: int  # read in sequence so far: the trust it has earned
    planned: int  # everything below is demanded or planned
    used: int  # tick of the last read, for forgetting the oldest
    is_scattered: bool  # it continues nothing
    stop_expected: int | None = None  # where the pieces of a stride end, or records; passed, it is forgotten


class Planner:
    """The streams of one open file. `size` and `window_bytes_max` in bytes; 0 as window turns looking ahead off."""

    __slots__ = ("_latest", "_records", "_size", "_streams", "_stride", "_tick", "window_bytes_max")

    def __init__(self, size: int, window_bytes_max: int) -> None:
        self._size = size
        self._streams: list[_Stream] = []
        self._stride = Stride(size)
        self._latest: _Stream | None = None
        self._records: deque[int] = deque(maxlen=RECORDS_SEEN)
        """How much was read at each of the latest scattered places."""
        self._tick = 0
        self.window_bytes_max = window_bytes_max

    def on_read(self, start: int, stop: int) -> Plan:
        """The plan for a read of [start, stop), which lies within the file."""
        self._tick += 1
        stream = self._match(start)
        if stream is None:
            return self._begin(start, stop)
        if stop > stream.cursor:
            stream.run_bytes += stop - max(start, stream.cursor)
            stream.cursor = stop
        stream.used = self._tick
        demand = align(start, stop, self._size)
        return Plan(demand, self._refill(stream, demand), run_bytes=stream.run_bytes)

    def _match(self, start: int) -> _Stream | None:
        best: _Stream | None = None
        for stream in self._streams:
            trusted = stream.run_bytes >= TRUSTED_RUN_BYTES
            behind = min(REORDER_BYTES, stream.run_bytes)
            reach = max(stream.planned - stream.cursor, SKIP_BYTES_MAX) if trusted else 0
            near = stream.cursor - behind <= start <= stream.cursor + reach
            if near and (best is None or abs(stream.cursor - start) < abs(best.cursor - start)):
                best = stream
        return best

    def _begin(self, start: int, stop: int) -> Plan:
        if len(self._streams) >= STREAMS_MAX:
            self._streams.remove(min(self._streams, key=lambda stream: stream.used))
        demand = align(start, stop, self._size)
        before = 0 if self._latest is None else self._latest.cursor - self._latest.start
        if self._latest is not None and self._latest.is_scattered:
            self._records.append(min(before, RECORD_BYTES_MAX))
        if start == 0:
            wanted = min(FIRST_READ_BYTES, self._size)
            whole = Extent(0, max(demand.stop, min(wanted, max(self.window_bytes_max, RANDOM_READ_BYTES))))
        else:
            whole = align(demand.start, max(demand.stop, self._record_stop(demand.start, start)), self._size)
        whole = Extent(whole.start, min(whole.stop, self._size))
        pieces = self._stride.on_jump(start, before, self.window_bytes_max)
        is_scattered = start > 0 and not self._stride.believed
        self._latest = stream = _Stream(start, stop, stop - start, whole.stop, self._tick, is_scattered)
        self._streams.append(stream)
        if self._stride.believed:
            stream.stop_expected = start + self._stride.piece_bytes
        elif is_scattered and len(self._records) == RECORDS_SEEN:
            stream.stop_expected = whole.stop
        elsewhere = tuple(align(piece.start, piece.stop, self._size) for piece in pieces)
        return Plan(demand, Extent(demand.stop, whole.stop), elsewhere, stop - start, is_scattered)

    def _record_stop(self, block_start: int, start: int) -> int:
        """Up to where a read at a new place fetches, `start` lying in the block that begins at `block_start`."""
        least = block_start + RANDOM_READ_BYTES
        if len(self._records) < RECORDS_SEEN:
            return least
        within_window = self.window_bytes_max - BLOCK_BYTES  # for it is rounded up to whole blocks
        return max(least, start + min(sorted(self._records)[-2], within_window))

    def _refill(self, stream: _Stream, demand: Extent) -> Extent:
        planned = max(stream.planned, demand.stop)
        stream.planned = planned
        nothing = Extent(demand.stop, demand.stop)
        if stream.run_bytes < TRUSTED_RUN_BYTES or self.window_bytes_max <= 0:
            return nothing
        window = min(self.window_bytes_max, max(WINDOW_BYTES_MIN, WINDOW_GROWTH * stream.run_bytes))
        if planned - stream.cursor > max(window // 2, window - SEGMENT_BYTES) or planned >= self._size:
            return nothing
        target = min(stream.cursor + window, self._size)
        if stream.stop_expected is not None:
            if stream.cursor <= stream.stop_expected:
                return nothing  # a piece of a stride, planned when the stride was, or a record that was fetched at once
            stream.stop_expected = None
        if target < self._size:
            boundary = target - target % SEGMENT_BYTES
            worth_it = boundary > planned + min(window // 4, SEGMENT_BYTES // 2)
            target = boundary if worth_it else align(planned, target, self._size).stop
            target = min(target, stream.cursor + window)
            target -= target % (64 * 1024)
        if target <= planned:
            return nothing
        stream.planned = target
        return Extent(planned, target)
