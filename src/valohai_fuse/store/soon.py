"""Reads what the disk is about to have without a thread, where the disk is quick.

A read at random of what is cached, but not in memory, costs a disk of today less than handing it to a thread and back. So the
disk is asked, and the event loop looks for what was asked for between its other tasks. Several reads look one after the other, as
the disk brings things in about the order in which it was asked: if all looked all the time, most looks would be in vain.

Only where it pays: a disk that once took longer than SOON_S is asked in threads, until some of those have had their answers within
QUICK_S; the next time, twice as many. So one that hangs has been asked once from here, which does not wait, and a slow one, or a
file system that cannot say whether a read would wait, costs the loop next to nothing.

Belongs to the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import trio

from valohai_fuse.ports import COLD, NotHere
from valohai_fuse.store.opened import Run

Bytes = bytes | bytearray | memoryview

SOON_S: Final = 0.0003
SOON_BYTES_MAX: Final = 256 * 1024
"""What is larger takes a disk longer than that, and the loop too long to copy and verify."""
LOOKS_MAX: Final = 10
QUICK_S: Final = 0.001
RESTS_MIN: Final = 8
RESTS_MAX: Final = 1024


class Soon:
    """The quick reads of one store. `possible`: that its disk is one that cannot hang."""

    def __init__(self, *, possible: bool, monotonic: Callable[[], float]) -> None:
        self._possible = possible
        self._monotonic = monotonic
        self._rests = RESTS_MIN
        self._rests_left = 0
        """Quick answers in threads until the disk is asked from here again."""
        self._is_looking = False
        self._queue = trio.lowlevel.ParkingLot()
        """Those that wait for their turn to look."""

    @property
    def is_quick(self) -> bool:
        """Whether it is worth trying."""
        return self._possible and not self._rests_left

    def note(self, took_s: float) -> None:
        """A thread has had from the disk what it was asked for."""
        if self._rests_left and took_s <= QUICK_S:
            self._rests_left -= 1

    async def read(self, runs: Sequence[Run], look: Callable[[], Bytes | NotHere]) -> Bytes | NotHere:
        """What `look` finds once the disk has brought the `runs`; COLD: not soon enough."""
        for run in runs:
            run.opened.ask(run.first, run.stop - run.start)
        if self._is_looking:
            await self._queue.park()
        self._is_looking = True
        try:
            return await self._look_soon(look)
        finally:
            if self._queue:
                self._queue.unpark()
            else:
                self._is_looking = False

    async def _look_soon(self, look: Callable[[], Bytes | NotHere]) -> Bytes | NotHere:
        until_s = self._monotonic() + SOON_S
        for _ in range(LOOKS_MAX if self.is_quick else 1):
            found = look()
            if found is not COLD:
                self._rests = RESTS_MIN
                return found
            if self._monotonic() >= until_s:
                break
            await trio.lowlevel.checkpoint()
        if self.is_quick:
            self._rests_left, self._rests = self._rests, min(RESTS_MAX, 2 * self._rests)
        return COLD
