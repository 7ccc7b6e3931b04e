"""`ports.Fetcher`: which order goes to which worker process, and when.

Demand overtakes: of `connections` requests under way at the most, a quarter (two at least) is never given to AHEAD orders,
so that a reader never waits behind a guess. Orders go where a connection to their store lies idle, unless that worker has
clearly more to do than another. Workers start with the first order and as load calls for them; those that stay idle are
closed, the last one later than the others.

What a reader waits for and a store answers much later than its peers is asked for once more, on another connection, within
the bounds of `model.hedge`; the worker says what is late, for it knows when the request was on the wire.

Concurrency: everything here happens on the trio thread. `_send` alone puts a request under way, and `_leave` alone takes it
out again; neither awaits, so no invariant spans a checkpoint:
`_active == sum(len(w.legs) for w in _workers)`, `_active <= connections`, `_active_ahead <= _ahead_max`.
Must not know: retries, leases, what a block is.
"""

from __future__ import annotations

import contextlib
import logging
import os
from bisect import insort
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio
from cachetools import LRUCache

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.fetch import tickets, wire
from valohai_fuse.fetch.authorities import system_ca_file
from valohai_fuse.fetch.process import WorkerProcess
from valohai_fuse.fetch.tickets import Leg, Ticket, Worker, lost
from valohai_fuse.model.hedge import Hedging
from valohai_fuse.ports import FailureKind, Fetched, FetchFailed, FetchOrder, Landed, Metrics, Priority
from valohai_fuse.settings import has_http_proxy

_log = logging.getLogger(__name__)

BEHIND_BYTES = 64 * 1024 * 1024
"""How much may wait in all workers to be written to the disk behind the readers' backs."""
_ORDERS_PER_WORKER = 2
"""From this many orders under way on each worker on, another worker is started."""
_WARM_BONUS = 4
"""How many more orders a worker may have under way than another and still get one for its idle connection."""
_LAST_PATIENCE = 5
"""How many times as long the last worker may be idle as the others. By then its connections are of no use either."""
_HOSTS_MAX = 64
"""Of so many hosts it is known how soon they answer."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A moment of the pool."""

    workers: int
    waiting: int
    active: int
    active_ahead: int
    requests: int
    connections_new: int


class WorkerPool:
    """See the module's text. Runs within `run` (or `open_pool`); `fetch` may be called while that is so."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        workers: int = 0,
        connections: int = 32,
        connect_timeout_s: float = 10,
        stall_timeout_s: float = 30,
        ca_file: str | None = None,
        hedging: bool = True,
        idle_s: float = 60,
        disk_may_hang: bool = False,
    ) -> None:
        """`workers` 0: half as many as processors, four at the most. `ca_file` is trusted beside the system's authorities.
        `disk_may_hang`: the cache's. The last worker does not end for idleness, for starting another may hang; and what is given
        memory to land in lands nowhere else.

        Raises ConfigurationError when `ca_file` cannot be read.
        """
        if ca_file is not None and not os.access(ca_file, os.R_OK):
            raise ConfigurationError(f"cannot read the certificate authorities in {ca_file}", hint="check --ca-file")
        self._metrics = metrics
        # The other half is the daemon's and the job's: one more worker on two processors was slower (docs/decisions.md).
        self._workers_max = workers or max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        self._connections = connections
        self._ahead_max = max(1, min(connections - 2, connections * 3 // 4))
        self._idle_s = idle_s
        self._disk_may_hang = disk_may_hang
        self._configure = wire.Configure(
            connections=connections,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
            ca_file=system_ca_file(),
            extra_ca_file=ca_file,
            has_http_proxy=has_http_proxy(),
            behind_bytes_max=BEHIND_BYTES // self._workers_max,
        )
        self._hedging = hedging
        self._hosts: LRUCache[str, Hedging] = LRUCache(_HOSTS_MAX)
        """By origin."""
        self._waiting: dict[Priority, list[Ticket]] = {priority: [] for priority in Priority}
        """Ascending by turn: tasks that order do not run in the order in which the engine began them."""
        self._workers: list[Worker] = []
        self._active = 0
        self._active_ahead = 0
        self._next_id = 0
        self._requests = 0
        self._connections_new = 0
        self._nursery: trio.Nursery | None = None
        self._workers_run = trio.Event()
        self._prewarmed = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; returns with all workers gone and all orders ended (WORKER_LOST)."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                try:
                    await self._retire_idle_workers()
                finally:
                    self._nursery = None  # from here on nothing is assigned or started
        finally:
            for queue in self._waiting.values():
                while queue:
                    queue.pop(0).end(lost("the pool is closed"))

    def prewarm(self) -> None:
        """Starts the first worker, so that the first order does not wait for one (70 ms and more). Once until idleness has ended
        the last: where that fails, the orders will say so, not whoever asks for this again and again."""
        if not self._prewarmed:
            self._prewarmed = True
            if not self._workers:
                self._spawn()

    async def fetch(self, order: FetchOrder, landed: Callable[[Landed], None]) -> Fetched:
        """As `ports.Fetcher.fetch`; what `landed` raises ends the order and is raised here. Raises ValueError for an order
        without bytes."""
        if not len(order.extent):
            raise ValueError("an order without bytes")
        ticket = self._ticket(order, landed)
        if self._nursery is None:
            raise lost("the pool is closed")
        insort(self._waiting[ticket.priority], ticket, key=tickets.turn)
        self._assign()
        try:
            await ticket.ended.wait()
        except trio.Cancelled:
            self._withdraw(ticket)
            raise
        if isinstance(ticket.result, Fetched):
            return ticket.result
        assert ticket.result is not None
        raise ticket.result

    def promote(self, order: FetchOrder) -> None:
        """A reader now waits for this AHEAD order (the same object that was given to `fetch`): if it has not been sent, it
        moves to the demand queue; if it is late, it is asked for once more. No such order: nothing happens."""
        for ticket in self._waiting[Priority.AHEAD]:
            if ticket.order is order:
                self._waiting[Priority.AHEAD].remove(ticket)
                ticket.priority, ticket.is_wanted = Priority.DEMAND, True
                insort(self._waiting[Priority.DEMAND], ticket, key=tickets.turn)
                self._assign()
                return
        for ticket in [leg.ticket for worker in self._workers for leg in worker.legs.values()]:
            if ticket.order is order:
                ticket.is_wanted = True
                if ticket.is_late:
                    self._hedge(ticket)
                return

    def statistics(self) -> PoolStatistics:
        """Where the pool stands."""
        return PoolStatistics(
            workers=len(self._workers),
            waiting=sum(map(len, self._waiting.values())),
            active=self._active,
            active_ahead=self._active_ahead,
            requests=self._requests,
            connections_new=self._connections_new,
        )

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes that run now."""
        return tuple(worker.process.pid for worker in self._workers)

    # --- who gets what ------------------------------------------------------------------------------------------------

    def _ticket(self, order: FetchOrder, landed: Callable[[Landed], None]) -> Ticket:
        """Framed at once, so that what cannot be encoded is this caller's error and nobody else's."""
        self._next_id += 1
        origin = tickets.origin(order.lease.url)
        framed = tickets.framed(
            self._next_id,
            order,
            start=order.extent.start,
            expect_version=order.expect_version,
            late_after_s=self._host(origin).late_after_s if self._hedging else 0.0,
        )
        return Ticket(
            self._next_id,
            order,
            framed,
            landed,
            order.priority,
            origin,
            is_wanted=order.priority is Priority.DEMAND,
            version=order.expect_version,
            upto=order.extent.start,
        )

    def _host(self, origin: str) -> Hedging:
        host: Hedging | None = self._hosts.get(origin)
        if host is None:
            host = self._hosts[origin] = Hedging()
        return host

    def _assign(self) -> None:
        """Hands waiting orders to workers as far as the limits allow."""
        while self._nursery is not None and (ticket := self._next_ticket()) is not None:
            worker = self._choose(ticket.origin)
            if worker is None:
                ticket.end(lost("no worker process can be started"))
                continue
            self._host(ticket.origin).sent()
            is_ahead = ticket.priority is Priority.AHEAD
            self._send(Leg(ticket.id, ticket, worker, ticket.order.extent.start, is_ahead), ticket.framed)

    def _next_ticket(self) -> Ticket | None:
        if self._active >= self._connections:
            return None
        if self._waiting[Priority.DEMAND]:
            return self._waiting[Priority.DEMAND].pop(0)
        if self._waiting[Priority.AHEAD] and self._active_ahead < self._ahead_max:
            return self._waiting[Priority.AHEAD].pop(0)
        return None

    def _choose(self, origin: str) -> Worker | None:
        if len(self._workers) < self._workers_max and all(
            w.ready and len(w.legs) >= _ORDERS_PER_WORKER for w in self._workers
        ):
            self._spawn()
        # A worker that is still starting gets nothing while another can take it.
        candidates = [w for w in self._workers if w.ready] or self._workers
        return min(
            candidates,
            key=lambda w: len(w.legs) - (_WARM_BONUS if w.idle_connections[origin] > 0 else 0),
            default=None,
        )

    def _send(self, leg: Leg, framed: bytes) -> None:
        worker, origin = leg.worker, leg.ticket.origin
        leg.ticket.legs.append(leg)
        worker.legs[leg.id] = leg
        if worker.idle_connections[origin] > 0:
            worker.idle_connections[origin] -= 1
        self._active += 1
        self._active_ahead += leg.is_ahead
        self._requests += 1
        self._metrics.count("fetches")
        worker.process.post(framed)

    def _hedge(self, ticket: Ticket) -> None:
        """Asks once more for what has not landed of a late ticket, unless nobody waits for it or a bound forbids it; what is
        forbidden now may be allowed when the worker says late again. Never more than one."""
        is_worth_it = ticket.is_wanted and not ticket.is_hedged and ticket.upto < ticket.order.extent.stop
        is_possible = not (self._disk_may_hang and ticket.order.staging_path)  # a hedge lands in the file
        if not is_worth_it or not is_possible or self._active >= self._connections or self._nursery is None:
            return
        worker = self._choose(ticket.origin)
        if worker is None or not self._host(ticket.origin).take(trio.current_time()):
            return
        ticket.is_hedged = True
        self._next_id += 1
        leg = Leg(self._next_id, ticket, worker, ticket.upto, is_ahead=False, is_hedge=True)
        self._metrics.count("fetch_hedges")
        self._send(
            leg,
            tickets.framed(
                leg.id,
                ticket.order,
                start=leg.start,
                expect_version=ticket.version,
                late_after_s=0.0,
                is_hedge=True,
            ),
        )

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def _received(self, worker: Worker, message: wire.ToPool) -> None:
        if isinstance(message, wire.Ready):
            worker.ready = True
            return
        leg = worker.legs.get(message.id)
        if leg is None:
            return  # whoever ordered is gone
        ticket = leg.ticket
        match message:
            case wire.Late():
                ticket.is_late = True
                self._hedge(ticket)
            case wire.Landed() | wire.Done() if ticket.version not in {None, message.version}:
                # Both were under way before either told the version, and the object changed in between.
                if isinstance(message, wire.Done):
                    self._leave(leg, FetchFailed(FailureKind.CHANGED, "another ETag than before"))
                else:
                    leg.cancel()
            case wire.Landed():
                self._progress(leg, message.upto, message.version)
            case wire.Done():
                self._done(leg, message)
            case wire.Cancelled():
                self._count(leg, message.fetched_bytes)
                self._leave(leg, None)
            case wire.Failed():
                self._failed(leg, message)

    def _progress(self, leg: Leg, upto: int, version: str) -> None:
        self._count(leg, upto - leg.start)
        try:
            is_news = leg.ticket.advance(leg, upto, version)
        except Exception as error:  # noqa: BLE001 - a fault of the caller's ends the caller's order, not the pool
            self._cancel(leg.ticket, error)
            return
        if is_news and leg.is_hedge and upto == leg.ticket.order.extent.stop:
            self._metrics.count("fetch_hedges_won")

    def _done(self, leg: Leg, message: wire.Done) -> None:
        ticket = leg.ticket
        leg.worker.idle_connections[ticket.origin] += 1
        self._progress(leg, ticket.order.extent.stop, message.version)
        if ticket.ended.is_set():
            return  # whoever ordered did not like what landed
        self._count(leg, message.fetched_bytes)
        self._metrics.count("fetch_first_byte_seconds", message.first_byte_s)
        if message.new_connection:
            self._connections_new += 1
            self._metrics.count("connections_opened")
        else:
            self._host(ticket.origin).answered(message.first_byte_s)
        self._leave(
            leg,
            Fetched(
                version=message.version,
                fetched_bytes=message.fetched_bytes,
                first_byte_s=message.first_byte_s,
                total_s=message.total_s,
                new_connection=message.new_connection,
                disk_wait_s=message.disk_wait_s,
                is_kept=message.is_kept,
                disk_error=message.disk_error,
            ),
        )

    def _failed(self, leg: Leg, message: wire.Failed) -> None:
        kind = FailureKind(message.kind)
        if kind is FailureKind.THROTTLED:
            self._host(leg.ticket.origin).throttled(trio.current_time())
        self._count(leg, message.fetched_bytes)
        self._leave(
            leg,
            FetchFailed(
                kind,
                message.detail,
                status=message.status,
                retry_after_s=message.retry_after_s,
                server_date_s=message.server_date_s,
            ),
        )

    def _count(self, leg: Leg, fetched_bytes: int) -> None:
        """A request has fetched that much so far, at the least."""
        if fetched_bytes > leg.fetched_bytes:
            self._metrics.count("fetched_bytes", fetched_bytes - leg.fetched_bytes)
            leg.fetched_bytes = fetched_bytes

    def _leave(self, leg: Leg, result: Fetched | BaseException | None) -> None:
        """Frees what a request under way holds, and passes it on to the next. With its last request an order is over."""
        worker, ticket = leg.worker, leg.ticket
        del worker.legs[leg.id]
        if not worker.legs:
            worker.idle_since_s = trio.current_time()
        self._active -= 1
        self._active_ahead -= leg.is_ahead
        if ticket.leave(leg, result):
            if ticket.is_hedged:
                self._metrics.count("fetch_hedge_bytes", max(0, ticket.fetched_bytes - len(ticket.order.extent)))
            ticket.end(ticket.result or lost("cancelled"))
        self._assign()

    def _withdraw(self, ticket: Ticket) -> None:
        """The caller was cancelled: the order's connections are free for others at once."""
        if ticket.ended.is_set():
            return
        if ticket.legs:
            self._cancel(ticket, lost("cancelled"))
        else:
            self._waiting[ticket.priority].remove(ticket)

    def _cancel(self, ticket: Ticket, reason: BaseException) -> None:
        ticket.result = None
        for leg in ticket.legs.copy():
            leg.cancel()
            self._leave(leg, reason)

    # --- the workers' lives -------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        """Adds a worker; where that fails, says so in the log and adds none."""
        if self._nursery is None:
            return
        try:
            process = WorkerProcess(self._configure)
        except OSError as error:
            _log.warning("cannot start a fetch worker: %s", error.strerror)
            return
        worker = Worker(process, idle_since_s=trio.current_time())
        self._workers.append(worker)
        self._metrics.count("workers_started")
        self._metrics.gauge("workers", len(self._workers))
        self._workers_run.set()
        self._nursery.start_soon(self._serve, worker)

    async def _serve(self, worker: Worker) -> None:
        try:
            await worker.process.serve(lambda message: self._received(worker, message))
        finally:
            self._bury(worker)

    def _bury(self, worker: Worker) -> None:
        if worker in self._workers:  # not one that was closed for idleness
            self._workers.remove(worker)
            self._metrics.gauge("workers", len(self._workers))
            if self._nursery is not None:
                self._metrics.count("workers_lost")
        if worker.legs and self._nursery is not None:
            _log.warning("a fetch worker (pid %d) died with %d orders", worker.process.pid, len(worker.legs))
        for leg in list(worker.legs.values()):
            self._leave(leg, lost("the worker process died"))

    async def _retire_idle_workers(self) -> None:
        """Closes what has been idle for long, the last one later than the others; sleeps for good while there is none."""
        while True:
            await self._workers_run.wait()
            await trio.sleep(self._idle_s / 2)
            now_s = trio.current_time()
            for worker in [w for w in self._workers if not w.legs]:
                is_last = len(self._workers) == 1
                if is_last and self._disk_may_hang:
                    continue
                if now_s - worker.idle_since_s >= self._idle_s * (_LAST_PATIENCE if is_last else 1):
                    self._workers.remove(worker)
                    worker.process.close()
                    self._prewarmed = self._prewarmed and not is_last
            self._metrics.gauge("workers", len(self._workers))
            if not self._workers:
                self._workers_run = trio.Event()


@contextlib.asynccontextmanager
async def open_pool(pool: WorkerPool) -> AsyncIterator[WorkerPool]:
    """Runs the pool for the time of the block. What the block raises comes out as it is, not in a group."""
    raised: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: pool.run(task_status=task_status))
        try:
            yield pool
        except Exception as error:  # noqa: BLE001 - raised again below, outside of the nursery
            raised = error
        nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised
