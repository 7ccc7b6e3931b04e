"""What another process is fetching is waited for, not fetched as well: `engine.sharing`."""

from __future__ import annotations

import trio

from support.engine_rig import MIB, EngineRig, run
from valohai_fuse.engine.reader import Ahead
from valohai_fuse.model.extents import Extent


def key_of(rig: EngineRig, name: str = "a"):  # type: ignore[no-untyped-def] # noqa: ANN201 - an ObjectKey
    return rig._describe(rig.inode(name))[0]


def test_what_another_process_lands_is_not_fetched() -> None:
    async def scenario(rig: EngineRig) -> None:
        key, content = key_of(rig), rig.contents["a"]
        rig.store.claimed_by_others.append((key, Extent(0, MIB)))
        handle = rig.open("a")

        async def other() -> None:
            for at in range(0, MIB, MIB // 4):
                await trio.sleep(1)
                rig.store.land(key, at, content[at : at + MIB // 4], '"v1"')
            rig.store.claimed_by_others.clear()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert await rig.read(handle, 0, 1000) == content[:1000]
            assert 1 <= trio.current_time() - began < 1.1, "as soon as its bytes are there"
            assert await rig.read(handle, MIB - 1000, 1000) == content[-1000:]
        assert not rig.fetcher.orders
        rig.reader.close(handle)

    began = 0.0

    async def timed(rig: EngineRig) -> None:
        nonlocal began
        began = trio.current_time()
        await scenario(rig)

    run(timed, {"a": MIB})


def test_what_another_process_lands_while_our_flight_begins_is_not_fetched() -> None:
    """Its claim falls free with its last byte, which may be before the task of ours has run for the first time."""

    async def scenario(rig: EngineRig) -> None:
        key, content = key_of(rig), rig.contents["a"]
        rig.store.claimed_by_others.append((key, Extent(0, MIB)))
        assert rig.reader.fetch_ahead(rig.inode("a")) is Ahead.BEGUN
        rig.store.land(key, 0, content, '"v1"')
        rig.store.claimed_by_others.clear()
        handle = rig.open("a")
        assert await rig.read(handle, 0, MIB) == content
        await trio.sleep(1)
        assert not rig.fetcher.orders
        assert not rig.store.claimed
        rig.reader.close(handle)

    run(scenario, {"a": MIB})


def test_another_process_that_does_not_deliver_is_not_waited_for() -> None:
    """A claim is advice: after a few seconds without a byte we fetch ourselves, and only what is missing."""

    async def scenario(rig: EngineRig) -> None:
        key, content = key_of(rig), rig.contents["a"]
        rig.store.claimed_by_others.append((key, Extent(0, MIB)))
        rig.store.land(key, 0, content[: MIB // 2], '"v1"')
        handle = rig.open("a")
        began = trio.current_time()
        assert await rig.read(handle, 0, MIB) == content
        assert 3 <= trio.current_time() - began < 4
        assert [order.extent for order in rig.fetcher.orders] == [Extent(MIB // 2, MIB)]
        assert not rig.store.claimed
        rig.reader.close(handle)

    run(scenario, {"a": MIB})


def test_a_claim_that_falls_free_is_taken_over() -> None:
    async def scenario(rig: EngineRig) -> None:
        key, content = key_of(rig), rig.contents["a"]
        rig.store.claimed_by_others.append((key, Extent(0, MIB)))
        handle = rig.open("a")
        async with trio.open_nursery() as nursery:

            async def other_dies() -> None:
                await trio.sleep(1)
                rig.store.claimed_by_others.clear()

            nursery.start_soon(other_dies)
            began = trio.current_time()
            assert await rig.read(handle, 0, MIB) == content
            assert trio.current_time() - began < 1.5
        assert not rig.store.claimed, "given back"
        rig.reader.close(handle)

    run(scenario, {"a": MIB})


def test_without_room_only_what_is_waited_for_is_fetched() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.store.full = True
        assert rig.reader.fetch_ahead(rig.inode("a")) is Ahead.BEGUN
        await trio.sleep(10)
        assert not rig.fetcher.orders
        handle = rig.open("a")
        assert await rig.read(handle, 0, MIB) == rig.contents["a"]
        assert rig.store.landings == 0, "given back"
        rig.reader.close(handle)

    run(scenario, {"a": MIB})
