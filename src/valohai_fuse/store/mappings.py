"""Mappings of the memory segments that a fetch worker lands in.

The same few memfds take one segment after the other (`store.memory`), and to map one anew and to unmap it costs twice what
copying a segment into it does: page tables of 2,048 entries each. So a worker keeps its mappings of those that have the full
size, which are used again; what has not been used for KEPT_S is let go, for the daemon may have given up that memory, and at
once that of an order that was given up, which is not used again.

One thread. A mapping that is let go lives on with whoever still has it.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict

from valohai_fuse.model import segment
from valohai_fuse.model.extents import SEGMENT_BYTES

KEPT_S = 2.0
MAPPINGS_MAX = 24
"""As many as are in use while one stream runs at full speed: what it may have ahead of it and what waits for the disk."""
_FULL_BYTES = segment.PAGE_BYTES + SEGMENT_BYTES


def map_whole(fd: int) -> mmap.mmap:
    """The whole of the file, shared and writable. Raises OSError."""
    return mmap.mmap(fd, os.fstat(fd).st_size)


class Mappings:
    """See the module's text."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int], tuple[mmap.mmap, float]] = OrderedDict()
        """By device and inode, which a mapping keeps from being used again: the mapping and when it was used, oldest first."""

    def map(self, fd: int, now_s: float) -> mmap.mmap:
        """As `map_whole`, of a memfd. `now_s` is `time.monotonic`."""
        status = os.fstat(fd)
        place = (status.st_dev, status.st_ino)
        found = self._kept.pop(place, None)
        mapped = mmap.mmap(fd, status.st_size) if found is None else found[0]
        if status.st_size == _FULL_BYTES:
            self._kept[place] = (mapped, now_s)
            if len(self._kept) > MAPPINGS_MAX:
                self._kept.popitem(last=False)
        return mapped

    def forget(self, fd: int) -> None:
        """Lets go of the memfd's mapping, if it is kept. Raises OSError."""
        status = os.fstat(fd)
        self._kept.pop((status.st_dev, status.st_ino), None)

    @property
    def due_at_s(self) -> float | None:
        """When `expire` has something to do; None: not before the next `map`."""
        return next((used_at_s + KEPT_S for _, used_at_s in self._kept.values()), None)

    def expire(self, now_s: float) -> None:
        """Lets go of those that have not been used for long."""
        while (due_at_s := self.due_at_s) is not None and due_at_s <= now_s:
            self._kept.popitem(last=False)
