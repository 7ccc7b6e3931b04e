"""The machine sleeps, or its clock is set: what URLs are worth afterwards, on trio's clock, which sleeps along."""

from __future__ import annotations

import trio
import trio.testing

from support.fake_source import FakeSource, file_ref
from valohai_fuse.engine.leases import Leases

EPOCH_S = 1_761_991_200.0
HOURS_S = 6 * 3600.0


class JumpingClock:
    """The wall clock: runs with trio's, and jumps."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return EPOCH_S + self.ahead_s + trio.current_time()


def test_after_hours_of_sleep_a_dead_url_is_not_tried() -> None:
    """Suspended and resumed: the manifest's URL, and later a renewed one, are known to be dead and are renewed first, once."""

    async def main() -> None:
        clock = JumpingClock()
        source = FakeSource(clock, lifetime_s=3600.0, latency_s=1.0)
        async with trio.open_nursery() as nursery:
            leases = Leases(source, nursery=nursery, clock=clock)
            file = file_ref(url=f"https://store.test/manifest?Expires={int(EPOCH_S + 3600)}")
            assert "manifest" in (await leases.lease(file)).url
            for renewals in (1, 2):
                clock.ahead_s += HOURS_S
                async with trio.open_nursery() as readers:
                    for _ in range(20):
                        readers.start_soon(leases.lease, file)
                lease = await leases.lease(file)
                assert f"renewal={renewals}&" in lease.url
                assert lease.expires_at_s is not None
                assert lease.expires_at_s > clock() + 60
        assert len(source.asked) == 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_clock_that_jumps_back_renews_nothing_for_ever() -> None:
    """Set back by hours: URLs seem to live longer, which the store's refusal corrects; nothing is renewed in a loop."""

    async def main() -> None:
        clock = JumpingClock()
        source = FakeSource(clock, lifetime_s=3600.0, latency_s=1.0)
        async with trio.open_nursery() as nursery:
            leases = Leases(source, nursery=nursery, clock=clock)
            file = file_ref(url=f"https://store.test/manifest?Expires={int(EPOCH_S + 3600)}")
            first = await leases.lease(file)
            clock.ahead_s -= HOURS_S
            assert (await leases.lease(file)).url == first.url
            renewed = await leases.lease(file, first)
            assert renewed.url != first.url
            for _ in range(50):
                await trio.sleep(10)
                assert (await leases.lease(file)).url == renewed.url
        assert len(source.asked) == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
