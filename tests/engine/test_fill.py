"""Background fill: what is read at random again and again becomes complete while the line is idle, and nobody pays for it."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from support.engine_rig import MIB, EngineRig, run
from support.fake_fetcher import Script
from valohai_fuse.engine.fill import (
    LINE_IDLE_BYTES,
    ORDER_BYTES,
    ORDERS_MAX,
    ORDERS_MIN,
    WINDOW_BYTES_FIRST,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    FillLimits,
    FillWindow,
)
from valohai_fuse.engine.objects import Handle
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.model.fill import FAILURES_MAX, PIECE_BYTES_MAX, PIECE_BYTES_MIN
from valohai_fuse.ports import FailureKind, FetchFailed, FetchOrder, Priority

GIB = 1024 * MIB
SIZE = 96 * MIB + 5000
LINE = Script(latency_s=0.02, bytes_per_s=100e6)


async def read_at_random(rig: EngineRig, handle: Handle, count: int, *, seed: int = 3) -> list[float]:
    """Reads of 4 KiB anywhere; how long each took. Every byte is checked."""
    dice = random.Random(seed)
    content = rig.contents[handle.object.label]
    took_s = []
    for _ in range(count):
        offset = dice.randrange(len(content) - 4096)
        began_t = trio.current_time()
        assert await rig.read(handle, offset, 4096) == content[offset : offset + 4096]
        took_s.append(trio.current_time() - began_t)
    return took_s


async def read_side_by_side(rig: EngineRig, handle: Handle, count: int) -> None:
    """As many as `count` reads anywhere, by two readers."""
    async with trio.open_nursery() as nursery:
        for seed in (11, 12):
            nursery.start_soon(lambda seed: read_at_random(rig, handle, count // 2, seed=seed), seed)


async def read_until_it_is_worth_it(rig: EngineRig, handle: Handle) -> None:
    for seed in range(1000):
        await read_at_random(rig, handle, 1, seed=seed)
        if handle.object.fill is not None and handle.object.fill.is_worth_it:
            return
    pytest.fail("1,000 reads at random, and it is not worth it")


def ahead(rig: EngineRig) -> list[FetchOrder]:
    """Orders that nobody waited for when they were given. A random reader has none of readahead."""
    return [order for order in rig.fetcher.orders if order.priority is Priority.AHEAD]


def cached(rig: EngineRig, name: str = "a") -> int:
    return rig.store.cached_bytes(rig._describe(rig.inode(name))[0])


def test_a_file_read_at_random_is_completed_and_no_byte_comes_twice() -> None:
    """The reads that follow need no store; the counter tells how much was filled."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = LINE
        handle = rig.open("a")
        await read_at_random(rig, handle, 90)
        await trio.sleep(10)  # the reader computes: the line is idle
        assert cached(rig) == SIZE == rig.fetcher.fetched_bytes
        filled = rig.metrics.snapshot()["filled_bytes"]
        assert SIZE / 2 < filled < SIZE
        orders = len(rig.fetcher.orders)
        took_s = await read_at_random(rig, handle, 500, seed=4)
        assert max(took_s) == 0
        assert len(rig.fetcher.orders) == orders
        assert all(len(order.extent) <= PIECE_BYTES_MAX for order in ahead(rig))
        rig.reader.close(handle)

    run(scenario, {"a": SIZE}, fill=FillLimits(GIB))


def test_sustained_random_reading_approaches_local_speed() -> None:
    """The same 2,000 reads with and without: the fill costs the reader next to nothing while it goes on, and then all is here."""
    took_s: dict[int, list[float]] = {}
    for bytes_max in (0, GIB):

        async def scenario(rig: EngineRig, bytes_max: int = bytes_max) -> None:
            rig.fetcher.default = LINE
            handle = rig.open("a")
            took_s[bytes_max] = await read_at_random(rig, handle, 2000)
            assert rig.fetcher.fetched_bytes <= SIZE
            rig.reader.close(handle)

        run(scenario, {"a": SIZE}, fill=FillLimits(bytes_max))
    assert sum(took_s[GIB]) < sum(took_s[0]) / 3
    piece_s = LINE.latency_s + PIECE_BYTES_MAX / LINE.bytes_per_s
    assert max(took_s[GIB]) <= piece_s + 0.001


@pytest.mark.parametrize(("count", "is_alone"), [(5, True), (30, False)])
def test_a_short_random_workload_is_not_completed(count: int, *, is_alone: bool) -> None:
    """Of two readers side by side, whose order need not be the program's, it may be longer."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = LINE
        handle = rig.open("a")
        await (read_at_random if is_alone else read_side_by_side)(rig, handle, count)
        await trio.sleep(10)
        assert not ahead(rig)
        assert rig.fetcher.fetched_bytes <= count * 256 * 1024
        rig.reader.close(handle)

    run(scenario, {"a": SIZE}, fill=FillLimits(GIB))


@pytest.mark.parametrize(
    "limits",
    [FillLimits(0), FillLimits(GIB, connections=3), FillLimits(GIB, is_kept=lambda: False), FillLimits(SIZE // 2)],
    ids=["off", "few connections", "no disk", "larger than allowed"],
)
def test_where_it_must_not_nothing_is_filled(limits: FillLimits) -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = LINE
        handle = rig.open("a")
        await read_at_random(rig, handle, 300)
        await trio.sleep(10)
        assert not ahead(rig)
        assert rig.metrics.snapshot()["filled_bytes"] == 0
        rig.reader.close(handle)

    run(scenario, {"a": SIZE}, fill=limits)


def test_it_takes_few_connections_and_leaves_the_line_to_streams() -> None:
    """While a stream of another file is under way no piece begins; once that has ended, they do."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = LINE
        stream, handle = rig.open("stream"), rig.open("a")
        for at in range(4):
            await rig.read(stream, at * MIB, MIB)
        await trio.sleep(1)
        gate = trio.Event()
        rig.fetcher.script("stream", *[Script(gate=gate)] * 100)
        for at in range(4, 8):
            await rig.read(stream, at * MIB, MIB)
        assert rig.flights.active_bytes > LINE_IDLE_BYTES
        await read_at_random(rig, handle, 150)
        await trio.sleep(10)
        assert not [order for order in ahead(rig) if order.key.stable_id == "a"]
        gate.set()
        peak, peak_bytes = 0, 0
        while cached(rig) < SIZE:
            flights = handle.object.flights
            peak, peak_bytes = max(peak, len(flights)), max(peak_bytes, sum(len(one.extent) for one in flights))
            await trio.sleep(0.01)
        assert peak == ORDERS_MAX, "it found out how many the line bears"
        assert peak_bytes < WINDOW_BYTES_MAX + PIECE_BYTES_MAX
        rig.reader.close(stream)
        rig.reader.close(handle)

    run(scenario, {"a": SIZE, "stream": 200 * MIB}, fill=FillLimits(GIB))


def test_closing_the_file_ends_it() -> None:
    """Nothing is begun after the last close, and what was under way is cancelled."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=0.02, bytes_per_s=10e6)
        handle = rig.open("a")
        await read_until_it_is_worth_it(rig, handle)
        await trio.sleep(0.03)
        orders, landed = len(rig.fetcher.orders), rig.fetcher.fetched_bytes
        under_way = len(rig.reader._fill._under_way)
        assert ORDERS_MIN <= under_way <= ORDERS_MAX
        rig.reader.close(handle)
        await trio.sleep(10)
        assert len(rig.fetcher.orders) == orders
        assert rig.fetcher.fetched_bytes - landed <= under_way * MIB
        assert rig.flights.active == 0

    run(scenario, {"a": SIZE}, fill=FillLimits(GIB))


def test_a_reader_that_turns_to_reading_in_order_ends_it() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = LINE
        handle = rig.open("a")
        await read_until_it_is_worth_it(rig, handle)
        for at in range(20 * MIB, 20 * MIB + SEGMENT_BYTES + MIB, MIB):
            await rig.read(handle, at, MIB)
        await trio.sleep(0.1)
        filled = rig.metrics.snapshot()["filled_bytes"]
        await trio.sleep(10)
        assert rig.metrics.snapshot()["filled_bytes"] == filled < size / 2
        rig.reader.close(handle)

    size = 4 * SIZE
    run(scenario, {"a": size}, fill=FillLimits(4 * GIB))


@pytest.mark.parametrize("trouble", ["no room", "a store that fails"])
def test_trouble_ends_it_quietly(trouble: str) -> None:
    """No warning, no retries, and the reader goes on as before."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = LINE
        handle = rig.open("a")
        rig.store.full = trouble == "no room"
        await read_until_it_is_worth_it(rig, handle)
        if trouble != "no room":
            rig.fetcher.default = Script(failure=FetchFailed(FailureKind.TRANSIENT, "HTTP 500", status=500))
        await trio.sleep(10)
        assert len(ahead(rig)) <= FAILURES_MAX + ORDERS_MAX
        rig.fetcher.default = LINE
        before = len(ahead(rig))
        await read_at_random(rig, handle, 100, seed=9)
        assert len(ahead(rig)) == before
        rig.reader.close(handle)

    run(scenario, {"a": SIZE}, fill=FillLimits(GIB))


def test_an_unmount_ends_it() -> None:
    """Flights that are cancelled with the engine's nursery do not begin others for ever."""
    rigs: list[EngineRig] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            rig = EngineRig(nursery, {"a": SIZE}, window=MIB, read_timeout_s=300, fill=FillLimits(GIB))
            rigs.append(rig)
            rig.fetcher.default = LINE
            await read_until_it_is_worth_it(rig, rig.open("a"))
            await trio.sleep(0.03)
            assert ORDERS_MIN <= rig.flights.active <= ORDERS_MAX
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert rigs[0].flights.active == rigs[0].flights.active_bytes == 0
    assert len(ahead(rigs[0])) <= ORDERS_MAX * 2 + FAILURES_MAX


def test_the_window_grows_while_pieces_come_swiftly_and_shrinks_when_they_queue() -> None:
    window = FillWindow(32)
    assert (window.bytes_max, window.orders_max) == (WINDOW_BYTES_FIRST, WINDOW_BYTES_FIRST // ORDER_BYTES)
    now_t = 0.0
    for _ in range(40):
        window.note(PIECE_BYTES_MAX, now_t, now_t + 0.03)
        now_t += 0.01
    assert (window.bytes_max, window.orders_max) == (WINDOW_BYTES_MAX, ORDERS_MAX)
    window.note(PIECE_BYTES_MAX, now_t, now_t + 0.1)
    assert window.bytes_max == WINDOW_BYTES_MAX, "neither swift nor slow"
    for _ in range(5):
        window.note(PIECE_BYTES_MAX, now_t, now_t + 0.2)
    assert window.bytes_max == WINDOW_BYTES_MAX // 2, "once for what was under way together"
    for _ in range(9):
        now_t += 1
        window.note(PIECE_BYTES_MAX, now_t, now_t + 0.2)
    assert (window.bytes_max, window.orders_max) == (WINDOW_BYTES_MIN, ORDERS_MIN)


@pytest.mark.parametrize(("miss_s", "times"), [(0.03, 4), (0.015, 2)])
def test_the_window_grows_faster_where_pieces_take_no_longer_than_a_miss(miss_s: float, times: int) -> None:
    window = FillWindow(32)
    window.note_miss(miss_s)
    for _ in range(WINDOW_BYTES_FIRST // MIB):
        window.note(MIB, 0, 0.04)
    assert window.bytes_max == times * WINDOW_BYTES_FIRST


@pytest.mark.parametrize(("miss_s", "piece_s", "grown"), [(0.02, 0.06, True), (0.02, 0.08, False), (0.1, 0.12, True)])
def test_pieces_grow_where_they_take_hardly_longer_than_a_miss(miss_s: float, piece_s: float, grown: bool) -> None:
    window = FillWindow(32)
    for _ in range(40):
        window.note_miss(miss_s)
    window.note(PIECE_BYTES_MIN // 2, 0, 0.01)
    assert window.piece_bytes == PIECE_BYTES_MIN, "nothing is known of whole ones"
    window.note(PIECE_BYTES_MIN, 0, piece_s)
    assert window.piece_bytes == (PIECE_BYTES_MAX if grown else PIECE_BYTES_MIN)


@pytest.mark.parametrize(("mb_s", "grown"), [(400, True), (20, False)])
def test_what_a_reader_may_have_to_wait_for_is_small_on_a_slow_line(mb_s: int, grown: bool) -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=0.02, bytes_per_s=mb_s * 1e6)
        handle = rig.open("a")
        await read_at_random(rig, handle, 300)
        await trio.sleep(30)
        assert (max(len(order.extent) for order in ahead(rig)) > PIECE_BYTES_MIN) is grown
        rig.reader.close(handle)

    run(scenario, {"a": SIZE}, fill=FillLimits(GIB))


@pytest.mark.parametrize(
    ("connections", "least", "first", "most"),
    [(4, 1, 2, 2), (8, 2, 4, 4), (16, 4, 8, 8), (32, 4, 8, 16), (128, 4, 8, 16)],
)
def test_the_window_takes_no_more_than_half_of_the_connections(
    connections: int, least: int, first: int, most: int
) -> None:
    window = FillWindow(connections)
    assert window.orders_max == first
    window.note(1, 0, 0.03)
    for began_t in range(1, 5):
        window.note(PIECE_BYTES_MAX, began_t, began_t + 0.2)
    assert window.orders_max == least
    for _ in range(40):
        window.note(PIECE_BYTES_MAX, 0, 0.03)
    assert window.orders_max == most
