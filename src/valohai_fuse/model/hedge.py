"""When a request is so late that a second one for the same bytes is worth its cost, and how many of those there may be.

One `Hedging` per host. It knows the times to the first byte of the last answers on kept connections; late is what has taken
longer than the 99th percentile of them and twice the 95th. Where the 99th is itself a stall (two answers in a hundred being
late make it one), four times the 95th stands in for it: stalls must not hide stalls.

A second request costs the host what the first did, so an overloaded host must not be asked more: each request earns BUDGET of
a hedge, so that with all of them late no more than that share is asked twice, a host that throttled is left alone for
THROTTLED_PAUSE_S, and nothing is hedged before SAMPLES_MIN answers are known.

Pure: time comes in. Must not know what a request is for, or who waits for it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Final

SAMPLES_MIN: Final = 32
SAMPLES_MAX: Final = 256
"""Old enough to know a p99 from, young enough to follow a host that has become slower for good."""
LATE_MIN_S: Final = 0.05
"""What is sooner than this costs nobody anything, and processes that wait for a processor are late by as much."""
BUDGET: Final = 0.05
BURST: Final = 4.0
"""So many hedges may come at once after a time without."""
THROTTLED_PAUSE_S: Final = 30.0


class Hedging:
    """See the module's text."""

    __slots__ = ("_allowance", "_ascending", "_samples", "_throttled_until_s")

    def __init__(self) -> None:
        self._samples: deque[float] = deque()
        self._ascending: list[float] = []
        self._allowance = 1.0
        self._throttled_until_s = float("-inf")

    def sent(self) -> None:
        """A request that is no hedge was sent."""
        self._allowance = min(BURST, self._allowance + BUDGET)

    def answered(self, first_byte_s: float) -> None:
        """It was answered, on a kept connection, so long after it was on the wire."""
        if len(self._samples) == SAMPLES_MAX:
            del self._ascending[bisect_left(self._ascending, self._samples.popleft())]
        self._samples.append(first_byte_s)
        insort(self._ascending, first_byte_s)

    def throttled(self, now_s: float) -> None:
        """The host asks to be asked less."""
        self._throttled_until_s = now_s + THROTTLED_PAUSE_S

    @property
    def late_after_s(self) -> float:
        """How long without an answer is late; 0 while that is not known."""
        count = len(self._ascending)
        if count < SAMPLES_MIN:
            return 0.0
        p95_s, p99_s = self._ascending[count * 95 // 100], self._ascending[count * 99 // 100]
        return max(LATE_MIN_S, 2 * p95_s, min(1.25 * p99_s, 4 * p95_s))

    def take(self, now_s: float) -> bool:
        """Whether a late request may be sent once more now; True uses up a part of the budget."""
        if len(self._ascending) < SAMPLES_MIN or now_s < self._throttled_until_s or self._allowance < 1:
            return False
        self._allowance -= 1
        return True
