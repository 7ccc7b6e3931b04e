"""What a daemon and a download have in common: a manifest's files made fetchable, over a store, in a nursery.

Part of the composition. Everything built here ends with the `AsyncExitStack` it is given, in reverse order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from valohai_fuse.engine.fill import FillLimits
from valohai_fuse.engine.flights import Flights
from valohai_fuse.engine.leases import Leases
from valohai_fuse.engine.loads import Loads
from valohai_fuse.engine.prefetch import Keep, Prefetch
from valohai_fuse.engine.reader import Reader
from valohai_fuse.engine.sizing import Sizing
from valohai_fuse.fetch.pool import WorkerPool, open_pool
from valohai_fuse.inspection import Catalogue
from valohai_fuse.ports import BlockStore, Metrics, Priority
from valohai_fuse.settings import Settings
from valohai_fuse.sources import api_file
from valohai_fuse.sources.size_probe import HttpSizeProbe
from valohai_fuse.sources.valohai_api import ValohaiApi


@dataclass(frozen=True, slots=True)
class Fetching:
    """The engine over its adapters, ready to use."""

    settings: Settings
    catalogue: Catalogue
    leases: Leases
    sizing: Sizing
    flights: Flights
    reader: Reader
    get_ready: Callable[[], None]
    """Starts what the first fetch would have to wait for, unless it runs."""

    def prefetch(self, keep: Keep, priority: Priority) -> Prefetch:
        """A run over whole files; as many pieces at a time as there may be connections."""
        return Prefetch(
            tree=self.catalogue.tree,
            reader=self.reader,
            flights=self.flights,
            sizing=self.sizing,
            keep=keep,
            priority=priority,
            pieces_max=self.settings.connections,
            patience_s=self.settings.read_timeout,
        )


async def open_workers(
    settings: Settings,
    metrics: Metrics,
    stack: AsyncExitStack,
    *,
    disk_may_hang: bool = False,
) -> WorkerPool:
    """Fetch workers until `stack` ends; so far there is none. Raises ConfigurationError.

    `disk_may_hang`: as for the pool.
    """
    pool = WorkerPool(
        metrics=metrics,
        workers=settings.workers,
        connections=settings.connections,
        connect_timeout_s=settings.connect_timeout,
        stall_timeout_s=settings.stall_timeout,
        ca_file=settings.ca_file,
        hedging=settings.hedging,
        disk_may_hang=disk_may_hang,
    )
    return await stack.enter_async_context(open_pool(pool))


async def open_fetching(
    settings: Settings,
    catalogue: Catalogue,
    store: BlockStore,
    pool: WorkerPool,
    metrics: Metrics,
    stack: AsyncExitStack,
    *,
    fill: FillLimits = FillLimits(),  # noqa: B008 - frozen
) -> tuple[Fetching, trio.Nursery]:
    """Builds it in a nursery of its own, which is cancelled when `stack` ends. Raises ConfigurationError."""
    nursery = await stack.enter_async_context(trio.open_nursery())
    stack.callback(nursery.cancel_scope.cancel)
    api = open_api(settings)
    if api is not None:
        stack.push_async_callback(api.aclose)
    leases = Leases(
        api,
        nursery=nursery,
        clock=time.time,
        margin_s=settings.renew_margin,
        api_path=api_file.path_in(settings.config_dir),
    )
    probe = await stack.enter_async_context(
        HttpSizeProbe(
            clock=time.time,
            ca_file=settings.ca_file,
            connect_timeout_s=settings.connect_timeout,
            answer_timeout_s=settings.stall_timeout,
        )
    )
    sizing = Sizing(
        nursery=nursery,
        tree=catalogue.tree,
        probe=probe,
        leases=leases,
        metrics=metrics,
        describe=catalogue.file,
        timeout_s=settings.read_timeout,
    )
    flights = Flights(nursery=nursery, fetcher=pool, store=store, leases=leases, metrics=metrics)
    reader = Reader(
        store=store,
        flights=flights,
        loads=Loads(store, nursery),
        metrics=metrics,
        describe=catalogue.object,
        read_timeout_s=settings.read_timeout,
        window_bytes_max=_within_cache(settings.readahead, settings, share=8),
        window_bytes_total=_within_cache(settings.readahead_total, settings, share=4),
        fill=fill,
    )
    return Fetching(settings, catalogue, leases, sizing, flights, reader, pool.prewarm), nursery


def _within_cache(window_bytes: int, settings: Settings, *, share: int) -> int:
    """Not more than a part of a small cache: what is fetched ahead must still be there when the reader comes."""
    return min(window_bytes, settings.cache_max_size // share) if settings.cache_max_size else window_bytes


def open_api(settings: Settings) -> ValohaiApi | None:
    """None without an api.json, which is fine until a renewal is needed. Raises ConfigurationError."""
    request = api_file.load(settings.config_dir)
    if request is None:
        return None
    return ValohaiApi(
        request,
        clock=time.time,
        parameter=settings.api_input_parameter,
        ca_file=settings.ca_file,
        connect_timeout_s=settings.connect_timeout,
    )
