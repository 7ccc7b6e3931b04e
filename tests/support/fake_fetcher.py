"""A Fetcher without network, processes or real time: what `tests/engine` builds on.

`tests/contracts/test_fetcher.py` runs the same suite on this and on the worker pool, so that what the engine is proven
against is what it meets. Time is trio's: under `MockClock(autojump_threshold=0)` a latency costs nothing.

Each order takes, when it gets a connection, the next `Script` of its object's queue, or `default` when that is empty. Where
bytes go is the caller's `land(order, offset, data, version)`: pass what fits the store of the test. A block is reported only
after it was landed.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import trio

from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.ports import FailureKind, Fetched, FetchFailed, FetchOrder, Landed, Priority, Version

Land = Callable[[FetchOrder, int, bytes, Version], None]


def ramp(size: int, phase: int = 0) -> bytes:
    """`size` bytes counting modulo 251 from `phase`: a shift by blocks or pages shows."""
    period = bytes((phase + i) % 251 for i in range(251))
    return (period * (size // 251 + 1))[:size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How one order goes. `fail_at` counts bytes from the order's start: what lies before is landed, then `failure` comes.

    `gate`: nothing is sent before it is set (for tests that must decide the moment rather than the duration).
    """

    latency_s: float = 0.02
    bytes_per_s: float = float("inf")
    failure: FetchFailed | None = None
    fail_at: int = 0
    version: Version | None = None
    gate: trio.Event | None = None
    body: bytes | None = None
    """Other bytes than the object's, for the whole object: a store that mixes up versions."""


@dataclass(eq=False, slots=True)
class _Place:
    """An order that waits for a connection, or has one."""

    order: FetchOrder
    priority: Priority
    admitted: trio.Event = field(default_factory=trio.Event)


class FakeFetcher:
    """See the module's text. `contents` maps stable ids to whole objects, `versions` to their ETags (default `"v1"`)."""

    def __init__(
        self,
        contents: Mapping[str, bytes],
        land: Land,
        *,
        versions: Mapping[str, Version] | None = None,
        connections: int = 16,
        step_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.contents = dict(contents)
        self.versions = defaultdict(lambda: '"v1"', versions or {})
        self.default = Script()
        self.orders: list[FetchOrder] = []
        """Every order, in the order of arrival."""
        self.started: list[FetchOrder] = []
        """Every order that got a connection, in that order."""
        self.cancelled: list[FetchOrder] = []
        self.line_bytes_s = float("inf")
        """Of all orders together, which share it evenly."""
        self._line = trio.Lock()
        self.active = 0
        self.active_peak = 0
        self.fetched_bytes = 0
        self._land = land
        self._scripts: dict[str, deque[Script]] = defaultdict(deque)
        self._step_bytes = step_bytes
        self._connections = connections
        self._ahead_max = max(1, min(connections - 2, connections * 3 // 4))
        self._active_ahead = 0
        self._queue: list[_Place] = []

    def script(self, stable_id: str, *scripts: Script) -> None:
        """The next orders of this object go like this, one after the other."""
        self._scripts[stable_id].extend(scripts)

    async def fetch(self, order: FetchOrder, landed: Callable[[Landed], None]) -> Fetched:
        """As `ports.Fetcher.fetch`."""
        if not len(order.extent):
            raise ValueError("an order without bytes")
        self.orders.append(order)
        scripts = self._scripts[order.key.stable_id]
        script = scripts.popleft() if scripts else self.default
        place = _Place(order, order.priority)
        try:
            await self._admitted(place)
            try:
                return await self._carry_out(order, script, landed)
            finally:
                self._leave(place)
        except trio.Cancelled:
            self.cancelled.append(order)
            raise

    def promote(self, order: FetchOrder) -> None:
        """As `ports.Fetcher.promote`."""
        for place in self._queue:
            if place.order is order:
                place.priority = Priority.DEMAND
        self._admit()

    async def _admitted(self, place: _Place) -> None:
        self._queue.append(place)
        self._admit()
        try:
            await place.admitted.wait()
        except trio.Cancelled:
            if place.admitted.is_set():
                self._leave(place)
            else:
                self._queue.remove(place)
            raise

    def _leave(self, place: _Place) -> None:
        self.active -= 1
        self._active_ahead -= place.priority is Priority.AHEAD
        self._admit()

    def _admit(self) -> None:
        for place in sorted(self._queue, key=lambda place: (place.priority, place.order.turn)):
            ahead = place.priority is Priority.AHEAD
            if self.active >= self._connections or (ahead and self._active_ahead >= self._ahead_max):
                return
            self._queue.remove(place)
            self.started.append(place.order)
            self.active += 1
            self.active_peak = max(self.active_peak, self.active)
            self._active_ahead += ahead
            place.admitted.set()

    async def _carry_out(self, order: FetchOrder, script: Script, landed: Callable[[Landed], None]) -> Fetched:
        began = trio.current_time()
        if script.gate is not None:
            await script.gate.wait()
        await trio.sleep(script.latency_s)
        first_byte_s = trio.current_time() - began
        stable_id = order.key.stable_id
        if script.failure is not None and script.fail_at <= 0:
            raise script.failure
        if stable_id not in self.contents:
            raise FetchFailed(FailureKind.MISSING, "HTTP 404", status=404)
        content = self.contents[stable_id] if script.body is None else script.body
        version = self.versions[stable_id] if script.version is None else script.version
        if len(content) != order.key.size:
            raise FetchFailed(FailureKind.CHANGED, "another size", status=206)
        if order.expect_version is not None and order.expect_version != version:
            raise FetchFailed(FailureKind.CHANGED, "another ETag", status=206)
        end = order.extent.stop
        if script.failure is not None:  # like the real one, only whole blocks land of a body that breaks off
            broken = min(order.extent.start + script.fail_at, end)
            end = broken if broken == order.key.size else broken - broken % BLOCK_BYTES
        start = order.extent.start
        while start < end:
            stop = min(start + self._step_bytes, end)
            await trio.sleep((stop - start) / script.bytes_per_s)
            if self.line_bytes_s < float("inf"):
                async with self._line:  # its queue is fair
                    await trio.sleep((stop - start) / self.line_bytes_s)
            self._land(order, start, content[start:stop], version)
            self.fetched_bytes += stop - start
            landed(Landed(stop, version))
            start = stop
        if script.failure is not None:
            raise script.failure
        return Fetched(
            version=version,
            fetched_bytes=len(order.extent),
            first_byte_s=first_byte_s,
            total_s=trio.current_time() - began,
            new_connection=False,
        )
