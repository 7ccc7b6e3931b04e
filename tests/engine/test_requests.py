"""How many requests a stream has under way, by what a connection of the store carries."""

from __future__ import annotations

import pytest
import trio

from support.engine_rig import MIB, EngineRig, run
from support.fake_fetcher import Script
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.model.pace import PIECE_BYTES
from valohai_fuse.model.stride import TRIED_PIECES
from valohai_fuse.ports import Priority


async def stream(rig: EngineRig) -> None:
    handle = rig.open("big")
    for offset in range(0, len(rig.contents["big"]), MIB):
        assert await rig.read(handle, offset, MIB) == rig.contents["big"][offset : offset + MIB]
    rig.reader.close(handle)


@pytest.mark.parametrize(("mb_s", "longest"), [(80, PIECE_BYTES), (900, SEGMENT_BYTES)])
def test_a_stream_asks_a_store_of_slow_connections_for_less_at_once(mb_s: int, longest: int) -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(bytes_per_s=mb_s * 1e6)
        await stream(rig)
        late = [order for order in rig.fetcher.orders if order.extent.start >= 8 * SEGMENT_BYTES]
        assert {len(order.extent) for order in late} == {longest}

    run(scenario, {"big": 16 * SEGMENT_BYTES})


def test_what_is_fetched_for_the_cache_comes_in_whole_segments() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(bytes_per_s=80e6)
        handle = rig.open("big")
        rig.flights.begin(handle.object, Extent(0, 3 * SEGMENT_BYTES), Priority.AHEAD)
        await trio.sleep(10)
        assert {len(order.extent) for order in rig.fetcher.orders} == {SEGMENT_BYTES}

    run(scenario, {"big": 3 * SEGMENT_BYTES})


def test_what_a_reader_waits_for_is_ordered_before_what_is_only_ahead_of_it() -> None:
    """Also where one read begins both: trio runs new tasks in any order, and the first one gets the connection that is open."""

    async def scenario(rig: EngineRig) -> None:
        for _ in range(20):
            handle = rig.open("big")
            for at in range(0, len(rig.contents["big"]), 4 * SEGMENT_BYTES):
                before = len(rig.fetcher.orders)
                await rig.read(handle, at, MIB)
                demanded = [order for order in rig.fetcher.orders[before:] if order.extent.start == at]
                assert not demanded or demanded[0] is rig.fetcher.orders[before]
            assert any(order.priority is Priority.AHEAD for order in rig.fetcher.orders)
            rig.reader.close(handle)
            await trio.sleep(1)
            rig.store.evict(handle.object.key)

    run(scenario, {"big": 16 * SEGMENT_BYTES})


def test_a_stride_is_followed_from_a_place_whose_bytes_are_there_already() -> None:
    """The third place was fetched ahead. Had it landed when it was read, what was planned there was not begun, nor planned again:
    of 61 places, four cost a round trip each in one mount out of twenty-five."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("big")
        for at in range(0, 6 * SEGMENT_BYTES, 2 * SEGMENT_BYTES):
            alone = handle.planner.window_bytes_max
            others = [rig.open("big") for _ in range(at // SEGMENT_BYTES)]
            await rig.read(handle, at, MIB)
            await trio.sleep(1)
        assert handle.planner.window_bytes_max < alone, "shared with all that are open, as for any other plan"
        assert others
        foreseen = [order.extent.start for order in rig.fetcher.orders if order.priority is Priority.AHEAD]
        assert sorted(foreseen[-TRIED_PIECES:]) == [2 * place * SEGMENT_BYTES for place in range(3, 3 + TRIED_PIECES)]

    run(scenario, {"big": 32 * SEGMENT_BYTES})


def test_the_disk_is_told_of_a_stride_over_what_is_cached() -> None:
    """Forwards and backwards; nothing is ordered, and what has to be fetched is not expected of the disk."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("big")
        for at in range(0, len(rig.contents["big"]), MIB):
            await rig.read(handle, at, MIB)
        rig.reader.close(handle)
        await trio.sleep(1)
        orders = len(rig.fetcher.orders)
        rig.store.cold = True
        places = [2 * place * SEGMENT_BYTES for place in range(16)]
        for order in (places, places[::-1]):
            handle = rig.open("big")
            rig.store.expected_reads.clear()
            for at in order:
                await rig.read(handle, at, MIB)
            assert {extent.start for extent in rig.store.expected_reads} >= set(order[3:])
            assert {len(extent) for extent in rig.store.expected_reads} == {MIB}
        assert len(rig.fetcher.orders) == orders

    run(scenario, {"big": 32 * SEGMENT_BYTES})


@pytest.mark.parametrize(("piece_bytes", "is_staged"), [(MIB, False), (SEGMENT_BYTES // 2, True)])
def test_small_pieces_of_a_stride_take_no_memory(piece_bytes: int, *, is_staged: bool) -> None:
    """Each would take a whole segment of it, and be pushed out before it is read."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("big")
        for at in range(0, len(rig.contents["big"]), 2 * SEGMENT_BYTES):
            for start in range(at, at + piece_bytes, MIB):
                await rig.read(handle, start, MIB)
        foreseen = [order.extent for order in rig.fetcher.orders if order.priority is Priority.AHEAD]
        assert len(foreseen) >= 8
        assert {extent in rig.store.staged for extent in foreseen} == {is_staged}

    run(scenario, {"big": 32 * SEGMENT_BYTES})
