"""`ports.Fetcher`: which order goes to which worker process, and when.

Demand overtakes: of `connections` requests under way at the most, a quarter (two at least) is never given to AHEAD orders,
so that a reader never waits behind a guess. Orders go where a connection to their store lies idle, unless that worker has
clearly more to do than another. Workers start with the first order and as load calls for them; those that stay idle are
closed, all but one.

Concurrency: everything here happens on the trio thread. `_assign` alone moves an order from waiting to under way, and
`_conclude` alone takes it out again; neither awaits, so no invariant spans a checkpoint:
`_active == sum(len(w.orders) for w in _workers)`, `_active <= connections`, `_active_ahead <= _ahead_max`.
Must not know: retries, leases, what a block is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from bisect import insort
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import trio

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.fetch import wire
from valohai_fuse.fetch.authorities import system_ca_file
from valohai_fuse.fetch.process import WorkerProcess
from valohai_fuse.ports import FailureKind, Fetched, FetchFailed, FetchOrder, Landed, Metrics, Priority

_log = logging.getLogger(__name__)

_ORDERS_PER_WORKER = 2
"""From this many orders under way on each worker on, another worker is started."""
_WARM_BONUS = 4
"""How many more orders a worker may have under way than another and still get one for its idle connection."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A moment of the pool."""

    workers: int
    waiting: int
    active: int
    active_ahead: int
    requests: int
    connections_new: int


@dataclass(eq=False, slots=True)
class _Ticket:
    """One call of `fetch`."""

    id: int
    order: FetchOrder
    framed: bytes = field(repr=False)
    landed: Callable[[Landed], None]
    priority: Priority
    origin: str
    ended: trio.Event = field(default_factory=trio.Event)
    result: Fetched | BaseException | None = None
    worker: _Worker | None = None
    landed_bytes: int = 0


def _turn(ticket: _Ticket) -> int:
    return ticket.order.turn


@dataclass(eq=False, slots=True)
class _Worker:
    process: WorkerProcess
    orders: dict[int, _Ticket] = field(default_factory=dict)
    idle_connections: Counter[str] = field(default_factory=Counter)
    """By origin; an estimate, for stores close connections without telling."""
    ready: bool = False
    idle_since_s: float = 0.0


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
        idle_s: float = 60,
    ) -> None:
        """`workers` 0: as many as processors, four at the most. `ca_file` is trusted beside the system's authorities.

        Raises ConfigurationError when `ca_file` cannot be read.
        """
        if ca_file is not None and not os.access(ca_file, os.R_OK):
            raise ConfigurationError(f"cannot read the certificate authorities in {ca_file}", hint="check --ca-file")
        self._metrics = metrics
        self._workers_max = workers or min(4, len(os.sched_getaffinity(0)))
        self._connections = connections
        self._ahead_max = max(1, min(connections - 2, connections * 3 // 4))
        self._idle_s = idle_s
        self._configure = wire.Configure(
            connections=connections,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
            ca_file=system_ca_file(),
            extra_ca_file=ca_file,
        )
        self._waiting: dict[Priority, list[_Ticket]] = {priority: [] for priority in Priority}
        """Ascending by turn: tasks that order do not run in the order in which the engine began them."""
        self._workers: list[_Worker] = []
        self._active = 0
        self._active_ahead = 0
        self._next_id = 0
        self._requests = 0
        self._connections_new = 0
        self._nursery: trio.Nursery | None = None
        self._several_workers = trio.Event()
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
                    self._end(queue.pop(0), _lost("the pool is closed"))

    def prewarm(self) -> None:
        """Starts the first worker, so that the first order does not wait for one (70 ms and more). Once: where that fails, the
        orders will say so, not whoever asks for this again and again."""
        if not self._prewarmed:
            self._prewarmed = True
            if not self._workers:
                self._spawn()

    async def fetch(self, order: FetchOrder, landed: Callable[[Landed], None]) -> Fetched:
        """As `ports.Fetcher.fetch`; what `landed` raises ends the order and is raised here. Raises ValueError for an order
        without bytes."""
        if not len(order.extent):
            raise ValueError("an order without bytes")
        self._next_id += 1
        # Framed here, so that what cannot be encoded is this caller's error and nobody else's.
        framed = wire.frame(_wire_order(self._next_id, order))
        ticket = _Ticket(self._next_id, order, framed, landed, order.priority, _origin(order.lease.url))
        if self._nursery is None:
            raise _lost("the pool is closed")
        insort(self._waiting[ticket.priority], ticket, key=_turn)
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
        moves to the demand queue. No such order: nothing happens."""
        for ticket in self._waiting[Priority.AHEAD]:
            if ticket.order is order:
                self._waiting[Priority.AHEAD].remove(ticket)
                ticket.priority = Priority.DEMAND
                insort(self._waiting[Priority.DEMAND], ticket, key=_turn)
                self._assign()
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

    def _assign(self) -> None:
        """Hands waiting orders to workers as far as the limits allow."""
        while self._nursery is not None and (ticket := self._next_ticket()) is not None:
            worker = self._choose(ticket.origin)
            if worker is None:
                self._end(ticket, _lost("no worker process can be started"))
                continue
            self._send(ticket, worker)

    def _next_ticket(self) -> _Ticket | None:
        if self._active >= self._connections:
            return None
        if self._waiting[Priority.DEMAND]:
            return self._waiting[Priority.DEMAND].pop(0)
        if self._waiting[Priority.AHEAD] and self._active_ahead < self._ahead_max:
            return self._waiting[Priority.AHEAD].pop(0)
        return None

    def _choose(self, origin: str) -> _Worker | None:
        if len(self._workers) < self._workers_max and all(
            w.ready and len(w.orders) >= _ORDERS_PER_WORKER for w in self._workers
        ):
            self._spawn()
        # A worker that is still starting gets nothing while another can take it.
        candidates = [w for w in self._workers if w.ready] or self._workers
        return min(
            candidates,
            key=lambda w: len(w.orders) - (_WARM_BONUS if w.idle_connections[origin] > 0 else 0),
            default=None,
        )

    def _send(self, ticket: _Ticket, worker: _Worker) -> None:
        ticket.worker = worker
        worker.orders[ticket.id] = ticket
        if worker.idle_connections[ticket.origin] > 0:
            worker.idle_connections[ticket.origin] -= 1
        self._active += 1
        self._active_ahead += ticket.priority is Priority.AHEAD
        self._requests += 1
        self._metrics.count("fetches")
        worker.process.post(ticket.framed)

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def _received(self, worker: _Worker, message: wire.ToPool) -> None:
        if isinstance(message, wire.Ready):
            worker.ready = True
            return
        ticket = worker.orders.get(message.id)
        if ticket is None:
            return  # cancelled meanwhile
        if isinstance(message, wire.Landed):
            self._progress(ticket, message)
        elif isinstance(message, wire.Done):
            worker.idle_connections[ticket.origin] += 1
            extent = ticket.order.extent
            if ticket.landed_bytes < len(extent):
                self._progress(ticket, wire.Landed(id=message.id, upto=extent.stop, version=message.version))
            if ticket.ended.is_set():
                return  # whoever ordered did not like what landed
            self._count(message.fetched_bytes - ticket.landed_bytes, new_connection=message.new_connection)
            self._metrics.count("fetch_first_byte_seconds", message.first_byte_s)
            self._conclude(
                ticket,
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
        else:
            self._count(message.fetched_bytes - ticket.landed_bytes, new_connection=False)
            self._conclude(
                ticket,
                FetchFailed(
                    FailureKind(message.kind),
                    message.detail,
                    status=message.status,
                    retry_after_s=message.retry_after_s,
                    server_date_s=message.server_date_s,
                ),
            )

    def _progress(self, ticket: _Ticket, message: wire.Landed) -> None:
        landed_bytes = message.upto - ticket.order.extent.start
        self._count(landed_bytes - ticket.landed_bytes, new_connection=False)
        ticket.landed_bytes = landed_bytes
        try:
            ticket.landed(Landed(message.upto, message.version))
        except Exception as error:  # noqa: BLE001 - a fault of the caller's ends the caller's order, not the pool
            self._cancel(ticket, error)

    def _count(self, fetched_bytes: int, *, new_connection: bool) -> None:
        if fetched_bytes > 0:
            self._metrics.count("fetched_bytes", fetched_bytes)
        if new_connection:
            self._connections_new += 1
            self._metrics.count("connections_opened")

    def _conclude(self, ticket: _Ticket, result: Fetched | BaseException) -> None:
        """Frees what an order under way holds, and passes it on to the next."""
        worker = ticket.worker
        assert worker is not None
        del worker.orders[ticket.id]
        if not worker.orders:
            worker.idle_since_s = trio.current_time()
        self._active -= 1
        self._active_ahead -= ticket.priority is Priority.AHEAD
        self._end(ticket, result)
        self._assign()

    @staticmethod
    def _end(ticket: _Ticket, result: Fetched | BaseException) -> None:
        ticket.result = result
        ticket.ended.set()

    def _withdraw(self, ticket: _Ticket) -> None:
        """The caller was cancelled: the order's connection is free for others at once."""
        if ticket.ended.is_set():
            return
        if ticket.worker is None:
            self._waiting[ticket.priority].remove(ticket)
        else:
            self._cancel(ticket, _lost("cancelled"))

    def _cancel(self, ticket: _Ticket, reason: BaseException) -> None:
        assert ticket.worker is not None
        ticket.worker.process.post(wire.frame(wire.Cancel(id=ticket.id)))
        self._conclude(ticket, reason)

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
        worker = _Worker(process, idle_since_s=trio.current_time())
        self._workers.append(worker)
        self._metrics.count("workers_started")
        self._metrics.gauge("workers", len(self._workers))
        if len(self._workers) > 1:
            self._several_workers.set()
        self._nursery.start_soon(self._serve, worker)

    async def _serve(self, worker: _Worker) -> None:
        try:
            await worker.process.serve(lambda message: self._received(worker, message))
        finally:
            self._bury(worker)

    def _bury(self, worker: _Worker) -> None:
        if worker in self._workers:  # not one that was closed for idleness
            self._workers.remove(worker)
            self._metrics.gauge("workers", len(self._workers))
            if self._nursery is not None:
                self._metrics.count("workers_lost")
        if worker.orders and self._nursery is not None:
            _log.warning("a fetch worker (pid %d) died with %d orders", worker.process.pid, len(worker.orders))
        for ticket in list(worker.orders.values()):
            self._conclude(ticket, _lost("the worker process died"))

    async def _retire_idle_workers(self) -> None:
        """Closes what has been idle for long; sleeps for good while there is only one worker."""
        while True:
            await self._several_workers.wait()
            await trio.sleep(self._idle_s / 2)
            idle_before_s = trio.current_time() - self._idle_s
            for worker in [w for w in self._workers if not w.orders and w.idle_since_s <= idle_before_s]:
                if len(self._workers) > 1:
                    self._workers.remove(worker)
                    worker.process.close()
            self._metrics.gauge("workers", len(self._workers))
            if len(self._workers) <= 1:
                self._several_workers = trio.Event()


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


def _wire_order(order_id: int, order: FetchOrder) -> wire.Order:
    return wire.Order(
        id=order_id,
        url=wire.name_bytes(order.lease.url),
        headers=tuple((wire.name_bytes(name), wire.name_bytes(value)) for name, value in order.lease.headers),
        stable_id=wire.name_bytes(order.key.stable_id),
        size=order.key.size,
        start=order.extent.start,
        stop=order.extent.stop,
        expect_version=order.expect_version,
        segment_path=os.fsencode(order.segment_path),
        staging_path=os.fsencode(order.staging_path),
        awaited_upto=order.awaited_upto,
    )


def _origin(url: str) -> str:
    match = re.match(r"[A-Za-z]+://[^/?#]*", url)
    return match[0].lower() if match else ""


def _lost(detail: str) -> FetchFailed:
    return FetchFailed(FailureKind.WORKER_LOST, detail)
