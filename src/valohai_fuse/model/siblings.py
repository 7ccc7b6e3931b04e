"""Which files come next when files are opened one after the other: so that small ones are there before they are asked for.

A data loader opens thousands of small files; each costs a round trip unless the next ones are fetched meanwhile. This mount
knows all names in advance, so it only has to recognise the *order*: that of the listing, that of the sorted names, or that
of the numbers in the names, each from its beginning or from its end, all of it or every tenth. In each candidate order a head
(the furthest open that fitted) and a run (how many fitted in a row) are kept. The order with the longest run is believed, and
as little as its run deserves: 4 files after the second fit, doubling, and of all directories together never more files fetched
and not opened than have been opened. One open that fits no order ends all belief at once.

Readers that share the work do it in one of two ways. Each takes what is next, or every eighth file: then all of them together
open in order, out of step, the more so the longer they run, for none waits for the others. An open ahead of the head fits, one
of a file that was passed over on the way is neutral. Or each has a batch or a part of its own: then together they are in no
order, but each of them is. So there is a trail of heads for all opens, and where that leads nowhere one for each opener.

Where there is no order to believe in, `model.shuffle` looks whether all files are opened, in none.

Pure; positions are indices into the directory's listing. Knows nothing of sizes, caches or flights.
"""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from cachetools import LRUCache

from valohai_fuse.model.shuffle import Shuffle

FITS_BEFORE_BELIEF = 2
WINDOW_FILES_MIN = 4
WINDOW_FILES_MAX = 256
"""Shared by all openers that have an order of their own."""
REACH_FILES = 16
"""How far ahead of the head an open may be and still fit: that many readers may share one listing."""
PASSED_FILES_MAX = 1024
"""So many files that were passed over are remembered, those passed last: of eight readers one may be a hundred files slower."""
PASSED_PER_FIT = 4
"""Where more are left out than so many for each that fitted, nobody is behind: those are not wanted."""
TRAILS_MAX = 256
"""Of one opener in one directory each, those that were used last; a shuffling loader leaves one in each of its directories."""
SHARED_OPENS = 64
"""Who has opened none of so many files that were opened last has ended, and needs no share of the window."""
SORTED_FILES_MAX = 300_000
"""Directories with more files are followed in the order of the listing only, either way: sorting them would stall the loop."""

_PLANNED = 255
_DIGITS = re.compile(rb"(\d+)")


class _Order:
    """One candidate: `ranks[position]` and its inverse (None: the identity), counted from the end where `last` is the last rank."""

    __slots__ = ("inverse", "last", "ranks")

    def __init__(self, positions: Sequence[int] | None) -> None:
        self.inverse: Sequence[int] | None = positions
        self.last: int | None = None
        self.ranks: Sequence[int] | None = None
        if positions is not None:
            ranks = array("I", bytes(4 * len(positions)))
            for rank, position in enumerate(positions):
                ranks[position] = rank
            self.ranks = ranks

    def backwards(self, count: int) -> _Order:
        """The same from the end, with what it knows of the names."""
        order = _Order(None)
        order.inverse, order.ranks, order.last = self.inverse, self.ranks, count - 1
        return order

    def rank(self, position: int) -> int:
        rank = position if self.ranks is None else self.ranks[position]
        return rank if self.last is None else self.last - rank

    def position(self, rank: int) -> int:
        rank = rank if self.last is None else self.last - rank
        return rank if self.inverse is None else self.inverse[rank]


class _Account:
    """Files of all directories, counted: opens, and what was planned and has not been opened."""

    __slots__ = ("opens", "unopened")

    def __init__(self) -> None:
        self.opens = 0
        self.unopened = 0

    @property
    def is_spent(self) -> bool:
        """Who stops here has cost twice what he read."""
        return self.unopened >= max(WINDOW_FILES_MIN, self.opens)


class _Plans:
    """What has been planned of a directory and not been opened, and what has been opened in this epoch, by position. An epoch ends
    when a file is opened again."""

    __slots__ = ("_epoch", "_states", "account")

    def __init__(self, count: int, account: _Account) -> None:
        self._states = bytearray(count)
        self._epoch = 1
        self.account = account

    def __len__(self) -> int:
        return len(self._states)

    def on_open(self, position: int) -> None:
        self.account.opens += 1
        state = self._states[position]
        if state == _PLANNED:
            self.account.unopened -= 1
        elif state == self._epoch:
            self._epoch = self._epoch % (_PLANNED - 1) + 1
        self._states[position] = self._epoch

    def add(self, position: int) -> None:
        self._states[position] = _PLANNED
        self.account.unopened += 1

    def has(self, position: int) -> bool:
        return self._states[position] in (_PLANNED, self._epoch)


class _Head:
    """How far opens have come in one order, and how well it has fitted."""

    __slots__ = (
        "_at",
        "_even",
        "_is_one_reader",
        "_is_shared",
        "_order",
        "_passed",
        "_planned",
        "_planned_step",
        "_plans",
        "_step",
        "run",
    )

    def __init__(self, order: _Order, plans: _Plans, *, is_one_reader: bool) -> None:
        """Of one reader steps of any size fit, if they are all the same; of several that is what those do who are in step."""
        self._order = order
        self._is_one_reader = is_one_reader
        self._plans = plans
        self._at = self._planned = -REACH_FILES - 1
        self._step = self._even = 0
        """How far it moved the last time, and how often in a row just so far."""
        self._planned_step = 1
        self._passed: dict[int, None] = {}
        self._is_shared = False
        """There is a slower reader: something that was passed over has been opened then."""
        self.run = 0

    def observe(self, position: int) -> None:
        rank = self._order.rank(position)
        ahead = rank - self._at
        if 0 < ahead <= REACH_FILES or (ahead == self._step > 0 and self._is_one_reader):
            self.run += 1
            if not self._is_one_reader:
                self._pass(rank)
            self._move(rank)
        elif rank in self._passed and len(self._passed) <= PASSED_PER_FIT * self.run:
            del self._passed[rank]
            self._is_shared = True
        elif not -REACH_FILES <= ahead <= 0:
            self.run = 0
            self._passed.clear()
            self._is_shared = False
            self._move(rank)
            self._planned = rank

    def _move(self, rank: int) -> None:
        step, self._at = rank - self._at, rank
        self._even = self._even + 1 if step == self._step else 1
        self._step = step

    def _pass(self, rank: int) -> None:
        """Over some that a slower reader may have yet to open."""
        for passed in range(self._at + 1, rank):
            self._passed[passed] = None
            if len(self._passed) > PASSED_FILES_MAX:
                del self._passed[next(iter(self._passed))]

    def next(self, files_max: int) -> Iterator[int]:
        step = self._step if self._even >= FITS_BEFORE_BELIEF and not self._is_shared else 1
        if step != self._planned_step:
            self._planned, self._planned_step = self._at, step
        window = min(files_max, WINDOW_FILES_MIN << min(self.run - FITS_BEFORE_BELIEF, 10))
        ahead = max(0, self._planned - self._at) // step
        for rank in range(self._at + (ahead + 1) * step, min(self._at + window * step + 1, len(self._plans)), step):
            if self._plans.account.is_spent:
                return
            position = self._order.position(rank)
            if not self._plans.has(position):
                yield position
                self._plans.add(position)  # not reached for the one at which the caller stops
            self._planned = rank


class _Trail:
    """Where some opens have led: a head in each order."""

    __slots__ = ("_is_one_reader", "best", "heads")

    def __init__(self, *, is_one_reader: bool) -> None:
        self._is_one_reader = is_one_reader
        self.heads: list[_Head] = []
        self.best: _Head | None = None
        """The head that is believed."""

    def observe(self, position: int, orders: list[_Order], plans: _Plans) -> None:
        for order in orders[len(self.heads) :]:
            self.heads.append(_Head(order, plans, is_one_reader=self._is_one_reader))
        for head in self.heads:
            head.observe(position)
        best = max(self.heads, key=lambda head: head.run)
        self.best = best if best.run >= FITS_BEFORE_BELIEF else None


class Directories:
    """What all of them have in common: an account, so that who goes through many small ones need not earn trust in each, and the
    trails of openers, for there may be thousands of directories and hardly one in which these matter."""

    def __init__(self) -> None:
        self.account = _Account()
        self._trails: LRUCache[tuple[int, int], _Trail] = LRUCache(TRAILS_MAX)
        self._count = 0

    def add(self) -> int:
        """A number for one more."""
        self._count += 1
        return self._count

    def trail(self, directory: int, opener: int) -> _Trail:
        """Where an opener has been led in a directory."""
        trail = self._trails.get((directory, opener))
        if trail is None:
            trail = self._trails[directory, opener] = _Trail(is_one_reader=True)
        return trail


class Siblings:
    """The opens of one directory. `names` in the order of the listing."""

    __slots__ = (
        "_believed",
        "_directories",
        "_names",
        "_number",
        "_opens",
        "_orders",
        "_plans",
        "_sharers",
        "_shuffle",
        "_together",
    )

    def __init__(self, names: Sequence[bytes], directories: Directories) -> None:
        self._names: Sequence[bytes] | None = names
        self._orders = [_Order(None)]
        self._plans = _Plans(len(names), directories.account)
        self._together = _Trail(is_one_reader=False)
        self._directories = directories
        self._number = directories.add()
        self._sharers: deque[int] | None = None
        """Who opened last and had an order of his own."""
        self._believed: _Head | None = None
        self._shuffle: Shuffle | None = None
        self._opens = 0

    @property
    def shuffle(self) -> Shuffle | None:
        """What knows of the opens if they are in no order; None while they are in one, or it is too early to tell."""
        return None if self._believed is not None else self._shuffle

    def on_open(self, position: int, opener: int = 0) -> Iterator[int]:
        """The positions that are worth fetching now, nearest first; mostly none. The one at which the caller stops, and those
        behind it, come again with the next open. `opener` tells one reader from another, if they can be told."""
        self._opens += 1
        self._plans.on_open(position)
        if self._names is not None and self._opens > FITS_BEFORE_BELIEF and self._together.best is None:
            self._learn_orders()
        self._together.observe(position, self._orders, self._plans)
        if self._shuffle is not None:
            self._shuffle.on_open(position)
        self._believed = self._together.best
        if self._believed is not None:
            return self._believed.next(WINDOW_FILES_MAX)
        trail = self._directories.trail(self._number, opener)
        trail.observe(position, self._orders, self._plans)
        self._believed = trail.best
        if self._believed is None:
            return iter(())
        return self._believed.next(WINDOW_FILES_MAX // self._count_sharers(opener))

    def _count_sharers(self, opener: int) -> int:
        if self._sharers is None:
            self._sharers = deque(maxlen=SHARED_OPENS)
        self._sharers.append(opener)
        return len(set(self._sharers))

    def _learn_orders(self) -> None:
        """The listing's order does not fit: sort the names, once, and look from the end as well."""
        assert self._names is not None
        names, self._names = self._names, None
        if len(names) > SORTED_FILES_MAX:
            self._orders.append(self._orders[0].backwards(len(names)))
            return
        self._shuffle = Shuffle(names)
        seen = {tuple(range(min(len(names), 64)))}
        for positions in (_sorted(names), _sorted_by_number(names)):
            start = tuple(positions[:64])
            if start not in seen:
                seen.add(start)
                self._orders.append(_Order(array("I", positions)))
        self._orders += [order.backwards(len(names)) for order in self._orders]


def _sorted(names: Sequence[bytes]) -> list[int]:
    return sorted(range(len(names)), key=names.__getitem__)


def _sorted_by_number(names: Sequence[bytes]) -> list[int]:
    def key(position: int) -> list[tuple[int, bytes]]:
        parts: Iterable[bytes] = _DIGITS.split(names[position])
        return [(int(part[:18]), b"") if part.isdigit() else (-1, part) for part in parts]

    return sorted(range(len(names)), key=key)
