"""How much is cached: exact when quiet, cheap to ask for, never in a reader's way."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from valohai_fuse.model.manifest_json import from_json
from valohai_fuse.model.tree import Inode, build
from valohai_fuse.occupancy import PASS_EVERY_S, Occupancy


class Cache:
    """Ten bytes of each file are cached; counting a file takes a while."""

    def __init__(self, files: int, seconds_each: float) -> None:
        entries = [{"name": str(number), "size": 100} for number in range(files)]
        manifest = from_json(json.dumps({"data": {"files": entries}}).encode(), mtime_ns=7)
        self.tree = build(manifest, as_root=False, local={}, inputs_dir="/valohai/inputs")
        self.each = 10
        self.fetched = 0.0
        self.looks = 0
        self.broken = False
        self._seconds_each = seconds_each

    async def cached_bytes(self, inode: Inode) -> int:
        self.looks += 1
        if self.broken:
            raise ValueError(inode)
        await trio.sleep(self._seconds_each)
        return self.each


def run(
    scenario: Callable[[Cache, Occupancy], Awaitable[None]], *, files: int = 100, seconds_each: float = 0.001
) -> None:
    async def main() -> None:
        cache = Cache(files, seconds_each)
        async with trio.open_nursery() as nursery:
            await scenario(cache, Occupancy(nursery, cache.tree, cache.cached_bytes, lambda: cache.fetched))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_first_answer_is_exact_and_what_is_fetched_later_is_added() -> None:
    """Between passes the bytes fetched since count; never more than there are; a later pass sets it right."""

    async def scenario(cache: Cache, occupancy: Occupancy) -> None:
        cache.fetched = 5000
        assert await occupancy.estimate() == 1000
        cache.fetched += 300
        assert await occupancy.estimate() == 1300
        cache.fetched += 10**9
        assert await occupancy.estimate() == 100 * 100
        await trio.sleep(PASS_EVERY_S)
        cache.each = 20
        await occupancy.estimate()
        await trio.sleep(1)
        assert await occupancy.estimate() == 2000

    run(scenario)


def test_nobody_asking_costs_nothing_and_asking_often_little() -> None:
    """A question each second for a minute: a pass every ten seconds at the most; then none."""

    async def scenario(cache: Cache, occupancy: Occupancy) -> None:
        await trio.sleep(100)
        assert cache.looks == 0
        for _ in range(60):
            await occupancy.estimate()
            await trio.sleep(1)
        assert 2 * 100 <= cache.looks <= 7 * 100
        looks = cache.looks
        await trio.sleep(1000)
        assert cache.looks <= looks + 100

    run(scenario)


def test_a_long_count_keeps_nobody_waiting_and_rests() -> None:
    """With many files the answer is at first unknown; the pass takes twice its work, and the next one comes much later."""

    async def scenario(cache: Cache, occupancy: Occupancy) -> None:
        began = trio.current_time()
        assert await occupancy.estimate() is None
        assert trio.current_time() - began <= 0.6
        await trio.sleep(15)
        assert await occupancy.estimate() is None
        await trio.sleep(10)
        assert await occupancy.estimate() == 10_000 * 10
        looks = cache.looks
        await trio.sleep(200)
        assert await occupancy.estimate() == 10_000 * 10
        assert cache.looks == looks

    run(scenario, files=10_000)


@pytest.mark.expect_warnings("could not be counted")
def test_a_bug_in_counting_is_no_more_than_a_missing_number() -> None:
    async def scenario(cache: Cache, occupancy: Occupancy) -> None:
        cache.broken = True
        assert await occupancy.estimate() is None
        cache.broken = False
        await trio.sleep(PASS_EVERY_S + 1)
        await occupancy.estimate()
        await trio.sleep(1)
        assert await occupancy.estimate() == 1000

    run(scenario)
