"""Which files come next when files are opened one after the other: so that small ones are there before they are asked for.

A data loader opens thousands of small files; each costs a round trip unless the next ones are fetched meanwhile. This mount
knows all names in advance, so it only has to recognise the *order*: that of the listing, that of the sorted names, or that
of the numbers in the names, each from its beginning or from its end. Each candidate order keeps a head (the furthest open that
fitted) and a run (how many fitted in a row). The order with the longest run is believed, and as little as its run deserves: 4
files after the second fit, doubling.

One open that fits no order ends all belief at once. Where there is none to believe in, `model.shuffle` looks whether all files
are opened, in no order. Several
readers that share the work open slightly out of order: an open just ahead of the head fits, one just behind it is neutral.

Pure; positions are indices into the directory's listing. Knows nothing of sizes, caches or flights.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

from valohai_fuse.model.shuffle import Shuffle

FITS_BEFORE_BELIEF = 2
WINDOW_FILES_MIN = 4
WINDOW_FILES_MAX = 128
REACH_FILES = 12
"""How far ahead of the head an open may be and still fit: that many readers may share one listing."""

SORTED_FILES_MAX = 300_000
"""Directories with more files are followed in the order of the listing only, either way: sorting them would stall the loop."""

_DIGITS = re.compile(rb"(\d+)")


class _Order:
    """One candidate: `ranks[position]` and its inverse (None: the identity), counted from the end where `last` is the last rank,
    and how well it has fitted."""

    __slots__ = ("head", "inverse", "last", "planned", "ranks", "run")

    def __init__(self, positions: Sequence[int] | None) -> None:
        self.inverse: Sequence[int] | None = positions
        self.last: int | None = None
        self.ranks: Sequence[int] | None = None
        if positions is not None:
            ranks = array("I", bytes(4 * len(positions)))
            for rank, position in enumerate(positions):
                ranks[position] = rank
            self.ranks = ranks
        self.head = -REACH_FILES - 1
        self.planned = 0
        self.run = 0

    def backwards(self, count: int) -> _Order:
        """The same from the end, with what it knows of the names."""
        order = _Order(None)
        order.inverse, order.ranks, order.last = self.inverse, self.ranks, count - 1
        return order

    def observe(self, position: int) -> None:
        rank = position if self.ranks is None else self.ranks[position]
        if self.last is not None:
            rank = self.last - rank
        ahead = rank - self.head
        if 0 < ahead <= REACH_FILES:
            self.run += 1
            self.head = rank
        elif not -REACH_FILES <= ahead <= 0:
            self.run = 0
            self.head = self.planned = rank

    def window(self) -> int:
        return min(WINDOW_FILES_MAX, WINDOW_FILES_MIN << min(self.run - FITS_BEFORE_BELIEF, 10))

    def next(self, count: int) -> list[int]:
        window = self.window()
        self.planned = max(self.planned, self.head)
        if self.planned - self.head > window // 2:
            return []
        start, stop = self.planned + 1, min(self.head + window + 1, count)
        if start >= stop:
            return []
        self.planned = stop - 1
        ranks = range(start, stop) if self.last is None else range(self.last - start, self.last - stop, -1)
        return list(ranks) if self.inverse is None else [self.inverse[rank] for rank in ranks]


class Siblings:
    """The opens of one directory. `names` in the order of the listing."""

    __slots__ = ("_count", "_names", "_opens", "_orders", "_shuffle")

    def __init__(self, names: Sequence[bytes]) -> None:
        self._count = len(names)
        self._names: Sequence[bytes] | None = names
        self._orders = [_Order(None)]
        self._shuffle: Shuffle | None = None
        self._opens = 0

    @property
    def shuffle(self) -> Shuffle | None:
        """What knows of the opens if they are in no order; None while they are in one, or it is too early to tell."""
        return None if any(order.run >= FITS_BEFORE_BELIEF for order in self._orders) else self._shuffle

    def on_open(self, position: int) -> list[int]:
        """The positions that are worth fetching now, nearest first; mostly empty."""
        self._opens += 1
        if self._names is not None and self._opens > FITS_BEFORE_BELIEF and self._orders[0].run < FITS_BEFORE_BELIEF:
            self._learn_orders()
        for order in self._orders:
            order.observe(position)
        if self._shuffle is not None:
            self._shuffle.on_open(position)
        best = max(self._orders, key=lambda order: order.run)
        return best.next(self._count) if best.run >= FITS_BEFORE_BELIEF else []

    def _learn_orders(self) -> None:
        """The listing's order does not fit: sort the names, once, and look from the end as well."""
        assert self._names is not None
        names, self._names = self._names, None
        if self._count > SORTED_FILES_MAX:
            self._orders.append(self._orders[0].backwards(self._count))
            return
        self._shuffle = Shuffle(names)
        seen = {tuple(range(min(self._count, 64)))}
        for positions in (_sorted(names), _sorted_by_number(names)):
            start = tuple(positions[:64])
            if start not in seen:
                seen.add(start)
                self._orders.append(_Order(array("I", positions)))
        self._orders += [order.backwards(self._count) for order in self._orders]


def _sorted(names: Sequence[bytes]) -> list[int]:
    return sorted(range(len(names)), key=names.__getitem__)


def _sorted_by_number(names: Sequence[bytes]) -> list[int]:
    def key(position: int) -> list[tuple[int, bytes]]:
        parts: Iterable[bytes] = _DIGITS.split(names[position])
        return [(int(part[:18]), b"") if part.isdigit() else (-1, part) for part in parts]

    return sorted(range(len(names)), key=key)
