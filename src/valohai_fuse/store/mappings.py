"""Mappings of the memory segments that a fetch worker lands in.

The same few memfds take one segment after the other (`store.memory`), and to map one anew and to unmap it costs twice what
copying a segment into it does where the kernel has given it small pages: page tables of 2,048 entries each. So a worker keeps
its mappings of those that have the full size, which are used again; what has not been used for KEPT_S is let go, for the daemon
may have given up that memory, and at once that of an order that was given up, which is not used again.

Memory that is new is dear: 2 MiB of it took 5 ms where the kernel, or the machine's host, had to free them first, 0.1 ms where not.
So it is asked for as soon as an order is known, a round trip before its bytes come, in a thread of its own, beside what is received
meanwhile (`expect`).

One thread uses it. A mapping that is let go lives on with whoever still has it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from valohai_fuse.model import segment
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.store.huge import HUGE_BYTES, HugePages, map_whole

KEPT_S = 2.0
MAPPINGS_MAX = 24
"""As many as are in use while one stream runs at full speed: what it may have ahead of it and what waits for the disk."""
_FULL_BYTES = segment.PAGE_BYTES + SEGMENT_BYTES


@dataclass(slots=True)
class _Kept:
    mapped: memoryview
    used_at_s: float
    asked: set[int] = field(default_factory=set)
    """Chunks for which huge pages have been asked."""
    coming: Future[None] | None = None
    """The last of those that were expected."""


class Mappings:
    """See the module's text."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int], _Kept] = OrderedDict()
        """By device and inode, which a mapping keeps from being used again; oldest first."""
        self._pages = HugePages()
        self._thread = ThreadPoolExecutor(1, "new-memory")

    def expect(self, fd: int, start: int, stop: int, now_s: float) -> None:
        """Has memory made ready for `map` with the same arguments. Raises OSError."""
        kept = self._keep(fd, now_s)
        if kept is not None and (chunks := self._not_asked(kept, start, stop)):
            kept.coming = self._thread.submit(self._ask, kept.mapped, chunks)

    def map(self, fd: int, start: int, stop: int, now_s: float) -> memoryview:
        """The whole memfd, shared and writable, to be written to from `start` to `stop`. `now_s` is `time.monotonic`.

        Raises OSError.
        """
        kept = self._keep(fd, now_s)
        if kept is None:
            return map_whole(fd, os.fstat(fd).st_size)
        if kept.coming is not None:
            kept.coming.result()  # to touch the memory meanwhile would wait as well
            kept.coming = None
        self._ask(kept.mapped, self._not_asked(kept, start, stop))
        return kept.mapped

    def _keep(self, fd: int, now_s: float) -> _Kept | None:
        """None for a segment that is not of full size."""
        status = os.fstat(fd)
        if status.st_size != _FULL_BYTES:
            return None
        place = (status.st_dev, status.st_ino)
        kept = self._kept.pop(place, None) or _Kept(map_whole(fd, status.st_size), now_s)
        kept.used_at_s = now_s
        self._kept[place] = kept
        if len(self._kept) > MAPPINGS_MAX:
            self._kept.popitem(last=False)
        return kept

    @staticmethod
    def _not_asked(kept: _Kept, start: int, stop: int) -> set[int]:
        chunks = set(range(start // HUGE_BYTES, -(-stop // HUGE_BYTES))) - kept.asked
        kept.asked |= chunks
        return chunks

    def _ask(self, mapped: memoryview, chunks: set[int]) -> None:
        for chunk in sorted(chunks):
            self._pages.collapse(mapped, chunk * HUGE_BYTES, (chunk + 1) * HUGE_BYTES)

    def forget(self, fd: int) -> None:
        """Lets go of the memfd's mapping, if it is kept. Raises OSError."""
        status = os.fstat(fd)
        self._kept.pop((status.st_dev, status.st_ino), None)

    @property
    def due_at_s(self) -> float | None:
        """When `expire` has something to do; None: not before the next `map`."""
        return next((kept.used_at_s + KEPT_S for kept in self._kept.values()), None)

    def expire(self, now_s: float) -> None:
        """Lets go of those that have not been used for long."""
        while (due_at_s := self.due_at_s) is not None and due_at_s <= now_s:
            self._kept.popitem(last=False)
