"""Counters and gauges of one daemon: every name, once, with what it means.

Not thread-safe on purpose: counted on the trio thread only, a dictionary addition each. Counting never raises, whatever the
name (a metric must not be able to fail a read); a test checks that every name used in the source stands in the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COUNTERS: Final[Mapping[str, str]] = {
    "lookups": "Names looked up by the kernel.",
    "opens": "Files opened.",
    "reads": "Read requests of the kernel.",
    "read_bytes": "Bytes handed to readers.",
    "read_errors": "Reads that ended with an errno.",
    "hit_bytes": "Bytes read that were in the cache already.",
    "miss_bytes": "Bytes read that had to be waited for.",
    "fetches": "Ranged requests sent to stores.",
    "fetched_bytes": "Bytes fetched from stores.",
    "fetch_hedges": "Requests that a store was sent because it was late with another for the same bytes; part of the fetches.",
    "fetch_hedges_won": "Those of them that brought the bytes first.",
    "fetch_hedge_bytes": "Bytes fetched twice because of them.",
    "fetch_retries": "Fetches that failed and were repeated.",
    "fetch_failures": "Fetches given up.",
    "fetch_first_byte_seconds": "Sum of the times to the first byte, over the fetches that ended well.",
    "ahead_bytes": "Bytes ordered ahead of readers.",
    "filled_bytes": "Bytes fetched in the background to complete files that are read at random.",
    "connections_opened": "Connections to stores that were opened for a fetch.",
    "workers_started": "Fetch processes started.",
    "workers_lost": "Fetch processes that died.",
    "probes": "Sizes asked of a store.",
    "renewals": "Sets of signed URLs received.",
    "renewal_failures": "Renewals that failed.",
    "urls_refused": "Signed URLs that a store refused.",
    "blocks_corrupt": "Cached blocks that failed their verification and were fetched again.",
    "cache_errors": "Errors of the cache's disk: what it would not write or read.",
    "requests_overdue": "Requests of the kernel that outlived their deadline.",
    "loop_stalls": "Passes of the event loop that took longer than 0.25 s.",
    "handler_errors": "Unexpected exceptions that the guard turned into EIO.",
}
GAUGES: Final[Mapping[str, str]] = {
    "open_files": "Files open now.",
    "reads_under_way": "Reads that are being waited for.",
    "requests_under_way": "Requests of the kernel that are being answered.",
    "loop_stall_seconds_max": "The longest of the stalls.",
    "flights": "Runs of blocks being fetched.",
    "flights_ahead": "Those of them that no reader waits for.",
    "tasks": "Tasks of the daemon's event loop.",
    "workers": "Fetch processes running.",
    "hot_bytes": "Memory that segments take which are not only on the disk, when they are full.",
    "clock_skew_seconds": "How far this machine's clock is ahead of the store's.",
}


class Counts:
    """Implements `ports.Metrics`."""

    __slots__ = ("_counters", "_gauges")

    def __init__(self) -> None:
        self._counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._gauges: dict[str, float] = dict.fromkeys(GAUGES, 0)

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter."""
        self._counters[name] = self._counters.get(name, 0) + amount

    def gauge(self, name: str, value: float) -> None:
        """Sets a gauge."""
        self._gauges[name] = value

    def snapshot(self) -> dict[str, float]:
        """All values now, counters and gauges in one flat dictionary; a copy."""
        return self._counters | self._gauges


def hit_rate(snapshot: Mapping[str, float]) -> float | None:
    """The share of the bytes read that needed no fetch, 0 to 1; None while nothing was read."""
    hit, miss = snapshot.get("hit_bytes", 0), snapshot.get("miss_bytes", 0)
    return hit / (hit + miss) if hit + miss else None
