"""What to throw away: how many bytes must go, and which segments they are, least recently used first.

Pure: the evictor scans and deletes, this decides. Memory stays proportional to what goes, not to what is there: a cache of
a million files is offered file by file, and only the oldest that together cover the excess are kept in mind.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

SLACK_SHARE = 0.01
"""Evicting goes that much below the bound, so that the next landing does not call for the next scan at once."""


SLACK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The bounds of a cache directory; 0 means no bound."""

    bytes_max: int = 0
    """Bytes on disk of all segments together."""
    free_min_bytes: int = 0
    """What must stay free on the file system."""
    free_min_share: float = 0.0
    """The same as a share (0.0-1.0) of the file system; the larger of the two counts."""

    @property
    def slack_bytes(self) -> int:
        """How far below the bound room is kept free where it is taken in advance, so that nobody waits for a scan.

        At most an eighth of a small cache, at least a percent of a huge one.
        """
        if not self.bytes_max:
            return SLACK_BYTES
        return max(int(self.bytes_max * SLACK_SHARE), min(SLACK_BYTES, self.bytes_max // 8))

    def free_wanted_bytes(self, capacity_bytes: int) -> int:
        """What must stay free on a file system of that size."""
        return max(self.free_min_bytes, int(self.free_min_share * capacity_bytes))

    def lacking_bytes(self, free_bytes: int, capacity_bytes: int) -> int:
        """How many bytes must become free on a file system, slack included; 0 when enough is free."""
        wanted = self.free_wanted_bytes(capacity_bytes)
        return int((wanted - free_bytes) + wanted * SLACK_SHARE) if free_bytes < wanted else 0

    def excess_bytes(self, cached_bytes: int, free_bytes: int, capacity_bytes: int) -> int:
        """How many of `cached_bytes` must go, slack included; 0 when all is within bounds."""
        excess = 0
        if self.bytes_max and cached_bytes > self.bytes_max:
            excess = int(cached_bytes - self.bytes_max + self.bytes_max * SLACK_SHARE)
        return min(cached_bytes, max(excess, self.lacking_bytes(free_bytes, capacity_bytes)))

    def pressing_bytes(self, used_bytes: int, free_bytes: int, capacity_bytes: int) -> int:
        """The same where room is taken in advance: `used_bytes` and `free_bytes` count what is taken as used.

        Begins when half of the slack is used up, and frees until all of it is there again.
        """
        excess = 0
        if self.bytes_max and used_bytes > self.bytes_max - self.slack_bytes // 2:
            excess = used_bytes - (self.bytes_max - self.slack_bytes)
        if self.free_min_bytes or self.free_min_share:
            spare = free_bytes - self.free_wanted_bytes(capacity_bytes)
            if spare < self.slack_bytes // 2:
                excess = max(excess, self.slack_bytes - spare)
        return excess


class Segment(NamedTuple):
    """A file that could go; orders by age, the oldest first. A tuple, for a scan makes a million of them."""

    used_at_ns: int
    name: str
    bytes_on_disk: int
    length: int = 0
    """Bytes of the file, holes included."""


class Oldest:
    """The fewest least recently used segments, of all that were offered, that free at least `wanted_bytes`."""

    def __init__(self, wanted_bytes: int) -> None:
        self._wanted_bytes = wanted_bytes
        self._held_bytes = 0
        self._newest_first: list[tuple[int, int, Segment]] = []
        self._offered = 0

    def offer(self, candidate: Segment) -> None:
        """Takes one into account. Amortised O(log of those kept)."""
        if candidate.bytes_on_disk <= 0:
            return
        heap = self._newest_first
        if self._held_bytes >= self._wanted_bytes and (not heap or candidate.used_at_ns >= -heap[0][0]):
            return
        self._offered += 1
        heapq.heappush(heap, (-candidate.used_at_ns, self._offered, candidate))
        self._held_bytes += candidate.bytes_on_disk
        while heap and self._held_bytes - heap[0][2].bytes_on_disk >= self._wanted_bytes:
            self._held_bytes -= heapq.heappop(heap)[2].bytes_on_disk

    def chosen(self) -> list[Segment]:
        """Oldest first."""
        return sorted(segment for _, _, segment in self._newest_first)
