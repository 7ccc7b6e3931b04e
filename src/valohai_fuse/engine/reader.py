"""Reads: exactly the bytes asked for (fewer only at the end of the file), or an error from `errors.py` within the deadline.

A hit awaits nothing: plan, look into the store, return. What is returned may be lent by the store: whoever reads passes it on
before the next await. A miss begins the flights it needs synchronously and then waits for
its own bytes only. After they have landed the store is asked again, and only what it verified is returned; should a block
have vanished meanwhile (evicted, damaged), it is fetched again, a bounded number of times.

No invariant spans an await: generation, version and presence are looked at afresh after each.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from valohai_fuse import errors
from valohai_fuse.engine.fill import BackgroundFill, FillLimits
from valohai_fuse.engine.flights import Flights
from valohai_fuse.engine.loads import Loads
from valohai_fuse.engine.objects import Handle, RemoteObject
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent, align, split_by_segment
from valohai_fuse.model.readahead import FIRST_READ_BYTES, STREAMS_MAX, Plan
from valohai_fuse.model.tree import Inode
from valohai_fuse.ports import ABSENT, COLD, BlockStore, FileRef, Metrics, NotHere, ObjectKey, Priority

log = logging.getLogger(__name__)

Bytes = bytes | bytearray | memoryview

FORESEEN_MAX = 512
"""Twice as many as one directory's readers may have ahead of them."""
VANISHED_MAX = 5
"""How often the bytes of one read may land and be gone again before the read fails: a cache that is smaller than what is
read at once, or a disk that loses what it was given."""


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    """A snapshot: what is open and under way now."""

    open_files: int
    handles: int
    flights: int
    flight_bytes: int
    reads_waiting: int
    flights_ahead: int


class Ahead(enum.Enum):
    """What has become of a file that was to be fetched ahead."""

    BEGUN = enum.auto()
    """It is being fetched, or was opened meanwhile."""
    PRESENT = enum.auto()
    FULL = enum.auto()
    """Nothing: as much is in flight as readahead may take."""


class Reader:
    """Opens, reads and closes remote files by inode. All methods run on the trio thread."""

    def __init__(
        self,
        *,
        store: BlockStore,
        flights: Flights,
        loads: Loads,
        metrics: Metrics,
        describe: Callable[[Inode], tuple[ObjectKey, FileRef, str]],
        read_timeout_s: float,
        window_bytes_max: int,
        window_bytes_total: int,
        fill: FillLimits = FillLimits(),  # noqa: B008 - frozen
    ) -> None:
        self._store = store
        self._flights = flights
        self._loads = loads
        self._metrics = metrics
        self._describe = describe
        self._read_timeout_s = read_timeout_s
        self._window_bytes_max = window_bytes_max
        self._window_bytes_total = window_bytes_total
        self._objects: dict[Inode, RemoteObject] = {}
        self._foreseen: dict[Inode, RemoteObject] = {}
        """Cached files that nobody has opened yet, the last of those that were to be fetched ahead."""
        self._handles = 0
        self._opens = 0
        self._waiting = 0
        self._fill = BackgroundFill(flights=flights, metrics=metrics, gaps=self.gaps, limits=fill)
        flights.idle = self._forget

    # --- handles ---

    def open(self, inode: Inode) -> tuple[Handle, bool]:
        """A handle on the file, and whether what the kernel has cached of it is still good.

        Raises ObjectMissingError when the store is known to have lost it.
        """
        obj = self._object(inode)
        if obj.missing and not obj.handles:
            obj.missing = False  # it may be back: the next read finds out
            raise errors.ObjectMissingError(f"{obj.label}: the store says that it does not exist")
        if not (obj.handles or obj.flights) and obj.version is None:
            self._store.expect(obj.key)
        obj.handles += 1
        self._handles += 1
        self._opens += 1
        return Handle(obj, self._window_bytes_max, self._opens), obj.generation == 0

    def close(self, handle: Handle) -> None:
        """The last close of a file forgets it, except that it changed or vanished, which later opens must know."""
        obj = handle.object
        obj.handles -= 1
        self._handles -= 1
        if obj.handles == 0:
            self._fill.on_close(obj)
            self._flights.abandon(obj)
            self._forget(obj)

    def fetch_ahead(self, inode: Inode) -> Ahead:
        """Begins fetching a file that nobody has opened yet: the whole of a small one, the beginning of a large one. If it is
        cached, the disk is asked for it."""
        if self._flights.active_bytes >= self._window_bytes_max:
            return Ahead.FULL
        obj = self._object(inode)
        outcome = Ahead.BEGUN
        if obj.handles == 0 and not obj.flights and not obj.missing:
            wanted = align(0, min(obj.key.size, FIRST_READ_BYTES), obj.key.size)
            # Of one that is pinned to a version the store does not know whether it is that which is cached.
            is_expected = obj.version is None and self._store.expect(obj.key)
            if is_expected or not self._begin_ahead(obj, wanted, staged=True):
                outcome = Ahead.PRESENT
                self._foresee(obj)
        self._forget(obj)
        return outcome

    def _foresee(self, obj: RemoteObject) -> None:
        """Describing it again would cost the open as much as all else of it."""
        self._foreseen[obj.inode] = obj
        if len(self._foreseen) > FORESEEN_MAX:
            del self._foreseen[next(iter(self._foreseen))]

    def _object(self, inode: Inode) -> RemoteObject:
        obj = self._objects.get(inode)
        if obj is None:
            obj = self._foreseen.pop(inode, None)
            if obj is None:
                key, file, label = self._describe(inode)
                obj = RemoteObject(inode, key, file, label)
            self._objects[inode] = obj
        return obj

    def _forget(self, obj: RemoteObject) -> None:
        if obj.forgettable and self._objects.get(obj.inode) is obj:
            del self._objects[obj.inode]

    # --- reading ---

    async def read(self, handle: Handle, offset: int, size: int) -> Bytes:
        """Bytes [offset, offset + size) of the file, clipped at its end. Raises ReadError."""
        obj = handle.object
        handle.check()
        stop = min(offset + size, obj.key.size)
        if offset >= stop:
            return b""
        extent = Extent(offset, stop)
        began_t = trio.current_time() if log.isEnabledFor(logging.DEBUG) else None
        plan = handle.planner.on_read(offset, stop)
        self._metrics.count("reads")
        self._fill.on_read(obj, plan)
        found = self._look(obj, extent)
        if isinstance(found, NotHere):
            if found is not COLD and obj.is_repeat(extent, trio.current_time()):
                raise errors.DeadlineExceededError(
                    f"{obj.label}: given up a moment ago, and asked for again by the kernel"
                )
            try:
                found = await self._fetch_and_read(handle, extent, plan, found)
            except errors.DeadlineExceededError:
                obj.note_given_up(extent, trio.current_time())
                raise
        else:
            self._hit(handle, extent, plan)
        obj.served = True
        self._metrics.count("read_bytes", len(extent))
        if began_t is not None:
            _record(handle, extent, began_t)
        return found

    def _look(self, obj: RemoteObject, extent: Extent) -> Bytes | NotHere:
        if not self._version_known(obj, extent.start):
            return ABSENT
        assert obj.version is not None
        return self._store.read_nowait(obj.key, obj.version, extent, lend=True)

    def _version_known(self, obj: RemoteObject, offset: int) -> bool:
        """Whether the version is pinned; the cache may pin it, unless the store has contradicted the cache."""
        if obj.version is None and not obj.cache_distrusted:
            version = self._store.version(obj.key, offset)
            if version is not None:
                obj.adopt(version)
        return obj.version is not None

    async def _fetch_and_read(self, handle: Handle, extent: Extent, plan: Plan, found: NotHere) -> Bytes:
        obj = handle.object
        deadline = trio.current_time() + self._read_timeout_s
        self._waiting += 1
        try:
            with trio.CancelScope(deadline=deadline) as scope:
                for attempt in range(VANISHED_MAX):
                    result = await self._await_bytes(handle, extent, plan, found, deadline, distrust=attempt > 0)
                    if not isinstance(result, NotHere):
                        return result
                    found = result
                    log.debug(
                        "%s: bytes [%d, %d) vanished after landing, attempt %d", obj.label, *_range(extent), attempt + 1
                    )
            if scope.cancelled_caught:
                why = f"; the last failure: {obj.last_failure}" if obj.last_failure else ""
                raise errors.DeadlineExceededError(f"{obj.label}: no answer within {self._read_timeout_s:g} s{why}")
            raise errors.ReadError(
                f"{obj.label}: the cache loses what it is given", hint="look at the cache's file system"
            )
        finally:
            self._waiting -= 1

    async def _await_bytes(
        self, handle: Handle, extent: Extent, plan: Plan, found: NotHere, deadline: float, *, distrust: bool
    ) -> Bytes | NotHere:
        """One round: what is on the disk is read, what is missing is fetched; then the store is asked again.

        `distrust`: fetch all of it, whatever the store's tables say (a damaged block on a disk that cannot be written).
        """
        obj = handle.object
        if found is COLD:
            result = await self._read_cold(handle, extent, plan)
            if not isinstance(result, NotHere):
                self._hit(handle, extent, plan)
                return result
        began_t = trio.current_time()
        self._begin_demand(obj, extent, plan, distrust=distrust)
        self._look_ahead(obj, handle, plan)
        flights = self._flights.covering(obj, extent)
        is_alone = not obj.scattered_waiting
        obj.scattered_waiting += plan.is_scattered
        try:
            for flight in flights:
                self._flights.want(flight, deadline)
            for flight in flights:
                await flight.wait_landed(min(extent.stop, flight.extent.stop), deadline)
                handle.check()
        finally:
            obj.scattered_waiting -= plan.is_scattered
        self._metrics.count("miss_bytes", len(extent))
        self._fill.on_miss(obj, plan, trio.current_time() - began_t, is_alone=is_alone)
        again = self._look(obj, extent)
        if again is COLD and obj.version is not None:
            again = await self._store.read(obj.key, obj.version, extent)
            handle.check()
        return again

    async def _read_cold(self, handle: Handle, extent: Extent, plan: Plan) -> Bytes | NotHere:
        """What is on the disk: from memory, if it is being loaded there."""
        obj = handle.object
        if await self._loads.on_cold(handle, extent, plan):
            handle.check()
            found = self._look(obj, extent)
            if found is not COLD:
                return found
        assert obj.version is not None
        result = await self._store.read(obj.key, obj.version, extent)
        handle.check()
        return result

    def _begin_demand(self, obj: RemoteObject, extent: Extent, plan: Plan, *, distrust: bool) -> None:
        demand = align(extent.start, extent.stop, obj.key.size)
        if obj.version is None or distrust:
            stop = plan.ahead.stop if plan.ahead.start == demand.stop else demand.stop
            self._flights.begin(obj, Extent(demand.start, stop), Priority.DEMAND, staged=True)
            return
        for gap in self._store.missing(obj.key, obj.version, demand):
            joined = Extent(gap.start, self._joined_stop(obj, gap, plan))
            self._flights.begin(obj, joined, Priority.DEMAND, staged=True)

    def _joined_stop(self, obj: RemoteObject, gap: Extent, plan: Plan) -> int:
        """Where a demand for `gap` may end so that what is planned right behind it comes with the same request."""
        if gap.stop != plan.ahead.start or not plan.ahead or obj.version is None:
            return gap.stop
        behind = self._store.missing(obj.key, obj.version, plan.ahead)
        return behind[0].stop if behind and behind[0].start == gap.stop else gap.stop

    def _hit(self, handle: Handle, extent: Extent, plan: Plan) -> None:
        """The bytes were cached. What follows a scattered read would come with its request; alone it is not worth one."""
        self._metrics.count("hit_bytes", len(extent))
        if plan.is_scattered:
            self._fill.on_hit(handle.object, plan)
            if plan.elsewhere:
                self._share_window(handle)
                self._begin_elsewhere(handle.object, plan)
        else:
            self._loads.on_hit(handle, extent)
            self._look_ahead(handle.object, handle, plan)

    def _look_ahead(self, obj: RemoteObject, handle: Handle, plan: Plan) -> None:
        if not plan.ahead and not plan.elsewhere and not (handle.unlooked and not handle.loaded_upto):
            return
        self._share_window(handle)
        wanted = [plan.ahead]
        if handle.loaded_upto and not obj.flights:
            wanted = [self._put_off(handle, plan.ahead)]
        elif handle.unlooked:
            wanted, handle.unlooked = [*handle.unlooked, plan.ahead], []
        for extent in wanted:
            if extent:
                self._begin_ahead(obj, extent, staged=True)
        self._begin_elsewhere(obj, plan)

    def _share_window(self, handle: Handle) -> None:
        """For the plans to come."""
        handle.planner.window_bytes_max = min(self._window_bytes_max, self._window_bytes_total // max(1, self._handles))

    def _begin_elsewhere(self, obj: RemoteObject, plan: Plan) -> None:
        for extent in plan.elsewhere:
            # In memory a small one would take a whole segment, and few would be there when they are read.
            if not self._begin_ahead(obj, extent, staged=len(extent) >= SEGMENT_BYTES // 2):
                self._store.expect_read(obj.key, extent)

    def _put_off(self, handle: Handle, ahead: Extent) -> Extent:
        """Leaves looking at what is `ahead` to those who load it anyway: a file's table, which would have to come from the disk
        while everything else waits. Returns what is beyond the whole segments, for that they do not load."""
        size = handle.object.key.size
        whole_stop = min(ahead.stop, size - size % SEGMENT_BYTES)
        if ahead.start >= whole_stop:
            return ahead
        put_off, start = handle.unlooked, ahead.start
        if put_off and put_off[-1].stop == start:
            # What lies further back than a window has been read.
            start = max(put_off.pop().start, whole_stop - handle.planner.window_bytes_max)
        handle.unlooked = [*put_off[1 - STREAMS_MAX :], Extent(start, whole_stop)]
        return Extent(whole_stop, ahead.stop)

    def gaps(self, obj: RemoteObject, wanted: Extent, *, to_keep: bool = False) -> list[Extent]:
        """The parts of `wanted` (block-aligned) that the cache lacks, by its tables; all of it while no version is known.

        `to_keep`: as in `BlockStore.missing`.
        """
        if not self._version_known(obj, wanted.start):
            return [wanted]
        assert obj.version is not None
        return self._store.missing(obj.key, obj.version, wanted, to_keep=to_keep)

    def _begin_ahead(self, obj: RemoteObject, wanted: Extent, *, staged: bool) -> bool:
        """Whether any of it had to be fetched."""
        is_begun = False
        # One after the other: a flight claims its blocks, and what another process lands between look and claim comes twice.
        for part in split_by_segment(wanted):
            for gap in self.gaps(obj, part):
                self._metrics.count("ahead_bytes", len(gap))
                self._flights.begin(obj, gap, Priority.AHEAD, staged=staged)
                is_begun = True
        return is_begun

    # --- seeing inside ---

    def statistics(self) -> ReaderStatistics:
        """What is open and under way now."""
        return ReaderStatistics(
            len(self._objects),
            self._handles,
            self._flights.active,
            self._flights.active_bytes,
            self._waiting,
            sum(not flight.urgent for obj in self._objects.values() for flight in obj.flights),
        )

    def open_labels(self, limit: int) -> list[str]:
        """Names of files that are open now, `limit` at the most."""
        return [obj.label for obj in self._objects.values() if obj.handles][:limit]


def _record(handle: Handle, extent: Extent, began_t: float) -> None:
    """A line of the log from which `scripts/simulate` makes a trace."""
    obj = handle.object
    log.debug(
        "read handle=%d file=%d offset=%d size=%d of=%d at=%.6f took=%.6f",
        handle.number,
        obj.inode,
        extent.start,
        len(extent),
        obj.key.size,
        began_t,
        trio.current_time() - began_t,
    )


def _range(extent: Extent) -> tuple[int, int]:
    return extent.start, extent.stop
