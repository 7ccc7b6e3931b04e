"""Loads: a sequential reader of what is on the disk finds it in memory, and nobody is held up by it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from support.engine_rig import MIB, EngineRig, run
from support.fake_fetcher import Script
from valohai_fuse.daemon import STAGED_BEHIND_BYTES
from valohai_fuse.engine.loads import AHEAD_SEGMENTS, PATIENCE_S, READERS_MAX
from valohai_fuse.engine.objects import Handle
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.ports import ObjectKey, Version

SEGMENTS = 8
SIZE = SEGMENTS * SEGMENT_BYTES + 5000
STEP = 256 * 1024


async def read_in_order(
    rig: EngineRig, handle: Handle, start: int = 0, stop: int = SIZE, *, pause_s: float = 0.0
) -> None:
    """Every byte is checked; `pause_s` after each STEP."""
    content = rig.contents[handle.object.label]
    for offset in range(start, stop, STEP):
        wanted = min(STEP, stop - offset)
        assert await rig.read(handle, offset, wanted) == content[offset : offset + wanted]
        await trio.sleep(pause_s)


def run_cold(scenario: Callable[[EngineRig], Awaitable[None]], names: str = "a") -> None:
    """The scenario with all of the files on the disk, not in memory, and 10 ms away there."""

    async def main(rig: EngineRig) -> None:
        for name in names:
            rig.store.land(ObjectKey(name, SIZE), 0, rig.contents[name])
        rig.store.cold, rig.store.cold_s = True, 0.01
        rig.store.loadable, rig.store.load_s = True, 0.03
        await scenario(rig)
        assert rig.fetcher.orders == []

    run(main, dict.fromkeys(names, SIZE))


def test_a_stream_is_loaded_ahead_of_its_reader_each_segment_once() -> None:
    """What comes before it is worth it, and the short end, are read as ever."""

    async def scenario(rig: EngineRig) -> None:
        await read_in_order(rig, rig.open("a"), pause_s=0.01)
        assert sorted(rig.store.loads) == [number * SEGMENT_BYTES for number in range(1, SEGMENTS)]
        assert rig.store.reads <= SEGMENT_BYTES // STEP + 1

    run_cold(scenario)


def test_never_further_than_that() -> None:
    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await read_in_order(rig, handle, stop=SEGMENT_BYTES + STEP)
        await trio.sleep(10)
        assert len(rig.store.loads) == 1 + AHEAD_SEGMENTS

    run_cold(scenario)


def test_a_reader_that_is_faster_waits_for_the_load() -> None:
    """It does not read a second time what is on its way."""

    async def scenario(rig: EngineRig) -> None:
        rig.store.load_s = 0.5
        await read_in_order(rig, rig.open("a"))
        assert rig.store.reads <= SEGMENT_BYTES // STEP + 1

    run_cold(scenario)


def test_reads_that_others_of_their_stream_have_overtaken_load_nothing_twice() -> None:
    """The kernel's readahead has several under way, and they come in any order."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await read_in_order(rig, handle, stop=SEGMENT_BYTES + STEP)
        await trio.sleep(1)
        for early in range(SEGMENT_BYTES + STEP, SIZE - 2 * STEP, 2 * STEP):
            for offset in (early + STEP, early):
                await read_in_order(rig, handle, offset, offset + STEP)
            await trio.sleep(0.01)
        assert sorted(rig.store.loads) == [number * SEGMENT_BYTES for number in range(1, SEGMENTS)]

    run_cold(scenario)


def test_what_is_loaded_is_not_looked_for_besides() -> None:
    """To look for what lies ahead is a read of the disk for each segment, while everything else waits. Only the short end, which is
    not loaded, is looked for as ever."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await read_in_order(rig, handle, stop=SEGMENT_BYTES)
        rig.store.looked_for.clear()
        await read_in_order(rig, handle, SEGMENT_BYTES, pause_s=0.01)
        assert {extent.start // SEGMENT_BYTES for extent in rig.store.looked_for} <= {SEGMENTS}

    run_cold(scenario)


@pytest.mark.parametrize("whole", [True, False])
def test_where_what_is_cached_ends_the_rest_is_fetched_ahead(whole: bool) -> None:
    """A load finds that out, six segments before the reader comes there: it waits for the store no more than at the start of
    what is missing, and each byte is fetched once. The same where half a segment is missing (not `whole`)."""
    size = 20 * SEGMENT_BYTES + 5000
    lacking_from = 10 * SEGMENT_BYTES + (0 if whole else SEGMENT_BYTES // 2)
    lacking_upto = size if whole else 11 * SEGMENT_BYTES

    async def scenario(rig: EngineRig) -> None:
        content, key = rig.contents["a"], ObjectKey("a", size)
        rig.store.land(key, 0, content[:lacking_from], '"v1"')
        if lacking_upto < size:
            rig.store.land(key, lacking_upto, content[lacking_upto:], '"v1"')
        rig.store.cold, rig.store.cold_s = True, 0.01
        rig.store.loadable, rig.store.load_s = True, 0.03
        rig.fetcher.default = Script(latency_s=1.0)
        handle = rig.open("a")
        await read_in_order(rig, handle, stop=lacking_from - SEGMENT_BYTES, pause_s=0.1)
        assert rig.fetcher.orders, "ahead of the reader"
        rig.store.cold = False
        began_t = trio.current_time()
        await read_in_order(rig, handle, lacking_from - SEGMENT_BYTES, size, pause_s=0.1)
        pauses_s = (size - lacking_from + SEGMENT_BYTES) / STEP * 0.1
        assert trio.current_time() - began_t < pauses_s + 1.0
        assert rig.fetcher.fetched_bytes == lacking_upto - lacking_from

    run(scenario, {"a": size})


def test_reads_at_random_and_short_ones_load_nothing() -> None:
    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await read_in_order(rig, handle, stop=3 * MIB)
        for offset in range(SIZE - SIZE % MIB - MIB, 4 * MIB, -3 * MIB):
            await read_in_order(rig, handle, offset, offset + STEP)
        assert rig.store.loads == []

    run_cold(scenario)


def test_what_is_in_memory_anyway_is_not_loaded() -> None:
    """The first load that is no use is the last, until the disk is met again."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await read_in_order(rig, handle, stop=5 * MIB)
        rig.store.cold, rig.store.loadable = False, False
        loads = len(rig.store.loads)
        assert loads == AHEAD_SEGMENTS
        await read_in_order(rig, handle, 5 * MIB, pause_s=0.01)
        assert len(rig.store.loads) <= loads + AHEAD_SEGMENTS

    run_cold(scenario)


def test_a_disk_that_does_not_answer_costs_one_wait_and_gets_no_more_to_do() -> None:
    """Everything is read all the same; once it has answered, loading goes on."""

    async def scenario(rig: EngineRig) -> None:
        rig.store.load_s = 60
        handle = rig.open("a")
        began_t = trio.current_time()
        await read_in_order(rig, handle)
        assert PATIENCE_S < trio.current_time() - began_t < 2 * PATIENCE_S + SIZE / STEP * rig.store.cold_s
        assert len(rig.store.loads) == AHEAD_SEGMENTS + 1, "the last one begun while it waited"
        await trio.sleep(60)
        rig.store.load_s = 0.03
        rig.store._loaded.clear()
        await read_in_order(rig, handle)
        assert len(rig.store.loads) > AHEAD_SEGMENTS + 1

    run_cold(scenario)


def test_only_so_many_readers_load_and_one_that_ends_makes_room() -> None:
    names = "abcdefgh"
    assert len(names) > READERS_MAX

    async def scenario(rig: EngineRig) -> None:
        handles = [rig.open(name) for name in names]
        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(read_in_order, rig, handle, 0, 6 * MIB)
        loads = len(rig.store.loads)
        assert loads == AHEAD_SEGMENTS + AHEAD_SEGMENTS + 4, "the memory is shared: the third has less ahead of it"
        assert (loads + READERS_MAX) * SEGMENT_BYTES <= STAGED_BEHIND_BYTES + 64 * MIB, "of the default readahead"
        await trio.sleep(10)
        await read_in_order(rig, rig.open(names[-1]), stop=6 * MIB)
        assert len(rig.store.loads) == loads + AHEAD_SEGMENTS

    run_cold(scenario, names)


@pytest.mark.expect_warnings("loading segment")
def test_a_bug_in_loading_is_logged_and_harms_no_reader() -> None:
    async def load(key: ObjectKey, version: Version, offset: int) -> bool:
        raise ZeroDivisionError

    async def scenario(rig: EngineRig) -> None:
        rig.store.load = load  # type: ignore[method-assign]
        await read_in_order(rig, rig.open("a"))

    run_cold(scenario)
