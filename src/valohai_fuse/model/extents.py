"""Byte ranges, blocks and segments: the arithmetic that every room shares.

An object is a sequence of bytes; a *block* (64 KiB) is what is fetched, verified and present or not; a *segment* (8 MiB)
is one file of the cache and the most that a single request asks for. All ranges are half-open, `start <= stop`, in bytes
unless a name says blocks.

Why 64 KiB: a random 4 KiB read then costs one block (the promise is 256 KiB at most), while xxh3 over a block costs about
2.5 us, so each read can verify what it returns instead of remembering what was verified once. Why 8 MiB: large enough
that a round trip of 20 ms hides behind the transfer of its neighbours, small enough to evict a part of a large file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_BYTES = 64 * 1024
SEGMENT_BYTES = 8 * 1024 * 1024
SEGMENT_BLOCKS = SEGMENT_BYTES // BLOCK_BYTES


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """The bytes [start, stop) of an object."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not an extent: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Extent) -> bool:
        """Whether at least one byte is in both."""
        return self.start < other.stop and other.start < self.stop


def block_floor(offset: int) -> int:
    """The start of the block that holds byte `offset`."""
    return offset - offset % BLOCK_BYTES


def block_ceil(offset: int, size: int) -> int:
    """The first block boundary at or after `offset`, but never beyond the object's `size`."""
    return min(-(-offset // BLOCK_BYTES) * BLOCK_BYTES, size)


def align(start: int, stop: int, size: int) -> Extent:
    """The whole blocks that cover [start, stop) of an object of `size` bytes; the last block may be short."""
    return Extent(block_floor(start), max(block_floor(start), block_ceil(stop, size)))


def split_by_segment(extent: Extent) -> Iterator[Extent]:
    """The parts of `extent` that lie within one segment each, in ascending order."""
    return split(extent, SEGMENT_BYTES)


def split(extent: Extent, grid_bytes: int) -> Iterator[Extent]:
    """The parts of `extent` between the multiples of `grid_bytes`, in ascending order."""
    start = extent.start
    while start < extent.stop:
        stop = min((start // grid_bytes + 1) * grid_bytes, extent.stop)
        yield Extent(start, stop)
        start = stop
