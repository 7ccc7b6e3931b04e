"""A worker pool, a raw store and a directory to land in: what the tests of `fetch` share."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from support.fake_fetcher import ramp
from support.raw_store import RawStore, loopback_tls, open_store
from valohai_fuse.fetch.pool import WorkerPool, open_pool
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent
from valohai_fuse.ports import Fetched, FetchFailed, FetchOrder, Landed, Lease, ObjectKey, Priority

SIZE = 5 * BLOCK_BYTES + 1000
"""Of the object that most tests fetch: some whole blocks and a short one."""
CONTENT = ramp(SIZE)
SECRET = "X-Amz-Signature=c0ffee"
"""Stands in every URL's query: must never be seen anywhere else."""


class RecordingMetrics:
    """`ports.Metrics` that remembers."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self._gauge_set = trio.Event()

    async def wait_gauge(self, name: str, value: float) -> None:
        """Until the gauge stands at `value`."""
        while self.gauges.get(name) != value:
            await self._gauge_set.wait()

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter."""
        self.counters[name] += int(amount)

    def gauge(self, name: str, value: float) -> None:
        """Sets a gauge."""
        self.gauges[name] = value
        self._gauge_set.set()
        self._gauge_set = trio.Event()


class Rig:
    """See the module's text."""

    def __init__(self, pool: WorkerPool, store: RawStore, directory: Path, metrics: RecordingMetrics) -> None:
        self.pool = pool
        self.store = store
        self.directory = directory
        self.metrics = metrics
        self.reports: list[Landed] = []

    def order(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        expect: str | None = None,
        priority: Priority = Priority.DEMAND,
        url: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        size: int | None = None,
        segment_path: str | None = None,
        name: str = "object",
        staging_path: str = "",
    ) -> FetchOrder:
        """An order for the store's object, or for what else is said."""
        size = len(self.store.content) if size is None else size
        path = self.directory / f"{name}.{start // SEGMENT_BYTES}"
        return FetchOrder(
            key=ObjectKey(name, size),
            extent=Extent(start, size if stop is None else stop),
            lease=Lease(f"{self.store.url}/{name}?{SECRET}" if url is None else url, headers),
            expect_version=expect,
            segment_path=str(path) if segment_path is None else segment_path,
            priority=priority,
            staging_path=staging_path,
        )

    async def fetch(self, order: FetchOrder) -> Fetched:
        """Through the pool; what lands is in `reports`."""
        return await self.pool.fetch(order, self.reports.append)

    async def failure(self, order: FetchOrder) -> FetchFailed:
        """The failure that this order must end with."""
        try:
            fetched = await self.fetch(order)
        except FetchFailed as failed:
            return failed
        raise AssertionError(f"expected a failure: {fetched}")


def landed_blocks(order: FetchOrder) -> dict[int, bytes]:
    """The blocks that a reader would believe, by offset: what is in the segment file *and* vouched for by its table."""
    try:
        page = Path(order.segment_path).read_bytes()
    except FileNotFoundError:
        return {}
    if len(page) < segment.PAGE_BYTES:
        return {}  # just created: no reader believes it yet
    header = segment.decode_header(page[: segment.PAGE_BYTES])
    assert header is not None
    seed = segment.hash_seed(segment.object_digest(order.key.stable_id, order.key.size), header.version)
    table = segment.decode_table(page[: segment.PAGE_BYTES])
    first = order.extent.start // SEGMENT_BYTES * SEGMENT_BYTES
    blocks = {}
    for index, entry in enumerate(table):
        if entry:
            at = segment.DATA_OFFSET + index * BLOCK_BYTES
            offset = first + index * BLOCK_BYTES
            data = page[at : at + min(BLOCK_BYTES, order.key.size - offset)]
            assert segment.block_entry(data, seed, offset // BLOCK_BYTES) == entry
            blocks[offset] = data
    return blocks


def landed_bytes(order: FetchOrder) -> bytes:
    """The order's extent as it was landed; fails when a block of it is missing."""
    blocks = landed_blocks(order)
    start = order.extent.start
    return b"".join(blocks[offset] for offset in range(start, order.extent.stop, BLOCK_BYTES))


@contextlib.asynccontextmanager
async def rig(
    directory: Path,
    content: bytes = CONTENT,
    *,
    workers: int = 1,
    connections: int = 16,
    connect_timeout_s: float = 5,
    stall_timeout_s: float = 20,
    idle_s: float = 60,
    disk_may_hang: bool = False,
    ca_file: str | None = None,
    tls: bool = False,
    tls_version: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED,
    hedging: bool = True,
) -> AsyncIterator[Rig]:
    """Pool and store for the time of the block; at its end no worker process may be left."""
    metrics = RecordingMetrics()
    pool = WorkerPool(
        metrics=metrics,
        workers=workers,
        connections=connections,
        connect_timeout_s=connect_timeout_s,
        stall_timeout_s=stall_timeout_s,
        idle_s=idle_s,
        disk_may_hang=disk_may_hang,
        ca_file=ca_file,
        hedging=hedging,
    )
    pids: tuple[int, ...] = ()
    with trio.fail_after(60):
        async with open_store(content, tls=loopback_tls(tls_version) if tls else None) as store:
            async with open_pool(pool):
                yield Rig(pool, store, directory, metrics)
                pids = pool.worker_pids
            assert pool.statistics().active == 0
            assert pool.statistics().workers == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
