"""Waits for what another process of the cache is fetching already, instead of fetching it as well.

A flight's blocks are claimed in the store when it begins, right after the store was asked what is missing. Where somebody else
has claimed some of them it takes what lands there, block by block, and ends with it; should nothing land for PATIENCE_S, or the
claim fall free with blocks still missing, it fetches what is left itself. Claims are advice: without them blocks come twice, and
nothing else happens.

Must not know what a claim is made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import trio

from valohai_fuse.ports import BlockStore

if TYPE_CHECKING:
    from valohai_fuse.engine.flights import Flight

PATIENCE_S = 3.0
_LOOK_FIRST_S = 0.002
_LOOK_MAX_S = 0.02


@contextlib.asynccontextmanager
async def fetched_once(store: BlockStore, flight: Flight) -> AsyncIterator[None]:
    """Keeps the flight's claim while the block runs, or waits for who has one before it; then `flight.coming` is what is still
    to be fetched, possibly nothing."""
    try:
        if not flight.claimed:
            await _follow(store, flight)
        yield
    finally:
        if flight.claimed:
            store.unclaim(flight.object.key, flight.extent)


async def _follow(store: BlockStore, flight: Flight) -> None:
    """Advances the flight with what others land, until its blocks are claimed for us or need not be."""
    obj = flight.object
    give_up_at = trio.current_time() + PATIENCE_S
    pause_s = _LOOK_FIRST_S
    while True:
        flight.claimed = store.claim(obj.key, flight.extent)
        if not obj.cache_distrusted:  # else the cache has nothing for us, whoever lands it
            landed = _landed(store, flight)
            if landed > flight.landed:
                give_up_at = trio.current_time() + PATIENCE_S
                pause_s = _LOOK_FIRST_S
                flight.advance(landed)
        if flight.claimed or obj.cache_distrusted or not flight.coming or trio.current_time() >= give_up_at:
            return
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_MAX_S)


def _landed(store: BlockStore, flight: Flight) -> int:
    """How far the flight's blocks are present without a gap."""
    obj = flight.object
    if obj.version is None:
        version = store.version(obj.key, flight.extent.start)
        if version is None:
            return flight.landed
        obj.adopt(version)
    assert obj.version is not None
    missing = store.missing(obj.key, obj.version, flight.coming)
    return missing[0].start if missing else flight.extent.stop
