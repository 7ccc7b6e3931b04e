"""How much to ask for in one request, by how fast a store sends on one connection.

An object store sends 50 to 100 MB/s on a connection, however idle the line is. Then the number of connections decides the rate of
a stream, and the same window in pieces of half the size takes twice as many: with 80 MB/s per connection a stream ran at 1,054
MB/s in pieces of PIECE_BYTES and at 714 in whole segments. Where a connection carries more, each further request only costs
processor time: 1,028 against 1,164 MB/s. (Medians of 3 and 4, each pair in one run.)

So requests are small while connections are slow, or nothing is known of them: slow for themselves, for where many of them are
slow and few are not, they share a line, and more of them would bring nothing.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from valohai_fuse.model.extents import Extent, split, split_by_segment

PIECE_BYTES: Final = 4 * 1024 * 1024
"""The most in one request while connections are slow. Divides a segment."""
MEASURED_BYTES_MIN: Final = PIECE_BYTES
"""What is shorter comes out of buffers on the way: 2 MiB at 466 MB/s from a store that sends 80."""
FAST_BYTES_S: Final = 300e6
FEW, MANY = 4, 8
"""Requests under way: up to FEW they hardly share a line, from MANY on they do if it is narrow."""
SHARED_SHARE: Final = 0.5
"""Many that are slower than this share of what few are share a line."""


class _Mean:
    """Of the latest rates, by their logarithms: an answer that came out of a buffer in no time counts as one, not as ten."""

    __slots__ = ("_log",)

    def __init__(self) -> None:
        self._log: float | None = None

    def add(self, rate: float) -> None:
        log = math.log(rate)
        self._log = log if self._log is None else self._log + (log - self._log) / 8

    @property
    def value(self) -> float | None:
        return None if self._log is None else math.exp(self._log)


class Pace:
    """What the connections of one mount can do."""

    __slots__ = ("_few", "_many")

    def __init__(self) -> None:
        self._few = _Mean()
        self._many = _Mean()

    def note(self, byte_count: int, took_s: float, under_way: int) -> None:
        """So many bytes have come, from the first to the last within `took_s`, while so many requests were under way."""
        if byte_count >= MEASURED_BYTES_MIN:
            rate = byte_count / max(took_s, 1e-6)
            if under_way <= FEW:
                self._few.add(rate)
            elif under_way >= MANY:
                self._many.add(rate)

    def requests(self, wanted: Extent) -> Iterator[Extent]:
        """What to ask for in one request each, in ascending order; none reaches beyond a segment."""
        return split(wanted, PIECE_BYTES) if self._is_slow else split_by_segment(wanted)

    @property
    def _is_slow(self) -> bool:
        few, many = self._few.value, self._many.value
        if few is None or many is None:
            known = few or many
            return known is None or known < FAST_BYTES_S
        return many < FAST_BYTES_S and many >= SHARED_SHARE * few
