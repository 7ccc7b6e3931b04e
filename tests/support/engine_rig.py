"""The engine on fakes: reader, flights and leases as the daemon wires them, on trio's autojump clock.

`run(scenario)` gives the scenario an `EngineRig` and afterwards asserts that nothing is left: no flight, no waiting read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from support.fake_fetcher import FakeFetcher, ramp
from support.fake_source import FakeSource, file_ref
from support.fake_store import FakeBlockStore
from valohai_fuse.engine.fill import FillLimits
from valohai_fuse.engine.flights import Flights
from valohai_fuse.engine.leases import Leases
from valohai_fuse.engine.loads import Loads
from valohai_fuse.engine.objects import Handle
from valohai_fuse.engine.reader import Reader
from valohai_fuse.model.tree import Inode
from valohai_fuse.obs.metrics import Counts
from valohai_fuse.ports import FileRef, ObjectKey

MIB = 1024 * 1024


class EngineRig:
    """One mount's engine over a few objects; inode n is `names[n - 2]`."""

    def __init__(
        self, nursery: trio.Nursery, sizes: dict[str, int], *, window: int, read_timeout_s: float, fill: FillLimits
    ) -> None:
        self.contents = {name: ramp(size, phase) for phase, (name, size) in enumerate(sizes.items())}
        self.names = list(sizes)
        self.described: list[str] = []
        self.store = FakeBlockStore()
        self.fetcher = FakeFetcher(self.contents, self.store.land_order)
        self.source = FakeSource(clock=trio.current_time)
        self.metrics = Counts()
        self.leases = Leases(self.source, nursery=nursery, clock=trio.current_time)
        self.flights = Flights(
            nursery=nursery, fetcher=self.fetcher, store=self.store, leases=self.leases, metrics=self.metrics
        )
        self.reader = Reader(
            store=self.store,
            flights=self.flights,
            loads=Loads(self.store, nursery),
            metrics=self.metrics,
            describe=self._describe,
            read_timeout_s=read_timeout_s,
            window_bytes_max=window,
            window_bytes_total=4 * window,
            fill=fill,
        )

    def _describe(self, inode: Inode) -> tuple[ObjectKey, FileRef, str]:
        name = self.names[inode - 2]
        self.described.append(name)
        url = f"https://store.example/{name}?X-Amz-Signature=0"
        return ObjectKey(name, len(self.contents[name])), file_ref(name, index=inode - 2, url=url), name

    def inode(self, name: str) -> Inode:
        return Inode(self.names.index(name) + 2)

    def open(self, name: str) -> Handle:
        return self.reader.open(self.inode(name))[0]

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        return bytes(await self.reader.read(handle, offset, size))


def run(
    scenario: Callable[[EngineRig], Awaitable[None]],
    sizes: dict[str, int],
    *,
    window: int = 64 * MIB,
    read_timeout_s: float = 300,
    fill: FillLimits | None = None,
) -> EngineRig:
    """Runs the scenario; at its end nothing may be under way once flights have had time to end."""

    async def main() -> EngineRig:
        async with trio.open_nursery() as nursery:
            rig = EngineRig(nursery, sizes, window=window, read_timeout_s=read_timeout_s, fill=fill or FillLimits())
            await scenario(rig)
            with trio.move_on_after(3600):
                while rig.flights.active:  # noqa: ASYNC110 - flights tell nobody when the last one ends, and time is free here
                    await trio.sleep(1)
            assert rig.flights.active == rig.flights.active_bytes == 0
            assert rig.reader.statistics().reads_waiting == 0
            assert rig.fetcher.active == 0
            nursery.cancel_scope.cancel()
        return rig

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
