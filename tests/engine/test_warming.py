"""Prefetch jobs over the control socket: named in parts, begun once, and stopped when nobody asks any more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from support.engine_rig import MIB, EngineRig, run
from support.fake_fetcher import Script
from support.prefetch_rig import prefetch_of, tree_of
from valohai_fuse.errors import UsageError
from valohai_fuse.warming import JOBS_MAX, SILENCE_S, Warming

Scenario = Callable[[EngineRig, Warming], Awaitable[None]]


def run_jobs(scenario: Scenario, sizes: dict[str, int]) -> None:
    async def main(rig: EngineRig) -> None:
        tree = tree_of(rig)
        async with trio.open_nursery() as nursery:
            make = lambda: prefetch_of(rig, nursery, tree)  # noqa: E731 - two lines would not be clearer
            warming = Warming(nursery, tree, "/mnt", make, bytes_max=100 * MIB)
            await scenario(rig, warming)
            nursery.cancel_scope.cancel()

    run(main, sizes)


def test_a_job_that_comes_in_parts_is_begun_by_the_last() -> None:
    """Nothing is fetched before the last part; files named twice, also through a directory, count once."""

    async def scenario(rig: EngineRig, warming: Warming) -> None:
        ask = warming.handlers
        assert await ask["prefetch"]({"job": "j", "paths": ["a", "b"], "more": True}) == {"files": 2}
        await trio.sleep(5)
        assert rig.fetcher.orders == []
        assert await ask["prefetch"]({"job": "j", "paths": ["b", "/"]}) == {"files": 3}
        await trio.sleep(5)
        answer = await ask["prefetch_progress"]({"job": "j"})
        assert (answer["finished"], answer["files_done"], answer["bytes_done"]) == (True, 3, 3 * MIB)
        with pytest.raises(UsageError, match="begun already"):
            await ask["prefetch"]({"job": "j", "paths": ["a"]})

    run_jobs(scenario, {"a": MIB, "b": MIB, "c": MIB})


def test_names_that_are_not_there_fetch_nothing() -> None:
    async def scenario(rig: EngineRig, warming: Warming) -> None:
        with pytest.raises(UsageError, match=r"/mnt: x1, x2, x3 and 1 more"):
            await warming.handlers["prefetch"]({"job": "j", "paths": ["a", "x1", "x2", "x3", "x4"]})
        await trio.sleep(5)
        assert rig.fetcher.orders == []

    run_jobs(scenario, {"a": MIB})


def test_a_job_that_nobody_asks_for_is_stopped() -> None:
    """A client that was killed leaves nothing running; one that goes on asking is served to the end."""

    async def scenario(rig: EngineRig, warming: Warming) -> None:
        rig.fetcher.default = Script(latency_s=0, bytes_per_s=MIB / 100)
        ask = warming.handlers
        await ask["prefetch"]({"job": "j", "paths": ["a"]})
        for _ in range(4):
            await trio.sleep(SILENCE_S - 1)
            assert not (await ask["prefetch_progress"]({"job": "j"}))["finished"]
        await trio.sleep(SILENCE_S + 1)
        assert rig.flights.active == 0
        with pytest.raises(UsageError, match="no such prefetch"):
            await ask["prefetch_progress"]({"job": "j"})

    run_jobs(scenario, {"a": 8 * MIB})


def test_a_cancelled_job_says_that_it_has_ended() -> None:
    async def scenario(rig: EngineRig, warming: Warming) -> None:
        rig.fetcher.default = Script(latency_s=0, bytes_per_s=MIB)
        ask = warming.handlers
        await ask["prefetch"]({"job": "j", "paths": ["a"]})
        await trio.sleep(2.5)
        await ask["prefetch_cancel"]({"job": "j"})
        await trio.testing.wait_all_tasks_blocked()
        answer = await ask["prefetch_progress"]({"job": "j"})
        assert answer["finished"]
        assert 2 * MIB <= answer["bytes_done"] < 8 * MIB

    run_jobs(scenario, {"a": 8 * MIB})


def test_more_than_the_cache_holds_is_not_begun() -> None:
    async def scenario(rig: EngineRig, warming: Warming) -> None:
        with pytest.raises(UsageError, match="holds 104,857,600 at the most"):
            await warming.handlers["prefetch"]({"job": "j", "paths": ["/"]})
        await trio.sleep(5)
        assert rig.fetcher.orders == []
        await warming.handlers["prefetch"]({"job": "k", "paths": ["a"]})

    run_jobs(scenario, {"a": 60 * MIB, "b": 60 * MIB})


def test_jobs_are_bounded() -> None:
    async def scenario(rig: EngineRig, warming: Warming) -> None:
        for number in range(JOBS_MAX):
            await warming.handlers["prefetch"]({"job": str(number), "paths": [], "more": True})
        with pytest.raises(UsageError, match="under way already"):
            await warming.handlers["prefetch"]({"job": "one more", "paths": []})
        await trio.sleep(SILENCE_S + 1)
        assert await warming.handlers["prefetch"]({"job": "later", "paths": ["a"]}) == {"files": 1}

    run_jobs(scenario, {"a": 10})
