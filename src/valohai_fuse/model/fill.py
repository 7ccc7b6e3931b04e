"""When to complete a file behind a reader that reads it at random again and again, and which part of it next.

The governing trade-off: each scattered miss costs a round trip for 128 KiB, and a line that could bring a thousand times as
much lies idle meanwhile; but nobody asked for the rest of the file, and bytes have a price. Whether the reader will go on is
unknown, so this follows who rents skis until the rent has reached the price of a pair. Rent, since the reader last paused:
- *bytes*: scattered misses must have fetched 1/16 of what is fetched for them, so that a reader who then stops has caused at most
  16 times what it had read already; less of a file that is small beside `bytes_max`, 1/128 at the least;
- *time*: readers must have waited half as long as fetching that takes, at the rate at which that goes, and as long as their own
  bytes took on top of it. So with a store next door, or on a line that misses keep busy, little is bought. The rate is thought to
  be a fast line's until the first pieces have shown what it is: to find that out costs a few MiB, to wait for longer than need
  be costs a reader its time.
A read that finds its bytes where the fill has been would have missed them: it pays the rent that it has been saved. A small file
is bought in instalments, each as soon as there is rent for it; of a larger one, the rent must first have come to the whole price.

One pass over a file, say over a column of it, needs nothing where it has been. Two things tell another reader from that:
- it *comes back*: at least half of the misses lie in segments that were missed before, with other places in between;
- it jumps *in no order*: its misses make up more ascending sequences, and more descending ones, than threads that each go
  through a part of the file (`model.disorder`). That shows sooner, and less surely, so it counts where the file is small beside
  `bytes_max`. Soonest it shows of a reader that waits for one miss before it comes to the next, so is no threads.

What is bought are the segments in which misses fell, the most missed first, and the others as well of a file of which most was
touched, or an eighth, if it is small, as long as misses fall into them as often as chance would have it: a reader that keeps to a
part of a file gets that part, of a small one with what was bought until that showed, and one that touches more than `bytes_max` in
all gets nothing. So a few reads anywhere in 1 TB never cost more than those reads. A run of reads in order is readahead's business
and starts the account anew; so does a pause.

Pure: times are given, in seconds of any clock. Knows nothing of what is cached or in flight; who carries a piece out subtracts
that and says when there is nothing left to order of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from valohai_fuse.model.disorder import DISORDER_MIN, DISORDER_MIN_ALONE, SEQUENCES_MIN, SEQUENCES_MIN_ALONE, Disorder
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent

MISSES_MIN = 32
"""Scattered misses before anything else is looked at: opening an archive or a model takes some dozens."""
MISSES_MIN_ALONE = 6
"""Of a reader with never two of them under way, in a small file: their order is the program's, and it shows sooner."""

SPENT_SHARE_MIN = 1 / 16

SMALL_SHARE_MAX = 1 / 8
"""Of `bytes_max`: a file up to this is small."""

RETURN_MISSES_MIN = 64
RETURN_SHARE_MIN = 1 / 2
RETURN_DISTANCE = 16
"""Misses elsewhere since the last one in a segment, that make the next one a return (a quarter of the segments, where that is
less): threads that scan row groups side by side leave a place and are back at once."""

INDEX_BYTES = 1024 * 1024
"""The end of a file, where archives and tables have what tells where the rest is. Who began there has a file that is made to be
read here and there; to look there again between two places is no disorder."""

DISORDER_MIN_BEGUN = 1.0
"""Once begun: then only that is still missed which is not complete yet, and that in the order in which it is completed."""

WHOLE_SHARE_MIN = 3 / 4
"""Of a file's segments touched: from then on it is read all over, and its other segments are wanted as well."""
WHOLE_SHARE_MIN_SMALL = 1 / 8
HITS_MAX = 4.0
HITS_MIN = 8
"""A reader that has found its bytes HITS_MIN times in a row, and HITS_MAX times as often as one that reads all over the file would,
keeps to what is complete by now."""

PIECE_BYTES_MIN = 2 * 1024 * 1024
"""Ordered at once: a read that falls into a piece under way waits for it, so it must not take much longer than a miss."""
PIECE_BYTES_MAX = 4 * 1024 * 1024
"""Where pieces have shown that they do not."""

PAUSE_S = 60.0
"""A file without a scattered miss for so long is not being read at random any more."""

RUN_BYTES_MAX = SEGMENT_BYTES
"""Read in order, it is a stream; records of a random reader are shorter."""

WAIT_S_MAX = 0.5
"""What one miss may count for: an outage is no reason to fetch more."""

RENT_TIMES = 2.0
"""So many times as long as readers waited may take what is bought for it: they go on waiting while it comes."""

RATE_BYTES_S = 800e6
"""Assumed until something was fetched: a host with 10 Gbit/s, in the store's region."""
MEASURED_BYTES = 16 * 1024 * 1024
"""The rate is that at which about so many came lately; of the first ones fewer are under way than the line bears."""

FAILURES_MAX = 3
"""No room, no access, a store in trouble: readers have their retries, what nobody asked for has none."""


@dataclass(slots=True)
class Fill:
    """The account of one file while it is open. `size` in bytes; no more than `bytes_max` of it is ever ordered."""

    size: int
    bytes_max: int
    piece_bytes: int = PIECE_BYTES_MIN
    """Of the pieces to come."""
    _misses: int = 0
    _is_alone: bool = True
    """No two of the misses were under way at once."""
    _hits: int = 0
    """Since the last miss."""
    _spent_bytes: int = 0
    _waited_s: float = 0.0
    _latest_s: float = 0.0
    _touched: dict[int, int] = field(default_factory=dict)
    """Segment -> scattered misses in it."""
    _latest: dict[int, int] = field(default_factory=dict)
    """Segment -> which of all misses the last one in it was."""
    _returns: int = 0
    _disorder: Disorder = field(default_factory=Disorder)
    _complete: set[int] = field(default_factory=set)
    _current: Extent | None = None
    _ordered_bytes_current: int = 0
    _ordered_bytes: int = 0
    _ordered_bytes_paid: int = 0
    """Those of them for which there was other rent, before the reader paused."""
    _landed_bytes: float = 0.0
    """Lately, and while pieces were under way for `_busy_s`."""
    _busy_s: float = 0.0
    _failures: int = 0

    def on_miss(self, start: int, fetched_bytes: int, waited_s: float, now_s: float, *, is_alone: bool) -> None:
        """A read at `start` that continues nothing had to wait for `fetched_bytes`; `is_alone`: no other such one did when it
        began."""
        if now_s - self._latest_s > PAUSE_S:
            self._begin_anew()
        self._latest_s = now_s
        self._misses += 1
        self._hits = 0
        self._is_alone &= is_alone
        self._spent_bytes += fetched_bytes
        self._waited_s += min(waited_s, WAIT_S_MAX)
        index = start // SEGMENT_BYTES
        if self._touched_bytes < self.bytes_max or index in self._touched:
            elsewhere = self._misses - self._latest.get(index, self._misses) - 1
            self._returns += elsewhere >= max(1, min(RETURN_DISTANCE, len(self._touched) // 4))
            self._latest[index] = self._misses
            if start < self.size - INDEX_BYTES or self._misses == 1:
                self._disorder.add(start)
            self._touched[index] = self._touched.get(index, 0) + 1
        else:
            self._begin_anew()  # wider than what may be bought: as if nothing had been seen

    def on_hit(self, start: int, byte_count: int) -> bool:
        """A read at `start` that continues nothing found its bytes, or `byte_count` would have been fetched. Whether it counts: the
        fill has been there, and has more to do."""
        self._hits += 1
        index = start // SEGMENT_BYTES
        is_current = self._current is not None and index == self._current.start // SEGMENT_BYTES
        if not self._misses or not (is_current or index in self._complete) or len(self._complete) >= len(self._wanted):
            return False
        self._waited_s += self._waited_s * byte_count / self._spent_bytes
        self._spent_bytes += byte_count
        return True

    def on_run(self, run_bytes: int) -> None:
        """A read that continues a stream, of which `run_bytes` were read in order by now."""
        if run_bytes >= RUN_BYTES_MAX and self._misses:
            self._begin_anew()

    def on_landed(self, byte_count: int, busy_s: float) -> None:
        """Pieces brought so much, while at least one was under way for so long."""
        if self._landed_bytes >= MEASURED_BYTES:
            self._landed_bytes /= 2
            self._busy_s /= 2
        self._landed_bytes += byte_count
        self._busy_s += busy_s

    def failed(self) -> None:
        """Some of a piece could not be fetched or kept; after FAILURES_MAX of those nothing more is ordered."""
        self._failures += 1

    @property
    def is_worth_it(self) -> bool:
        """Whether there is rent for more, by what is known now."""
        return (
            self._misses >= self._misses_min
            and (self._comes_back or (self._is_small and self._is_unordered))
            and self._failures < FAILURES_MAX
            and self._ordered_bytes < self.bytes_max
            and self._wanted_bytes <= self.bytes_max
            and self._is_paid
        )

    def piece(self, now_s: float) -> Extent | None:
        """What to order next (block-aligned, within one segment), the same until `ordered` or `is_ordered` moves it on; None:
        nothing now."""
        if not self.is_worth_it or now_s - self._latest_s > PAUSE_S:
            return None
        if self._current is None:
            left = [index for index in self._wanted if index not in self._complete]
            if not left:
                return None
            most = max(left, key=lambda index: (self._touched.get(index, 0), -index))
            self._current = self._cut(most * SEGMENT_BYTES)
        return self._current

    def ordered(self, byte_count: int) -> None:
        """So much of the piece has been ordered. A piece is never ordered twice over, whatever becomes of its bytes."""
        self._ordered_bytes += byte_count
        self._ordered_bytes_current += byte_count
        if self._current is not None and self._ordered_bytes_current >= len(self._current):
            self.is_ordered()

    def is_ordered(self) -> None:
        """Nothing is left to order of the piece."""
        assert self._current is not None, "there is a piece to speak of"
        index, stop = self._current.start // SEGMENT_BYTES, self._current.stop
        self._current, self._ordered_bytes_current = None, 0
        if stop >= min((index + 1) * SEGMENT_BYTES, self.size):
            self._complete.add(index)
        else:
            self._current = self._cut(stop)

    def _cut(self, start: int) -> Extent:
        return Extent(start, min(start - start % self.piece_bytes + self.piece_bytes, self.size))

    @property
    def _misses_min(self) -> int:
        if not (self._is_alone and self._is_small):
            return MISSES_MIN
        return MISSES_MIN_ALONE

    @property
    def _comes_back(self) -> bool:
        return self._misses >= RETURN_MISSES_MIN and self._returns >= RETURN_SHARE_MIN * self._misses

    @property
    def _is_unordered(self) -> bool:
        sequences_min = SEQUENCES_MIN_ALONE if self._is_alone else SEQUENCES_MIN
        degree_min = DISORDER_MIN_ALONE if self._is_alone else DISORDER_MIN
        return self._disorder.degree(sequences_min) >= (DISORDER_MIN_BEGUN if self._ordered_bytes else degree_min)

    @property
    def _is_small(self) -> bool:
        return self.size <= SMALL_SHARE_MAX * self.bytes_max

    @property
    def _spent_share_min(self) -> float:
        return SPENT_SHARE_MIN * max(SMALL_SHARE_MAX, min(1.0, self.size / max(1, self.bytes_max)))

    @property
    def _touched_bytes(self) -> int:
        return min(len(self._touched) * SEGMENT_BYTES, self.size)

    @property
    def _wanted(self) -> Collection[int]:
        """The segments to complete."""
        all_of_them = range(-(-self.size // SEGMENT_BYTES))
        share_min = WHOLE_SHARE_MIN_SMALL if self._is_small else WHOLE_SHARE_MIN
        complete, hits_beyond_chance = len(self._complete), max(0, self._hits - HITS_MIN)
        is_whole = (
            self.size <= self.bytes_max
            and len(self._touched) >= share_min * len(all_of_them)
            and hits_beyond_chance * (len(all_of_them) - complete) <= HITS_MAX * complete
        )
        return all_of_them if is_whole else self._touched.keys()

    @property
    def _wanted_bytes(self) -> int:
        return min(len(self._wanted) * SEGMENT_BYTES, self.size)

    @property
    def _is_paid(self) -> bool:
        for_bytes = self._spent_bytes / self._spent_share_min
        for_time = RENT_TIMES * (self._waited_s * self._rate_bytes_s - self._spent_bytes)
        if not self._is_small and for_bytes < self._wanted_bytes:
            return False
        return self._ordered_bytes - self._ordered_bytes_paid < min(for_bytes, for_time)

    @property
    def _rate_bytes_s(self) -> float:
        is_measured = self._landed_bytes >= MEASURED_BYTES / 2 and self._busy_s > 0
        return self._landed_bytes / self._busy_s if is_measured else RATE_BYTES_S

    def _begin_anew(self) -> None:
        self._misses = self._returns = self._spent_bytes = 0
        self._latest.clear()
        self._is_alone = True
        self._disorder = Disorder()
        self._waited_s = 0.0
        self._ordered_bytes_paid = self._ordered_bytes
        self._touched.clear()
        self._complete.clear()
        self._current, self._ordered_bytes_current = None, 0
