"""Has what a sequential reader of cached bytes comes to soon loaded from the disk into memory, by whole segments.

A stream is worth it once it has read LOAD_RUN_BYTES in order and found the disk's bytes not in memory (COLD); then the
segments next to come are loaded, AHEAD_SEGMENTS beyond the one that it is in (fewer where three do that), as long as it goes on.
A load that is no use (not all of it is there, or the page cache has it) ends that until the next cold read.

A reader that catches up with a load waits for it, PATIENCE_S at the most; then all read by themselves, and nothing more is loaded
until that load has ended: a disk that does not answer gets no more questions from here.

State changes only on the trio thread, in functions that do not await.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from valohai_fuse.engine.objects import Handle, RemoteObject
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.model.readahead import Plan
from valohai_fuse.ports import BlockStore, Version

log = logging.getLogger(__name__)

LOAD_RUN_BYTES: Final = 4 * 1024 * 1024
AHEAD_SEGMENTS: Final = 6
_AHEAD_SEGMENTS_IN_ALL: Final = 12
"""Of all readers, shared evenly."""
_OVERTAKEN_SEGMENTS_MAX: Final = 2
"""So far back may a read be that others of its stream have overtaken (the kernel has several under way) and that memory serves."""
READERS_MAX: Final = 3
"""Each has one segment more in memory than are loaded ahead of it, and the store holds nineteen in all."""
READER_IDLE_S: Final = 1.0
"""A reader that has paused for so long gives its place up."""
PATIENCE_S: Final = 1.0

_Place = tuple[RemoteObject, int]


class Loads:
    """All loads of one mount."""

    def __init__(self, store: BlockStore, nursery: trio.Nursery) -> None:
        self._store = store
        self._nursery = nursery
        self._under_way: dict[_Place, trio.Event] = {}
        self._overdue = 0
        self._readers: dict[int, float] = {}
        """Numbers of the handles that load, and when each last read."""

    def on_hit(self, handle: Handle, extent: Extent) -> None:
        """A read that continues a stream was served from memory."""
        if handle.loaded_upto:
            self._begin_ahead(handle, extent.stop, overtaken_segments_max=_OVERTAKEN_SEGMENTS_MAX)

    async def on_cold(self, handle: Handle, extent: Extent, plan: Plan) -> bool:
        """The bytes of a read are on the disk. True: they were being loaded, and the store may have them in memory by now."""
        if plan.run_bytes >= LOAD_RUN_BYTES:
            self._begin_ahead(handle, extent.stop)
        ended = self._under_way.get((handle.object, extent.start // SEGMENT_BYTES))
        if ended is None or self._overdue:
            return False
        with trio.move_on_after(PATIENCE_S):
            await ended.wait()
            return True
        self._give_up(handle.object, extent.start // SEGMENT_BYTES)
        return False

    def _begin_ahead(self, handle: Handle, read_upto: int, *, overtaken_segments_max: int = 0) -> None:
        obj = handle.object
        index = -(-read_upto // SEGMENT_BYTES)
        ahead = min(AHEAD_SEGMENTS, _AHEAD_SEGMENTS_IN_ALL // len(self._readers | {handle.number: 0.0}))
        stop = min(index + ahead, obj.key.size // SEGMENT_BYTES)  # a last one that is short is not worth it
        upto = handle.loaded_upto // SEGMENT_BYTES
        if not index <= upto <= index + AHEAD_SEGMENTS + overtaken_segments_max:
            upto = index  # it began elsewhere, or has been overtaken
        if upto >= stop:
            return
        if obj.version is None or self._overdue or not self._has_place(handle):
            handle.loaded_upto = 0
            return
        handle.loaded_upto = stop * SEGMENT_BYTES
        for number in range(upto, stop):
            if (obj, number) not in self._under_way:
                self._under_way[obj, number] = ended = trio.Event()
                self._nursery.start_soon(self._run, handle, obj.version, number, ended)

    def _has_place(self, handle: Handle) -> bool:
        now_t = trio.current_time()
        if handle.number not in self._readers:
            self._readers = {number: t for number, t in self._readers.items() if now_t - t < READER_IDLE_S}
            if len(self._readers) >= READERS_MAX:
                return False
        self._readers[handle.number] = now_t
        return True

    async def _run(self, handle: Handle, version: Version, number: int, ended: trio.Event) -> None:
        place = (handle.object, number)
        loaded = False
        try:
            loaded = await self._store.load(handle.object.key, version, number * SEGMENT_BYTES)
        except Exception:  # a bug: the reader gets its bytes without us
            log.exception("%s: loading segment %d failed", handle.object.label, number)
        finally:
            if self._under_way.get(place) is ended:
                del self._under_way[place]
            else:
                self._overdue -= 1
            ended.set()
        if not loaded:
            handle.loaded_upto = 0

    def _give_up(self, obj: RemoteObject, number: int) -> None:
        if self._under_way.pop((obj, number), None) is not None:
            self._overdue += 1
