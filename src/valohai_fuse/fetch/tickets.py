"""A call of `fetch` and its requests: usually one, and once more a second for the rest when the first is late (a hedge).

Whichever request is further counts; the one that brings the end wins, and the call is over when both are. It must not be over
before: only when its worker has said that a request is over does that worker write no more where the bytes landed, and that
memory may be another segment's as soon as the call has ended. Readers do not wait for that; they go on with what has landed.

Concurrency: changed on the trio thread, by the pool, in functions that do not await. Must not know: workers' lives, limits.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from valohai_fuse.fetch import wire
from valohai_fuse.fetch.process import WorkerProcess
from valohai_fuse.ports import FailureKind, Fetched, FetchFailed, FetchOrder, Landed, Priority, Version


@dataclass(eq=False, slots=True)
class Worker:
    """A worker process and what it is doing."""

    process: WorkerProcess
    legs: dict[int, Leg] = field(default_factory=dict)
    idle_connections: Counter[str] = field(default_factory=Counter)
    """By origin; an estimate, for stores close connections without telling."""
    ready: bool = False
    idle_since_s: float = 0.0


@dataclass(eq=False, slots=True)
class Leg:
    """One request: bytes [start, end of the order) of a ticket, at one worker until that says how it ended."""

    id: int
    ticket: Ticket
    worker: Worker
    start: int
    is_ahead: bool
    is_hedge: bool = False
    is_cancelled: bool = False
    fetched_bytes: int = 0
    """As far as they are counted."""

    def cancel(self) -> None:
        """Has the worker give it up; a second call does nothing."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.worker.process.post(wire.frame(wire.Cancel(id=self.id)))


@dataclass(eq=False, slots=True)
class Ticket:
    """One call of `fetch`. Its first request is framed when it is made."""

    id: int
    order: FetchOrder
    framed: bytes = field(repr=False)
    landed: Callable[[Landed], None]
    priority: Priority
    origin: str
    is_wanted: bool
    """A reader waits for it, or has waited."""
    version: Version | None
    ended: trio.Event = field(default_factory=trio.Event)
    result: Fetched | BaseException | None = None
    legs: list[Leg] = field(default_factory=list)
    """The requests under way; none: it waits, or is over."""
    upto: int = 0
    fetched_bytes: int = 0
    is_late: bool = False
    """Nothing has come since its request was said to be late."""
    is_hedged: bool = False

    def advance(self, leg: Leg, upto: int, version: Version) -> bool:
        """A request has landed everything below `upto`; whether that is news. What `landed` raises comes out."""
        self.is_late = False
        if upto <= self.upto:
            return False
        self.upto, self.version = upto, version
        if upto == self.order.extent.stop:
            for other in self.legs:
                if other is not leg:
                    other.cancel()
        self.landed(Landed(upto, version))
        return True

    def leave(self, leg: Leg, result: Fetched | BaseException | None) -> bool:
        """A request has ended, with this if it says anything of the order; whether the ticket's last one has. Bytes count for
        more than failures, and of those the first request's for more than the hedge's."""
        self.legs.remove(leg)
        self.fetched_bytes += leg.fetched_bytes
        counts_for_more = self.result is None or isinstance(result, Fetched) or not leg.is_hedge
        if result is not None and counts_for_more and not isinstance(self.result, Fetched):
            self.result = result
        return not self.legs

    def end(self, result: Fetched | BaseException) -> None:
        """The call goes on with that."""
        self.result = result
        self.ended.set()


def turn(ticket: Ticket) -> int:
    """What tickets of one priority are sorted by."""
    return ticket.order.turn


def framed(
    leg_id: int,
    order: FetchOrder,
    *,
    start: int,
    expect_version: Version | None,
    late_after_s: float,
    is_hedge: bool = False,
) -> bytes:
    """What a worker is told: the order from `start` on. A hedge lands in the file, for memory has one writer."""
    return wire.frame(
        wire.Order(
            id=leg_id,
            url=wire.name_bytes(order.lease.url),
            headers=tuple((wire.name_bytes(name), wire.name_bytes(value)) for name, value in order.lease.headers),
            stable_id=wire.name_bytes(order.key.stable_id),
            size=order.key.size,
            start=start,
            stop=order.extent.stop,
            expect_version=expect_version,
            segment_path=os.fsencode(order.segment_path),
            staging_path=b"" if is_hedge else os.fsencode(order.staging_path),
            awaited_upto=order.awaited_upto,
            late_after_s=late_after_s,
        )
    )


def origin(url: str) -> str:
    """`scheme://host:port` in lower case; "" for anything else."""
    match = re.match(r"[A-Za-z]+://[^/?#]*", url)
    return match[0].lower() if match else ""


def lost(detail: str) -> FetchFailed:
    """The order met no store's verdict: repeat it."""
    return FetchFailed(FailureKind.WORKER_LOST, detail)
