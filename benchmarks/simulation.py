"""A mount in virtual time: the real planner, a modelled engine, a modelled line.

What is modelled as it is: plans are carried out as `engine.reader` and `engine.flights` do it (a block in flight or landed is not
asked for again; an order stays within a segment; what follows a demand directly comes with it; a file that is closed cancels
what nobody needs), what is read at random is completed as `engine.fill` does it, and orders are let go as `fetch.pool` does it
(so many at once, a quarter of them not for guesses, demand first).

What is simplified: the bytes of all answers share one line evenly, each at most at a connection's own rate; an answer begins one
latency after its request, on a new connection two, and none is opened before it is needed; nothing fails, nothing is evicted,
and processors cost nothing. So it ranks planners on one trace; how fast a machine is must be measured (`scripts/bench`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.meters import percentile
from benchmarks.traces import Read, Trace
from valohai_fuse.engine.fill import LINE_IDLE_BYTES, FillWindow
from valohai_fuse.engine.flights import FINISH_BYTES_MAX
from valohai_fuse.model.extents import BLOCK_BYTES, Extent, align, split_by_segment
from valohai_fuse.model.fill import Fill
from valohai_fuse.model.pace import Pace
from valohai_fuse.model.readahead import Plan, Planner
from valohai_fuse.settings import OPTIONS, parse_bytes

_NEARLY_BYTES = 0.5
"""Rounding: so close to a byte is that byte."""


def default_of(name: str) -> str:
    """The default of a setting, as it is written there."""
    return next(option.default for option in OPTIONS if option.name == name and option.default is not None)


@dataclass(frozen=True, slots=True)
class Line:
    """What lies between the mount and its store, and the settings that bear on it (their defaults)."""

    latency_s: float = 0.020
    bytes_s: float = 600e6
    connection_bytes_s: float = math.inf
    connections: int = int(default_of("connections"))
    window_bytes: int = parse_bytes(default_of("readahead"))
    window_bytes_total: int = parse_bytes(default_of("readahead_total"))
    fill_bytes: int = parse_bytes(default_of("background_fill"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trace came to. `stalled_s`: the time that readers waited for, added up; latencies are of all reads."""

    gets: int
    connections: int
    fetched_bytes: int
    read_bytes: int
    elapsed_s: float
    stalled_s: float
    p50_s: float
    p99_s: float


@dataclass(eq=False, slots=True)
class _Transfer:
    file: _File
    extent: Extent
    landed: float
    urgent: bool
    flows: bool = False
    fills: bool = False
    ordered_s: float = 0.0
    flows_since_s: float = 0.0


@dataclass(eq=False, slots=True)
class _File:
    size: int
    fill: Fill
    present: set[int] = field(default_factory=set)
    transfers: list[_Transfer] = field(default_factory=list)
    readers: int = 0


@dataclass(eq=False, slots=True)
class _Pending:
    """A read that waits for its blocks: (transfer, the byte up to which it must have landed)."""

    reader: _Reader
    index: int
    plan: Plan
    awaits: list[tuple[_Transfer, int]]
    is_alone: bool
    """No other read of this file that continues nothing waited when it began."""

    @property
    def over(self) -> bool:
        return all(transfer.landed >= upto - _NEARLY_BYTES for transfer, upto in self.awaits)


@dataclass(eq=False, slots=True)
class _Reader:
    """One handle: its reads, and how far it is."""

    file: _File
    reads: list[Read]
    planner: Planner
    issued_s: list[float] = field(default_factory=list)
    done_s: list[float | None] = field(default_factory=list)

    def next_at_s(self) -> float | None:
        """When the next read comes; None: not before another one ends, or never."""
        index = len(self.issued_s)
        if index == len(self.reads):
            return None
        read = self.reads[index]
        awaited = self.done_s[: max(0, index - 1)][-2:] if read.overlaps else self.done_s[-2:]
        if any(done is None for done in awaited):
            return None
        earliest = max((done for done in awaited if done is not None), default=0.0) + read.think_s
        return max(earliest, self.issued_s[-1]) if index else earliest

    @property
    def over(self) -> bool:
        return len(self.done_s) == len(self.reads) and None not in self.done_s[-2:]


class Simulation:
    """One trace over one line. `run` once."""

    def __init__(self, trace: Trace, line: Line) -> None:
        self._line = line
        self._ahead_max = max(1, min(line.connections - 2, line.connections * 3 // 4))
        self._pace = Pace()
        self._now_s = 0.0
        self._over_s = 0.0
        self._turns = 0
        self._events: list[tuple[float, int, _Transfer | _Reader]] = []
        """First bytes, and reads to come."""
        self._waiting: list[_Transfer] = []
        self._active: list[_Transfer] = []
        self._pending: list[_Pending] = []
        self._idle_connections = 0
        self._connections = 0
        self._gets = 0
        self._fetched = 0.0
        self._fill_window = FillWindow(line.connections)
        self._marked_s = 0.0
        """When the last piece of a fill landed, or the first of those under way was ordered."""
        self._readers = _readers(trace, line)
        self._open = len(self._readers)

    def run(self) -> Outcome:
        """To the end of the last read and of what the mount still finishes then."""
        for reader in self._readers:
            self._await_next(reader)
        while self._step():
            pass
        return self._outcome()

    # --- time ---

    def _step(self) -> bool:
        """To the next thing that happens. False: nothing will."""
        rate = self._rate()
        flowing = [transfer for transfer in self._active if transfer.flows]
        least = min((upto - transfer.landed for transfer, upto in self._marks(flowing)), default=math.inf)
        then_s = self._now_s + max(0.0, least) / rate if flowing else math.inf
        if self._events:
            then_s = min(then_s, self._events[0][0])
        if then_s == math.inf:
            return False
        for transfer in flowing:
            transfer.landed = min(transfer.landed + rate * (then_s - self._now_s), transfer.extent.stop)
            if transfer.extent.stop - transfer.landed < _NEARLY_BYTES:
                transfer.landed = transfer.extent.stop
        self._now_s = then_s
        self._end_transfers()
        self._end_reads()
        while self._events and self._events[0][0] <= self._now_s:
            _, _, what = heapq.heappop(self._events)
            if isinstance(what, _Reader):
                self._issue(what)
            else:
                what.flows, what.flows_since_s = True, self._now_s
        self._complete()
        self._let_go()
        return True

    def _rate(self) -> float:
        flowing = sum(transfer.flows for transfer in self._active)
        return min(self._line.connection_bytes_s, self._line.bytes_s / max(1, flowing))

    def _marks(self, flowing: list[_Transfer]) -> Iterator[tuple[_Transfer, float]]:
        """The bytes at which something happens: the ends, and what reads wait for."""
        for transfer in flowing:
            yield transfer, transfer.extent.stop
        for pending in self._pending:
            for transfer, upto in pending.awaits:
                if transfer.flows and transfer.landed < upto - _NEARLY_BYTES:
                    yield transfer, upto

    def _at(self, when_s: float, what: _Transfer | _Reader) -> None:
        self._turns += 1
        heapq.heappush(self._events, (when_s, self._turns, what))

    # --- transfers ---

    def _begin(self, file: _File, wanted: Extent, *, urgent: bool, fills: bool = False) -> list[_Transfer]:
        """Orders what of `wanted` is neither there nor on its way, an order for each segment; of a fill only the first."""
        begun: list[_Transfer] = []
        coming = {number for transfer in file.transfers for number in _blocks(transfer.extent)}
        lacking = [n for n in _blocks(wanted) if n not in file.present and n not in coming]
        for run in _runs(lacking, file.size):
            for part in split_by_segment(run) if fills else self._pace.requests(run):
                if fills and begun:
                    return begun
                transfer = _Transfer(file, part, part.start, urgent, fills=fills, ordered_s=self._now_s)
                begun.append(transfer)
                file.transfers.append(transfer)
                self._waiting.append(transfer)
        return begun

    def _complete(self) -> None:
        """Background fill, as `engine.fill` does it: when the line is idle, and not enough of it is under way yet."""
        open_files = {id(reader.file): reader.file for reader in self._readers if reader.file.readers}
        for file in open_files.values():
            file.fill.piece_bytes = self._fill_window.piece_bytes
            while (piece := file.fill.piece(self._now_s)) is not None and self._may_fill():
                begun = self._begin(file, piece, urgent=False, fills=True)
                if begun:
                    file.fill.ordered(sum(len(transfer.extent) for transfer in begun))
                else:
                    file.fill.is_ordered()

    def _may_fill(self) -> bool:
        under_way = [*self._active, *self._waiting]
        others = [transfer for transfer in under_way if not transfer.fills]
        filling = len(under_way) - len(others)
        filling_bytes = sum(len(transfer.extent) for transfer in under_way if transfer.fills)
        if not filling:
            self._marked_s = self._now_s
        return (
            filling < self._fill_window.orders_max
            and filling_bytes < self._fill_window.bytes_max
            and len(others) < self._line.connections // 2
            and sum(len(transfer.extent) for transfer in others) <= LINE_IDLE_BYTES
        )

    def _let_go(self) -> None:
        """As many orders as may be under way, demand first, and among equals the older."""
        for transfer in sorted(self._waiting, key=lambda waiting: not waiting.urgent):
            guesses = sum(not active.urgent for active in self._active)
            if len(self._active) >= self._line.connections or (not transfer.urgent and guesses >= self._ahead_max):
                break
            self._waiting.remove(transfer)
            self._active.append(transfer)
            self._gets += 1
            is_new = not self._idle_connections
            self._idle_connections -= not is_new
            self._connections += is_new
            self._at(self._now_s + self._line.latency_s * (1 + is_new), transfer)

    def _end_transfers(self) -> None:
        for transfer in [active for active in self._active if active.landed >= active.extent.stop]:
            self._active.remove(transfer)
            transfer.flows = False
            transfer.file.transfers.remove(transfer)
            transfer.file.present.update(_blocks(transfer.extent))
            self._idle_connections += 1
            self._fetched += len(transfer.extent)
            self._pace.note(len(transfer.extent), self._now_s - transfer.flows_since_s, len(self._active) + 1)
            if transfer.fills:
                self._fill_window.note(len(transfer.extent), transfer.ordered_s, self._now_s)
                transfer.file.fill.on_landed(len(transfer.extent), self._now_s - self._marked_s)
                self._marked_s = self._now_s

    def _close(self, file: _File) -> None:
        """The last reader of a file is done: what is far from its end and needed by nobody is cancelled."""
        for transfer in file.transfers[:]:
            if transfer.extent.stop - transfer.landed > FINISH_BYTES_MAX:
                file.transfers.remove(transfer)
                self._fetched += transfer.landed - transfer.extent.start
                if transfer in self._active:
                    self._active.remove(transfer)
                else:
                    self._waiting.remove(transfer)

    # --- reads ---

    def _await_next(self, reader: _Reader) -> None:
        at_s = reader.next_at_s()
        if at_s is not None:
            self._at(max(at_s, self._now_s), reader)

    def _issue(self, reader: _Reader) -> None:
        index = len(reader.issued_s)
        reader.issued_s.append(self._now_s)
        reader.done_s.append(None)
        read, file = reader.reads[index], reader.file
        extent = Extent(read.offset, min(read.offset + read.size, file.size))
        plan = reader.planner.on_read(extent.start, extent.stop)
        if not plan.is_scattered:
            file.fill.on_run(plan.run_bytes)
        demand = align(extent.start, extent.stop, file.size)
        if not all(number in file.present for number in _blocks(demand)):
            self._begin(file, _joined(plan), urgent=True)
            self._look_ahead(reader, plan)
        elif plan.is_scattered:
            file.fill.on_hit(plan.demand.start, len(plan.demand) + len(plan.ahead))
        else:
            self._look_ahead(reader, plan)
        awaits = [
            (transfer, min(demand.stop, transfer.extent.stop))
            for transfer in file.transfers
            if transfer.extent.overlaps(demand)
        ]
        for transfer, _ in awaits:
            transfer.urgent = True
        is_alone = not any(other.plan.is_scattered for other in self._pending if other.reader.file is file)
        pending = _Pending(reader, index, plan, awaits, is_alone)
        if pending.over:
            self._finish(pending)
        else:
            self._pending.append(pending)
        if not self._queued(reader):
            self._await_next(reader)

    def _queued(self, reader: _Reader) -> bool:
        return any(what is reader for _, _, what in self._events)

    def _look_ahead(self, reader: _Reader, plan: Plan) -> None:
        line = self._line
        reader.planner.window_bytes_max = min(line.window_bytes, line.window_bytes_total // max(1, self._open))
        for extent in (plan.ahead, *plan.elsewhere):
            self._begin(reader.file, extent, urgent=False)

    def _end_reads(self) -> None:
        over = [pending for pending in self._pending if pending.over]
        self._pending = [pending for pending in self._pending if pending not in over]
        for pending in over:
            self._finish(pending)

    def _finish(self, pending: _Pending) -> None:
        reader = pending.reader
        reader.done_s[pending.index] = self._now_s
        plan = pending.plan
        if pending.awaits and plan.is_scattered:
            waited_s = self._now_s - reader.issued_s[pending.index]
            self._fill_window.note_miss(waited_s)
            fetched_bytes = len(plan.demand) + len(plan.ahead)
            reader.file.fill.on_miss(plan.demand.start, fetched_bytes, waited_s, self._now_s, is_alone=pending.is_alone)
        if reader.over:
            self._open -= 1
            self._over_s = self._now_s
            reader.file.readers -= 1
            if not reader.file.readers:
                self._close(reader.file)
        elif not self._queued(reader):
            self._await_next(reader)

    def _outcome(self) -> Outcome:
        latencies, stalled_s = [], 0.0
        for reader in self._readers:
            free_s = 0.0
            for issued_s, done_s in zip(reader.issued_s, reader.done_s, strict=True):
                assert done_s is not None
                latencies.append(done_s - issued_s)
                stalled_s += max(0.0, done_s - max(issued_s, free_s))
                free_s = max(free_s, done_s)
        read_bytes = sum(
            min(read.offset + read.size, reader.file.size) - read.offset
            for reader in self._readers
            for read in reader.reads
        )
        return Outcome(
            self._gets,
            self._connections,
            round(self._fetched),
            read_bytes,
            self._over_s,
            stalled_s,
            percentile(latencies, 0.5),
            percentile(latencies, 0.99),
        )


def _readers(trace: Trace, line: Line) -> list[_Reader]:
    sizes: dict[str, int] = {}
    for read in trace:
        name = read.file or f"handle {read.handle}"
        sizes[name] = max(sizes.get(name, 0), read.file_bytes or read.offset + read.size)
    files = {name: _File(size, Fill(size, line.fill_bytes)) for name, size in sizes.items()}
    readers: dict[int, _Reader] = {}
    for read in trace:
        if read.handle not in readers:
            file = files[read.file or f"handle {read.handle}"]
            file.readers += 1
            readers[read.handle] = _Reader(file, [], Planner(file.size, line.window_bytes))
        readers[read.handle].reads.append(read)
    return list(readers.values())


def _joined(plan: Plan) -> Extent:
    """A demand, and what is planned right behind it: they come with one request."""
    return Extent(plan.demand.start, plan.ahead.stop if plan.ahead.start == plan.demand.stop else plan.demand.stop)


def _blocks(extent: Extent) -> range:
    return range(extent.start // BLOCK_BYTES, -(-extent.stop // BLOCK_BYTES))


def _runs(numbers: list[int], size: int) -> Iterator[Extent]:
    """Ascending block numbers as extents of neighbours."""
    first = 0
    for nth in range(1, len(numbers) + 1):
        if nth == len(numbers) or numbers[nth] != numbers[nth - 1] + 1:
            yield Extent(numbers[first] * BLOCK_BYTES, min((numbers[nth - 1] + 1) * BLOCK_BYTES, size))
            first = nth
