"""Segments in memory, for when the disk takes no writes: memfds in the format of cache files.

A fetch worker lands in one as in any file, by the path /proc/PID/fd/N, for it runs as the same user. Bounded by what the
segments may hold when full, least recently used first; forgetting one under a reader or a writer is harmless, for both hold
descriptors of their own, and a writer that comes too late recognises by the memfd's name that N means something else now.

Not thread-safe: the store calls this under its lock.
"""

from __future__ import annotations

import os

from cachetools import LRUCache

from valohai_fuse.model import segment
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store.landing import memory_name
from valohai_fuse.store.opened import OpenSegment

SEGMENTS_MAX = 256
"""Each costs a descriptor, so small objects are bounded by number."""


def _bytes_when_full(opened: OpenSegment) -> int:
    return segment.PAGE_BYTES + segment.segment_bytes(opened.key.size, opened.index)


class _Segments(LRUCache[tuple[ObjectKey, int], OpenSegment]):
    def __setitem__(self, key: tuple[ObjectKey, int], value: OpenSegment) -> None:
        while len(self) >= SEGMENTS_MAX and key not in self:
            self.popitem()
        super().__setitem__(key, value)


class MemorySegments:
    """At most `bytes_max` (but always room for one segment) of segments."""

    def __init__(self, bytes_max: int) -> None:
        self._segments = _Segments(max(bytes_max, segment.PAGE_BYTES + SEGMENT_BYTES), getsizeof=_bytes_when_full)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def bytes_when_full(self) -> int:
        """What the present segments take at the most."""
        return int(self._segments.currsize)

    def get(self, key: ObjectKey, index: int) -> OpenSegment | None:
        """The segment, which now counts as just used, or None."""
        return self._segments.get((key, index))

    def indexes(self, key: ObjectKey) -> list[int]:
        """Which segments of the object are here."""
        return [index for other, index in self._segments if other == key]

    def path(self, key: ObjectKey, index: int) -> str:
        """Where a worker of the same user lands this segment; made if it is not there. Raises OSError."""
        opened = self._segments.get((key, index))
        if opened is None:
            name = memory_name(segment.object_digest(key.stable_id, key.size).hex(), index)
            opened = OpenSegment(os.memfd_create(name, os.MFD_CLOEXEC), key, index, never_waits=True)
            self._segments[key, index] = opened
        return f"/proc/{os.getpid()}/fd/{opened.fd}"

    def discard(self, key: ObjectKey, index: int) -> None:
        """Forgets one, if it is here."""
        self._segments.pop((key, index), None)

    def clear(self) -> None:
        """Forgets all of them."""
        self._segments.clear()
