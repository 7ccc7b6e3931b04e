"""Completes files that are read at random, in the background: `model.fill` says when it pays and what comes next, this room
orders it when the line has nothing better to do.

A fill orders what nobody waits for, in pieces, and only while what is fetched for others is little (LINE_IDLE_BYTES) and takes
less than half of the connections: a stream's readahead or a prefetch stops it, the scattered misses that it is made for do not.
What is cached or in flight is not ordered again, so no byte comes twice.

How much of it is under way at once, in the whole mount, is found out by trying (`FillWindow`): more as long as pieces come as fast
as they ever did, less when they queue on the line, for then the reader's own requests do.

There is no task and no timer: each read of such a file and the end of each flight are the moments to look again. With the last
handle of a file its account is closed, and what it has under way is given up like any readahead.

State changes only on the trio thread, in functions that do not await.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from valohai_fuse.engine.flights import Flight, Flights
from valohai_fuse.engine.objects import RemoteObject
from valohai_fuse.model.extents import Extent
from valohai_fuse.model.fill import PIECE_BYTES_MAX, PIECE_BYTES_MIN, Fill
from valohai_fuse.model.readahead import Plan
from valohai_fuse.ports import Metrics, Priority

ORDERS_MIN = 4
ORDERS_MAX = 16
ORDER_BYTES = 1024 * 1024
"""There are enough orders for all of the window when they are of so much: what is left to fetch of a piece are gaps between what
was read."""
WINDOW_BYTES_MIN = 2 * PIECE_BYTES_MIN
WINDOW_BYTES_FIRST = 2 * WINDOW_BYTES_MIN
WINDOW_BYTES_MAX = ORDERS_MAX * PIECE_BYTES_MAX
_SWIFT_SHARE = 2.0
"""A piece that took no longer than so many times the shortest did not queue."""
_UNSEEN_SHARE = 1.5
"""Nor was there any queue at all where one took no longer than so many times a miss: the line bears several times as much."""
_SLOW_SHARE = 4.0
_LONGER_S_MAX = 0.05
"""What a piece of PIECE_BYTES_MIN may take longer than a miss, where the next ones are larger: who waits for those waits that long
at the most, and a miss less."""
LINE_IDLE_BYTES = 4 * 1024 * 1024
"""What may be under way for others: 32 readers at random have that much, a stream of any speed has more."""
LOOKS_MAX = 32
"""Pieces looked at in one go: where much is cached already, finding what is not must not hold up the loop."""


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class FillLimits:
    """`bytes_max`: of one file while it is open, 0 turns filling off. `connections`: as the setting. `is_kept`: whether the
    cache's disk takes writes now."""

    bytes_max: int = 0
    connections: int = 32
    is_kept: Callable[[], bool] = _always


class FillWindow:
    """How much may be under way: grows by each piece that came swiftly, so doubles within a round trip, as TCP's slow start, and
    fourfold where pieces took no longer than a miss. A slow piece halves it, but not for those that were ordered before that.
    And how large the pieces are."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._swiftest_s = float("inf")
        self._swiftest_whole_s = float("inf")
        self._miss_s = 0.0
        self._halved_t = 0.0
        self.bytes_max = WINDOW_BYTES_FIRST

    @property
    def piece_bytes(self) -> int:
        """Of the pieces to come."""
        is_quick = self._swiftest_whole_s <= self._miss_s + _LONGER_S_MAX
        return PIECE_BYTES_MAX if is_quick else PIECE_BYTES_MIN

    @property
    def orders_max(self) -> int:
        """Half of the connections at the most."""
        wanted = min(ORDERS_MAX, max(ORDERS_MIN, self.bytes_max // ORDER_BYTES))
        return max(1, min(wanted, self._connections // (4 if wanted == ORDERS_MIN else 2)))

    def note_miss(self, waited_s: float) -> None:
        """A scattered read had to wait for bytes."""
        self._miss_s += (waited_s - self._miss_s) / 8 if self._miss_s else waited_s

    def note(self, byte_count: int, began_t: float, now_t: float) -> None:
        """A piece has landed, or what was lacking of it."""
        took_s = now_t - began_t
        self._swiftest_s = min(self._swiftest_s, took_s)
        if byte_count >= PIECE_BYTES_MIN:
            self._swiftest_whole_s = min(self._swiftest_whole_s, took_s)
        if took_s <= _SWIFT_SHARE * self._swiftest_s:
            times = 3 if took_s <= _UNSEEN_SHARE * self._miss_s else 1
            self.bytes_max = min(WINDOW_BYTES_MAX, self.bytes_max + times * byte_count)
        elif took_s > _SLOW_SHARE * self._swiftest_s and began_t >= self._halved_t:
            self.bytes_max = max(WINDOW_BYTES_MIN, self.bytes_max // 2)
            self._halved_t = now_t


class BackgroundFill:
    """All fills of one mount. `gaps(obj, extent)`: what the cache lacks of it."""

    def __init__(
        self,
        *,
        flights: Flights,
        metrics: Metrics,
        gaps: Callable[[RemoteObject, Extent], list[Extent]],
        limits: FillLimits,
    ) -> None:
        self._flights = flights
        self._metrics = metrics
        self._gaps = gaps
        self._limits = limits
        self._is_on = limits.bytes_max > 0 and limits.connections >= ORDERS_MIN
        self._window = FillWindow(limits.connections)
        self._open: dict[RemoteObject, None] = {}
        """The files that are worth it, the one whose turn it is first."""
        self._under_way: dict[Flight, float] = {}
        """And when each began."""
        self._bytes_under_way = 0
        self._marked_t = 0.0
        """When the last piece landed, or the first of those under way was ordered."""
        if self._is_on:
            flights.ended = self._on_end

    def on_miss(self, obj: RemoteObject, plan: Plan, waited_s: float, *, is_alone: bool) -> None:
        """A read with this plan had to wait for bytes from the store; `is_alone`: no other one of this file did when it began."""
        if not self._is_on or not plan.is_scattered or not obj.handles:
            return
        if obj.fill is None:
            obj.fill = Fill(obj.key.size, self._limits.bytes_max)
        self._window.note_miss(waited_s)
        fetched_bytes = len(plan.demand) + len(plan.ahead)
        obj.fill.on_miss(plan.demand.start, fetched_bytes, waited_s, trio.current_time(), is_alone=is_alone)
        self._look_at(obj, obj.fill)

    def on_hit(self, obj: RemoteObject, plan: Plan) -> None:
        """A read with this plan, which continues nothing, found its bytes."""
        fill = obj.fill
        if fill is not None and fill.on_hit(plan.demand.start, len(plan.demand) + len(plan.ahead)):
            self._look_at(obj, fill)

    def _look_at(self, obj: RemoteObject, fill: Fill) -> None:
        if obj not in self._open and fill.is_worth_it:
            self._open[obj] = None
            self._order()

    def on_read(self, obj: RemoteObject, plan: Plan) -> None:
        """Any read with this plan, before it is answered."""
        if obj.fill is None:
            return
        if not plan.is_scattered:
            obj.fill.on_run(plan.run_bytes)
        if self._open:
            self._order()

    def on_close(self, obj: RemoteObject) -> None:
        """Its last handle is gone."""
        obj.fill = None
        self._open.pop(obj, None)

    def _order(self) -> None:
        """Begins as many pieces as may be under way now, of one file after the other."""
        looks = LOOKS_MAX
        while self._open and looks and self._may_begin():
            looks -= 1
            obj = next(iter(self._open))
            del self._open[obj]
            if obj.fill is None:
                continue
            obj.fill.piece_bytes = self._window.piece_bytes
            piece = obj.fill.piece(trio.current_time())
            if piece is None:
                continue  # until its next miss
            self._open[obj] = None
            started = self._begin(obj, piece)
            if started:
                obj.fill.ordered(sum(len(flight.extent) for flight in started))
            else:
                obj.fill.is_ordered()

    def _may_begin(self) -> bool:
        others = self._flights.active - len(self._under_way)
        return (
            len(self._under_way) < self._window.orders_max
            and self._bytes_under_way < self._window.bytes_max
            and others < self._limits.connections // 2
            and self._flights.active_bytes - self._bytes_under_way <= LINE_IDLE_BYTES
            and self._limits.is_kept()
        )

    def _begin(self, obj: RemoteObject, piece: Extent) -> list[Flight]:
        """Orders the first part of the piece that is neither cached nor on its way; nothing: there is none."""
        for gap in self._gaps(obj, piece):
            started = self._flights.begin(obj, gap, Priority.AHEAD)
            if started:
                now_t = trio.current_time()
                if not self._under_way:
                    self._marked_t = now_t
                self._under_way.update(dict.fromkeys(started, now_t))
                self._bytes_under_way += sum(len(flight.extent) for flight in started)
                return started
        return []

    def _on_end(self, flight: Flight) -> None:
        if flight in self._under_way:
            began_t = self._under_way.pop(flight)
            self._bytes_under_way -= len(flight.extent)
            landed_bytes = flight.landed - flight.extent.start
            self._metrics.count("filled_bytes", landed_bytes)
            now_t = trio.current_time()
            busy_s, self._marked_t = now_t - self._marked_t, now_t
            if landed_bytes == len(flight.extent):
                self._window.note(landed_bytes, began_t, now_t)
            fill = flight.object.fill
            if fill is not None:
                fill.on_landed(landed_bytes, busy_s)
                if flight.landed < flight.extent.stop:
                    fill.failed()
        if self._open:
            self._order()
