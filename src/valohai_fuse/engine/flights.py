"""Flights: at most one fetch of a block at a time, however many readers want it; each ends once; a failure leaves nothing.

A flight is one run of missing blocks within one segment, or half of one (`model.pace`), from one order of the fetcher to the last
byte, over as many attempts as the retry policy grants. Readers do not wait for the flight but for a *byte of it*: they are woken
one by one as `landed` passes what they need.

Concurrency rules:
- `RemoteObject.flights`, `Flight.landed`, `.error` and `.waiters` change only on the trio thread and only in functions that
  do not await. A flight is in its object's list exactly as long as its task runs.
- Nothing is assumed across an await: `_run` reads version, path and lease afresh for each attempt.
- A flight lives as long as somebody waits for it. A flight that nobody waits for (readahead) is not retried after a pause:
  the reader that comes later begins a new one and has the deadline that this one lacks.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator

import trio

from valohai_fuse import errors
from valohai_fuse.engine import sharing
from valohai_fuse.engine.leases import Leases
from valohai_fuse.engine.objects import RemoteObject
from valohai_fuse.model.extents import Extent, split_by_segment
from valohai_fuse.model.pace import Pace
from valohai_fuse.model.retry import GiveUp, Renew, RetryAfter, RetryState
from valohai_fuse.ports import (
    BlockStore,
    FailureKind,
    Fetched,
    Fetcher,
    FetchFailed,
    FetchOrder,
    Landed,
    Lease,
    Metrics,
    Priority,
)

log = logging.getLogger(__name__)

FINISH_BYTES_MAX = 1024 * 1024
"""A flight that nobody needs any more is left to end when no more than this is to come: a cancelled transfer costs its
connection, and a new connection costs round trips."""


class Flight:
    """One run of blocks on its way. `landed` is how far it is: everything in [extent.start, landed) can be read."""

    __slots__ = (
        "claimed",
        "deadline",
        "error",
        "extent",
        "landed",
        "object",
        "order",
        "over",
        "priority",
        "scope",
        "staged",
        "to_keep",
        "turn",
        "urgent",
        "waiters",
    )

    def __init__(
        self,
        obj: RemoteObject,
        extent: Extent,
        priority: Priority,
        turn: int,
        *,
        staged: bool = False,
        to_keep: bool = False,
    ) -> None:
        self.turn = turn
        self.claimed = False
        """Its blocks are claimed for us (`engine.sharing`)."""
        self.staged = staged
        """Readers want it, the cache gets what its disk can take; otherwise it is fetched for the cache's sake."""
        self.to_keep = to_keep
        """Nobody reads it: it is to lie in the cache, however long its disk takes."""
        self.order: FetchOrder | None = None
        """What the fetcher has of it now."""
        self.object = obj
        self.extent = extent
        self.priority = priority
        self.landed = extent.start
        self.over = False
        self.error: errors.ReadError | None = None
        self.waiters: list[tuple[int, trio.Event]] = []
        self.deadline = 0.0
        """Trio time until which somebody waits; in the past when nobody does."""
        self.urgent = False
        """A read waits for it: it goes before everything that is only fetched ahead."""
        self.scope = trio.CancelScope()

    @property
    def coming(self) -> Extent:
        """What has not landed yet."""
        return Extent(self.landed, self.extent.stop)

    async def wait_landed(self, upto: int, deadline: float) -> None:
        """Until everything of the flight below `upto` has landed. Raises the flight's ReadError when it ended before.

        The caller bounds the wait itself (`deadline`, trio time, tells the flight how long it is worth retrying).
        """
        if self.landed >= upto or self.over:
            self._check(upto)
            return
        self.want(deadline)
        entry = (upto, trio.Event())
        self.waiters.append(entry)
        try:
            await entry[1].wait()
        finally:
            if entry in self.waiters:
                self.waiters.remove(entry)
        self._check(upto)

    def want(self, deadline: float) -> None:
        """Somebody needs bytes of this flight and has until `deadline` (trio time): worth retrying until then."""
        self.deadline = max(self.deadline, deadline)

    @property
    def wanted(self) -> bool:
        """Whether somebody needed bytes of it: a failure is then news, otherwise only readahead that went nowhere."""
        return self.deadline > 0

    @property
    def awaited_upto(self) -> int:
        """The least that satisfies a reader; 0 when none waits."""
        return min((upto for upto, _ in self.waiters), default=0) if self.urgent else 0

    def _check(self, upto: int) -> None:
        if self.landed < upto and self.error is not None:
            # A fresh instance for each reader: one exception object must not collect the tracebacks of many tasks.
            raise type(self.error)(self.error.message, hint=self.error.hint)

    def advance(self, landed: int) -> None:
        """More has landed: wakes exactly those readers that have what they need."""
        if landed <= self.landed:
            return
        self.landed = landed
        if self.waiters:
            due = [entry for entry in self.waiters if entry[0] <= landed]
            if due:
                self.waiters = [entry for entry in self.waiters if entry[0] > landed]
                for _, event in due:
                    event.set()

    def end(self, error: errors.ReadError | None) -> None:
        """The flight is over; everybody who still waits learns why."""
        self.over = True
        self.error = error
        waiters, self.waiters = self.waiters, []
        for _, event in waiters:
            event.set()


class Flights:
    """Begins, retries and ends flights; tasks run in the nursery given."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        fetcher: Fetcher,
        store: BlockStore,
        leases: Leases,
        metrics: Metrics,
    ) -> None:
        self._nursery = nursery
        self._fetcher = fetcher
        self._store = store
        self._leases = leases
        self._metrics = metrics
        self._pace = Pace()
        self._turn = 0
        self.active = 0
        self.active_bytes = 0
        self.idle: Callable[[RemoteObject], None] | None = None
        """Told of each object whose last flight has ended."""
        self.ended: Callable[[Flight], None] | None = None
        """Told of each flight that has ended, after that."""

    def begin(
        self, obj: RemoteObject, wanted: Extent, priority: Priority, *, staged: bool = False, to_keep: bool = False
    ) -> list[Flight]:
        """Starts flights for those blocks of `wanted` (block-aligned) that are not in flight, and returns them. Does not ask
        the store what it has: whoever calls has just done so.

        `staged`, `to_keep`: as in `BlockStore.landing`; what is fetched for the cache's sake comes in whole segments, as many at
        once as whoever orders them likes.
        """
        begun = []
        for gap in self._gaps(obj, wanted):
            for part in self._pace.requests(gap) if staged else split_by_segment(gap):
                self._turn += 1
                flight = Flight(obj, part, priority, self._turn, staged=staged, to_keep=to_keep)
                # Before the task runs: what another process lands in between would be fetched again.
                flight.claimed = self._store.claim(obj.key, part)
                obj.flights.append(flight)
                self.active += 1
                self.active_bytes += len(part)
                self._nursery.start_soon(self._run, flight)
                begun.append(flight)
        return begun

    def covering(self, obj: RemoteObject, extent: Extent) -> list[Flight]:
        """The flights that still bring at least one byte of `extent`. What has landed is the store's: should it be gone
        again, it is fetched anew, also while the flight that brought it goes on."""
        return [flight for flight in obj.flights if flight.coming.overlaps(extent)]

    def want(self, flight: Flight, deadline: float) -> None:
        """A read needs bytes of this flight and has until `deadline` (trio time): it overtakes what nobody reads yet."""
        flight.want(deadline)
        flight.urgent = True
        if flight.order is not None and flight.order.priority is Priority.AHEAD:
            self._fetcher.promote(flight.order)

    def abandon(self, obj: RemoteObject) -> None:
        """Nobody has the object open: flights that nobody waits for and that are far from their end are cancelled."""
        for flight in obj.flights:
            if not flight.waiters and flight.extent.stop - flight.landed > FINISH_BYTES_MAX:
                flight.scope.cancel()

    def _gaps(self, obj: RemoteObject, wanted: Extent) -> Iterator[Extent]:
        start = wanted.start
        for coming in sorted(flight.coming for flight in self.covering(obj, wanted)):
            if coming.start > start:
                yield Extent(start, coming.start)
            start = max(start, coming.stop)
        if start < wanted.stop:
            yield Extent(start, wanted.stop)

    # --- one flight ---

    async def _run(self, flight: Flight) -> None:
        error: errors.ReadError | None = None  # cancelled: a reader that came in the same moment begins anew
        try:
            with flight.scope:
                if flight.priority is Priority.AHEAD:
                    # Trio runs what was begun together in any order, and who comes first gets the connection that is open.
                    await trio.lowlevel.checkpoint()
                async with sharing.fetched_once(self._store, flight):
                    error = await self._attempts(flight)
        except Exception as bug:  # this edge absorbs bugs: one failed flight, not a dead mount
            log.exception("a fetch of %s failed for an unforeseen reason", flight.object.label)
            error = errors.ReadError(f"{flight.object.label}: {type(bug).__name__}")
        finally:
            flight.object.flights.remove(flight)
            self.active -= 1
            self.active_bytes -= len(flight.extent)
            flight.end(error)
            if self.idle is not None and not flight.object.flights:
                self.idle(flight.object)
            if self.ended is not None:
                self.ended(flight)

    async def _attempts(self, flight: Flight) -> errors.ReadError | None:
        """Tries until the flight has landed (None) or the policy gives up (why)."""
        retry = RetryState(random=random.random)
        began = trio.current_time()
        refused: Lease | None = None
        while flight.coming:
            lease: Lease | None = None
            landed = flight.landed
            failure: FetchFailed | errors.ValohaiFuseError
            try:
                lease = await self._leases.lease(flight.object.file, refused)
                await self._attempt(flight, lease)
            except (FetchFailed, errors.ReadError, errors.ConfigurationError) as error:
                failure = error
            else:
                flight.object.last_failure = ""
                return None
            flight.object.last_failure = _words(failure)
            elapsed = trio.current_time() - began
            if flight.landed > landed:
                retry.progressed(elapsed_s=elapsed)
            if self._note(flight, failure):
                continue
            decision = retry.after(
                failure,
                elapsed_s=elapsed,
                deadline_s=max(flight.deadline - began, elapsed),
                lease_age_s=self._leases.age_s(lease) if lease is not None else None,
            )
            if isinstance(decision, GiveUp):
                if lease is not None and decision.error_class is errors.AccessRefusedError:
                    self._leases.note_denied(flight.object.file, lease)
                return self._given_up(flight, failure, decision)
            log.debug("%s: %s; %s", flight.object.label, failure, decision)
            self._metrics.count("fetch_retries")
            refused = lease if isinstance(decision, Renew) else None
            if isinstance(decision, RetryAfter):
                await trio.sleep(decision.delay_s)
        return None  # another process has brought all of it

    def _note(self, flight: Flight, failure: FetchFailed | errors.ValohaiFuseError) -> bool:
        """Tells whoever learns from a failure. True: it is mended, repeat at once."""
        if not isinstance(failure, FetchFailed):
            return False
        if failure.server_date_s is not None:
            self._leases.note_server_date(failure.server_date_s)
        if failure.kind is FailureKind.DISK:
            self._store.landing_failed(flight.object.key, flight.landed, failure.detail)
        return failure.kind is FailureKind.CHANGED and flight.object.distrust_cache()

    async def _attempt(self, flight: Flight, lease: Lease) -> None:
        obj = flight.object
        generation = obj.generation

        def landed(message: Landed) -> None:
            if obj.generation == generation:
                if obj.version != message.version:
                    obj.adopt(message.version)
                flight.advance(min(message.upto, flight.extent.stop))

        priority = Priority.DEMAND if flight.urgent else flight.priority
        ahead = priority is Priority.AHEAD and not flight.wanted
        async with self._store.landing(
            obj.key, flight.coming, ahead=ahead, staged=flight.staged, to_keep=flight.to_keep
        ) as place:
            if place is None:
                return  # no room for what nobody waits for, or on a disk that is to keep it
            order = FetchOrder(
                key=obj.key,
                extent=flight.coming,
                lease=lease,
                expect_version=obj.version,
                segment_path=place.segment_path,
                staging_path=place.staging_path,
                priority=Priority.DEMAND if flight.urgent else priority,
                awaited_upto=flight.awaited_upto,
                turn=flight.turn,
            )
            flight.order = order
            try:
                fetched: Fetched = await self._fetcher.fetch(order, landed)
                self._pace.note(fetched.fetched_bytes, fetched.total_s - fetched.first_byte_s, self.active)
                self._note_kept(order, fetched, to_keep=flight.to_keep)
            finally:
                flight.order = None
        if obj.generation != generation:
            raise errors.ObjectChangedError(f"{obj.label}: the object has changed in its store")
        obj.adopt(fetched.version)
        flight.advance(flight.extent.stop)

    def _note_kept(self, order: FetchOrder, fetched: Fetched, *, to_keep: bool) -> None:
        """Tells the store what the disk made of an order: how long readers waited for it, not who fetches for its sake."""
        if fetched.disk_error:
            self._store.landing_failed(order.key, order.extent.start, fetched.disk_error)
        elif not fetched.is_kept:
            self._store.note_passed_by(len(order.extent))
        elif not to_keep:
            self._store.note_landed(len(order.extent), fetched.disk_wait_s)

    def _given_up(
        self, flight: Flight, failure: FetchFailed | errors.ValohaiFuseError, decision: GiveUp
    ) -> errors.ReadError:
        obj = flight.object
        if isinstance(failure, FetchFailed):
            if failure.kind is FailureKind.CHANGED:
                return obj.changed(failure.detail)
            if failure.kind is FailureKind.MISSING:
                obj.missing = True
        self._metrics.count("fetch_failures")
        level = logging.WARNING if flight.wanted else logging.INFO
        log.log(level, "gave up on %s: %s", obj.label, decision.message)
        kind = decision.error_class if issubclass(decision.error_class, errors.ReadError) else errors.AccessRefusedError
        return kind(f"{obj.label}: {decision.message}", hint=decision.hint)


def _words(failure: FetchFailed | errors.ValohaiFuseError) -> str:
    return failure.detail if isinstance(failure, FetchFailed) else failure.message
