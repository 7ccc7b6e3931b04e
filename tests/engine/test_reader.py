"""The reader over flights: exactly the bytes asked for, or an error within the deadline. All on trio's autojump clock."""

from __future__ import annotations

import random

import pytest
import trio

from support.engine_rig import MIB, EngineRig, run
from support.fake_fetcher import Script
from valohai_fuse import errors
from valohai_fuse.engine import reader
from valohai_fuse.engine.objects import REPEAT_S
from valohai_fuse.engine.reader import Ahead
from valohai_fuse.model.extents import BLOCK_BYTES, Extent
from valohai_fuse.ports import FailureKind, FetchFailed, ObjectKey, Priority


def test_a_read_returns_exactly_the_bytes_asked_for() -> None:
    """Any offset, any size, clipped at the end of the file only."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        chance = random.Random(5)
        content = rig.contents["a"]
        for _ in range(200):
            offset = chance.randrange(len(content) + 10)
            size = chance.choice([1, 4096, 65536, 131072, MIB])
            assert await rig.read(handle, offset, size) == content[offset : offset + size]
        rig.reader.close(handle)

    run(scenario, {"a": 20 * MIB + 17})


def test_many_readers_of_one_block_cause_one_fetch() -> None:
    """However many want it, a block is fetched once."""

    async def scenario(rig: EngineRig) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                handle = rig.open("a")
                nursery.start_soon(rig.read, handle, 3 * MIB, 4096)

    rig = run(scenario, {"a": 20 * MIB})
    assert len(rig.fetcher.orders) == 1


def test_no_byte_is_fetched_twice_whoever_reads() -> None:
    async def scenario(rig: EngineRig) -> None:
        async def reader(seed: int) -> None:
            chance = random.Random(seed)
            handle = rig.open("a")
            for _ in range(60):
                offset = chance.randrange(len(rig.contents["a"]))
                assert await rig.read(handle, offset, 4096) == rig.contents["a"][offset : offset + 4096]

        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(reader, seed)

    rig = run(scenario, {"a": 32 * MIB})
    assert rig.fetcher.fetched_bytes <= 32 * MIB


def test_a_reader_is_woken_when_its_bytes_land_not_when_the_request_ends() -> None:
    """At 1 MiB/s the first 64 KiB of a 1 MiB request are there after 1/16 s."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=0, bytes_per_s=MIB)
        handle = rig.open("a")
        began = trio.current_time()
        await rig.read(handle, 0, 4096)
        assert trio.current_time() - began == pytest.approx(1 / 16, abs=0.01)

    run(scenario, {"a": 64 * MIB})


def test_a_hit_awaits_nothing() -> None:
    """A cached byte is answered synchronously: no checkpoint, so an autojump clock cannot move."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await rig.read(handle, 0, 4096)
        coroutine = rig.reader.read(handle, 100, 1000)
        with pytest.raises(StopIteration) as done:
            coroutine.send(None)
        assert bytes(done.value.value) == rig.contents["a"][100:1100]

    run(scenario, {"a": MIB})


def test_the_disk_is_told_of_an_open_before_the_first_read() -> None:
    """Once: not of a second handle, nor of a file whose bytes are on their way."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        rig.open("a")
        assert [key.size for key in rig.store.expected] == [MIB]
        await rig.read(handle, 0, 4096)
        rig.open("a")
        rig.reader.fetch_ahead(rig.inode("b"))
        rig.open("b")
        assert [key.size for key in rig.store.expected] == [MIB, 2 * MIB], "of the second when it was foreseen"

    run(scenario, {"a": MIB, "b": 2 * MIB})


def test_bytes_that_are_cold_on_disk_are_read_without_a_fetch() -> None:
    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await rig.read(handle, 0, 4096)
        orders = len(rig.fetcher.orders)
        rig.store.cold = True
        assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]
        assert len(rig.fetcher.orders) == orders

    run(scenario, {"a": MIB})


def test_a_transient_failure_is_not_seen_by_the_reader() -> None:
    """What can be retried is retried; bytes that landed before the failure are not fetched again."""

    async def scenario(rig: EngineRig) -> None:
        reset = FetchFailed(FailureKind.TRANSIENT, "connection reset")
        rig.fetcher.script("a", Script(failure=reset, fail_at=3 * BLOCK_BYTES), Script(failure=reset), Script())
        handle = rig.open("a")
        assert await rig.read(handle, 0, MIB) == rig.contents["a"][:MIB]
        assert rig.fetcher.orders[1].extent.start == 3 * BLOCK_BYTES

    run(scenario, {"a": MIB})


def test_a_read_ends_at_its_deadline() -> None:
    """A store that never answers: ETIMEDOUT's error at the deadline, within 5 s of it."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=1e9)
        handle = rig.open("a")
        began = trio.current_time()
        with pytest.raises(errors.DeadlineExceededError):
            await rig.read(handle, 0, 4096)
        assert 299 <= trio.current_time() - began <= 305
        rig.reader.close(handle)
        for flight in rig.flights.covering(handle.object, Extent(0, MIB)):
            flight.scope.cancel()

    run(scenario, {"a": MIB})


def test_a_deadline_in_the_middle_of_a_try_says_what_became_of_the_last_one() -> None:
    """The error names the reason why it took so long, not only that it did."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.script("a", Script(failure=FetchFailed(FailureKind.TRANSIENT, "the certificate has expired")))
        rig.fetcher.default = Script(latency_s=1e9)
        handle = rig.open("a")
        with pytest.raises(errors.DeadlineExceededError, match=r"within 300 s; .*: the certificate has expired"):
            await rig.read(handle, 0, 4096)
        rig.reader.close(handle)
        for flight in rig.flights.covering(handle.object, Extent(0, MIB)):
            flight.scope.cancel()

    run(scenario, {"a": MIB})


@pytest.mark.expect_warnings("gave up on a")
def test_refused_connections_are_retried_until_the_deadline_and_no_longer() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(failure=FetchFailed(FailureKind.TRANSIENT, "connection refused"))
        handle = rig.open("a")
        began = trio.current_time()
        with pytest.raises(errors.DeadlineExceededError):
            await rig.read(handle, 0, 4096)
        assert 20 <= trio.current_time() - began <= 65
        rig.fetcher.default = Script()
        await trio.sleep(REPEAT_S)  # by then it is not the kernel that asks again
        assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]

    run(scenario, {"a": MIB}, read_timeout_s=60)


def test_a_refused_url_is_renewed_and_the_reader_does_not_notice() -> None:
    async def scenario(rig: EngineRig) -> None:
        refused = FetchFailed(FailureKind.REFUSED, "403 Request has expired", status=403)
        rig.fetcher.script("a", Script(failure=refused))
        handle = rig.open("a")
        assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]
        assert rig.leases.statistics().renewals == 1
        assert rig.fetcher.orders[0].lease.url != rig.fetcher.orders[1].lease.url

    run(scenario, {"a": MIB})


@pytest.mark.expect_warnings("gave up on a")
def test_a_fresh_url_that_is_refused_again_is_a_real_refusal() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(failure=FetchFailed(FailureKind.REFUSED, "403 AccessDenied", status=403))
        handle = rig.open("a")
        with pytest.raises(errors.AccessRefusedError):
            await rig.read(handle, 0, 4096)
        assert len(rig.fetcher.orders) == 2

    run(scenario, {"a": MIB})


@pytest.mark.expect_warnings("gave up on a")
def test_a_missing_object_is_an_error_at_the_read_and_at_the_next_open() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.script("a", Script(failure=FetchFailed(FailureKind.MISSING, "404", status=404)))
        handle = rig.open("a")
        with pytest.raises(errors.ObjectMissingError):
            await rig.read(handle, 0, 4096)
        rig.reader.close(handle)
        with pytest.raises(errors.ObjectMissingError):
            rig.open("a")
        assert await rig.read(rig.open("a"), 0, 10) == rig.contents["a"][:10], "it may be back after that"

    run(scenario, {"a": MIB})


def test_a_changed_object_never_mixes_with_what_was_served() -> None:
    """ETag changes in the middle: ESTALE for this open for ever, the new version for the next one."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]
        changed = FetchFailed(FailureKind.CHANGED, "its ETag changed")
        rig.fetcher.script("a", Script(failure=changed))
        rig.fetcher.versions["a"] = '"v2"'
        rig.fetcher.contents["a"] = new = bytes(len(rig.contents["a"]))
        with pytest.raises(errors.ObjectChangedError):
            await rig.read(handle, 12 * MIB, 4096)
        with pytest.raises(errors.ObjectChangedError):
            await rig.read(handle, 0, 4096)
        fresh, keep_cache = rig.reader.open(rig.inode("a"))
        assert not keep_cache
        assert await rig.read(fresh, 0, 4096) == new[:4096]
        assert await rig.read(fresh, 12 * MIB, 4096) == new[:4096]

    run(scenario, {"a": 20 * MIB})


def test_an_outdated_cache_that_nobody_was_served_from_is_replaced() -> None:
    """The cache holds a former version of one segment: the store's word counts, the reader sees one version only."""

    async def scenario(rig: EngineRig) -> None:
        key = rig.reader._describe(rig.inode("a"))[0]
        rig.store.land(key, 8 * MIB, bytes(BLOCK_BYTES), '"old"')
        rig.fetcher.script("a", Script(failure=FetchFailed(FailureKind.CHANGED, "412")))
        handle = rig.open("a")
        offset = 8 * MIB + BLOCK_BYTES
        assert await rig.read(handle, offset, 4096) == rig.contents["a"][offset : offset + 4096]
        assert await rig.read(handle, 8 * MIB, 4096) == rig.contents["a"][8 * MIB : 8 * MIB + 4096]

    run(scenario, {"a": 20 * MIB})


def test_blocks_that_vanish_after_landing_are_fetched_again() -> None:
    """Evicted or damaged between landing and reading: fetched again, and in the end an error instead of a loop."""

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        await rig.read(handle, 0, 4096)
        rig.store.evict(handle.object.key)
        assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]

        real = rig.store.land_order
        rig.fetcher._land = lambda order, offset, data, version: None
        rig.store.evict(handle.object.key)
        with pytest.raises(errors.ReadError, match="loses"):
            await rig.read(handle, 0, 4096)
        rig.fetcher._land = real
        assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]

    run(scenario, {"a": MIB})


def test_readahead_of_a_closed_file_is_cancelled() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=0.02, bytes_per_s=10 * MIB)
        handle = rig.open("a")
        for step in range(24):
            await rig.read(handle, step * MIB, MIB)
        assert rig.flights.active_bytes >= 12 * MIB
        rig.reader.close(handle)
        await trio.sleep(0.2)
        assert rig.flights.active_bytes <= 8 * MIB

    rig = run(scenario, {"a": 256 * MIB})
    assert rig.fetcher.cancelled


def test_a_demand_that_finds_its_bytes_planned_ahead_waits_for_that_flight() -> None:
    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("a")
        position = 0
        while position < 32 * MIB:
            assert await rig.read(handle, position, MIB) == rig.contents["a"][position : position + MIB]
            position += MIB

    rig = run(scenario, {"a": 32 * MIB})
    assert rig.fetcher.fetched_bytes == 32 * MIB
    assert any(order.priority is Priority.AHEAD for order in rig.fetcher.orders)
    assert len(rig.fetcher.orders) <= 12


def test_a_reader_that_goes_away_disturbs_nobody() -> None:
    """One of two readers of a block is cancelled (its process was killed): the other gets its bytes."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=1)
        handle = rig.open("a")
        async with trio.open_nursery() as nursery:
            killed = trio.CancelScope()

            async def reader() -> None:
                with killed:
                    await rig.read(handle, 0, 4096)

            nursery.start_soon(reader)
            await trio.sleep(0.5)
            killed.cancel()
            assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]
        assert killed.cancelled_caught

    rig = run(scenario, {"a": MIB})
    assert len(rig.fetcher.orders) == 1


def test_a_failed_landing_is_repeated_where_the_store_says() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.script("a", Script(failure=FetchFailed(FailureKind.DISK, "No space left on device")))
        handle = rig.open("a")
        assert await rig.read(handle, 0, 4096) == rig.contents["a"][:4096]
        assert len(rig.store.landings_failed) == 1

    run(scenario, {"a": MIB})


def test_of_a_sibling_that_is_cached_the_disk_is_told_and_nothing_is_fetched() -> None:
    """Unless it is cached in part: then the rest is."""

    async def scenario(rig: EngineRig) -> None:
        for name in "ab":
            rig.store.land(ObjectKey(name, MIB), 0, rig.contents[name], '"v1"')
        rig.store.lose(ObjectKey("b", MIB), Extent(0, 4096))
        assert rig.reader.fetch_ahead(rig.inode("a")) is Ahead.PRESENT
        assert rig.reader.fetch_ahead(rig.inode("b")) is Ahead.BEGUN
        await trio.sleep(1)
        assert [key.stable_id for key in rig.store.expected] == ["a", "b"]
        assert {order.key for order in rig.fetcher.orders} == {ObjectKey("b", MIB)}

    run(scenario, {"a": MIB, "b": MIB})


def test_what_was_looked_up_of_a_cached_sibling_serves_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last two here; of more it would take memory for those that never come."""
    monkeypatch.setattr(reader, "FORESEEN_MAX", 2)

    async def scenario(rig: EngineRig) -> None:
        for name in "abc":
            rig.store.land(ObjectKey(name, MIB), 0, rig.contents[name], '"v1"')
            assert rig.reader.fetch_ahead(rig.inode(name)) is Ahead.PRESENT
        rig.described.clear()
        for name in "abc":
            assert await rig.read(rig.open(name), 0, MIB) == rig.contents[name]
        assert rig.described == ["a"]

    run(scenario, dict.fromkeys("abc", MIB))


def test_no_sibling_is_fetched_while_readahead_is_full() -> None:
    async def scenario(rig: EngineRig) -> None:
        assert rig.reader.fetch_ahead(rig.inode("a")) is Ahead.BEGUN
        assert rig.reader.fetch_ahead(rig.inode("b")) is Ahead.FULL
        await trio.sleep(1)
        assert rig.reader.fetch_ahead(rig.inode("b")) is Ahead.BEGUN

    run(scenario, {"a": MIB, "b": MIB}, window=MIB)


def test_small_siblings_are_fetched_before_they_are_opened() -> None:
    async def scenario(rig: EngineRig) -> None:
        assert rig.reader.fetch_ahead(rig.inode("b")) is Ahead.BEGUN
        await trio.sleep(1)
        orders = len(rig.fetcher.orders)
        handle = rig.open("b")
        assert await rig.read(handle, 0, 1000) == rig.contents["b"]
        assert len(rig.fetcher.orders) == orders

    run(scenario, {"a": MIB, "b": 1000})
