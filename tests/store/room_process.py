"""A process that lands objects through a store with a bound: `python room_process.py CACHE_DIR BYTES_MAX SEED COUNT`.

As a daemon does it: room, store and evictor on one directory, four landings at a time. Prints how many went to the disk.
"""

from __future__ import annotations

import random
import sys

import trio

from valohai_fuse.model.eviction import Budget
from valohai_fuse.model.extents import BLOCK_BYTES, Extent
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store.evictor import Evictor
from valohai_fuse.store.landing import SegmentWriter, is_memory_path
from valohai_fuse.store.room import Room
from valohai_fuse.store.segments import SegmentStore


async def main(cache_dir: str, bytes_max: int, seed: int, count: int) -> int:
    """Lands `count` objects of 1 to 32 blocks; returns how many landed on the disk."""
    budget = Budget(bytes_max=bytes_max)
    room = Room(cache_dir, budget)
    store = SegmentStore(cache_dir, room=room)
    sizes = random.Random(seed)
    on_disk = 0
    send, receive = trio.open_memory_channel[ObjectKey](0)

    async def land() -> None:
        nonlocal on_disk
        async for key in receive:
            async with store.landing(key, Extent(0, key.size), ahead=False) as place:
                assert place is not None
                on_disk += not is_memory_path(place.segment_path)
                with SegmentWriter(place.segment_path, key, 0, "v") as writer:
                    for at in range(0, key.size, BLOCK_BYTES):
                        writer.land(at, bytes(BLOCK_BYTES))
                        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Evictor(cache_dir, budget, room=room, in_use=store.being_read).run)
        async with trio.open_nursery() as landers:
            for _ in range(4):
                landers.start_soon(land)
            for n in range(count):
                await send.send(ObjectKey(f"datum:{seed}-{n}", sizes.randint(1, 32) * BLOCK_BYTES))
            send.close()
        nursery.cancel_scope.cancel()
    store.close()
    return on_disk


if __name__ == "__main__":
    bound, nth, how_many = map(int, sys.argv[2:5])
    print(trio.run(main, sys.argv[1], bound, nth, how_many))
