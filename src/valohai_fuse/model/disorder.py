"""Whether places that come one after the other are in any order, as far as it shows.

A reader that goes through a file makes one ascending sequence; threads that go through parts of it side by side make as many
as there are threads. Places in no order make about 2 * sqrt(n) ascending sequences, and as many descending ones (n places;
the longest monotone subsequence of a permutation, Hammersley 1972). So what needs clearly more of both than threads make, and
more the more places there were, is in no order.

Pure.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

SEQUENCES_MIN = 9
"""More than the eight threads with which libraries read one file."""
DISORDER_MIN = 1.4
"""Of 2: up to eight passes side by side never come to this, places in no order within some dozens."""
SEQUENCES_MIN_ALONE = 3
DISORDER_MIN_ALONE = 1.2
"""The same for a reader that never had two places under way, so is no threads side by side: places in no order come to this
within a dozen, which three passes taken in turns never do."""
_SEQUENCES_MAX = 64
"""Told apart, which is enough for 2,000 places; from there on one more is counted to the nearest."""


@dataclass(slots=True)
class Disorder:
    """Of the places `add`ed so far."""

    _count: int = 0
    _ascending: list[int] = field(default_factory=list)
    """The latest place of each sequence, sorted."""
    _descending: list[int] = field(default_factory=list)
    """The same of the descending ones, negated."""

    def add(self, place: int) -> None:
        """The next place."""
        self._count += 1
        _add(self._ascending, place)
        _add(self._descending, -place)

    def degree(self, sequences_min: int = SEQUENCES_MIN) -> float:
        """How many sequences the places need for the root of their number: about 2 where there is no order, 0 where there may
        well be one, which is where they need fewer than `sequences_min`."""
        sequences = min(len(self._ascending), len(self._descending))
        if sequences < sequences_min:
            return 0.0
        return 2.0 if sequences == _SEQUENCES_MAX else float(sequences / self._count**0.5)


def _add(latest: list[int], place: int) -> None:
    """To the sequence that it continues most closely; to a new one, if it continues none. The fewest sequences come of that."""
    at = bisect_right(latest, place)
    if at:
        latest[at - 1] = place
    elif len(latest) < _SEQUENCES_MAX:
        latest.insert(0, place)
    else:
        latest[0] = place
