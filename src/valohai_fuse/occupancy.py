"""How much of a mount is cached: an estimate that is cheap to ask for, whatever the number of files.

To count is to look at a table per segment, so it is done in passes: a pass is begun by a question and by nothing else (a mount
that nobody asks about costs nothing), goes through the files in short pieces, rests as long as it worked, and is repeated at the
earliest after many times its own duration. Between passes what was fetched since is added. So the estimate is exact when all is
quiet after a pass; it is too high by what was evicted, and never above the size of all files.

All on the trio thread; `_running` and the results change in functions that do not await in between.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from valohai_fuse.model.tree import ROOT, Inode, Tree

log = logging.getLogger(__name__)

FILES_PER_PIECE: Final = 50
PASS_EVERY_S: Final = 10.0
PASS_SHARE_MAX: Final = 0.05
"""Of the time between two passes that a pass may take."""
FIRST_WAIT_S: Final = 0.5
"""The first question waits this long for the first pass, which suffices for some thousand files."""


class Occupancy:
    """Of one mount. `cached_bytes` counts one file; `fetched_bytes` is what stores have sent since the daemon began."""

    def __init__(
        self,
        nursery: trio.Nursery,
        tree: Tree,
        cached_bytes: Callable[[Inode], Awaitable[int]],
        fetched_bytes: Callable[[], float],
    ) -> None:
        self._nursery = nursery
        self._tree = tree
        self._cached_bytes = cached_bytes
        self._fetched_bytes = fetched_bytes
        self._running = False
        self._next_t = float("-inf")
        self._counted: int | None = None
        self._fetched_then = 0.0
        self._first = trio.Event()

    async def estimate(self) -> int | None:
        """Bytes of the mount's files that are cached; None while the first pass takes longer than a person waits."""
        if not self._running and trio.current_time() >= self._next_t:
            self._running = True
            self._nursery.start_soon(self._run)
        if not self._first.is_set():
            with trio.move_on_after(FIRST_WAIT_S):
                await self._first.wait()
        if self._counted is None:
            return None
        fetched = max(0, int(self._fetched_bytes() - self._fetched_then))
        return min(self._tree.totals()[1], self._counted + fetched)

    async def _run(self) -> None:
        began_t = trio.current_time()
        try:
            await self._count(began_t)
        except Exception:  # this edge absorbs bugs: a status without this number, not a dead mount
            log.exception("what is cached could not be counted")
        self._next_t = trio.current_time() + max(PASS_EVERY_S, (trio.current_time() - began_t) / PASS_SHARE_MAX)
        self._running = False
        self._first.set()

    async def _count(self, began_t: float) -> None:
        counted = 0
        for position, inode in enumerate(self._tree.walk_files(ROOT), 1):
            counted += await self._cached_bytes(inode)
            if position % FILES_PER_PIECE == 0:
                await self._breathe(began_t, position)
        self._counted = counted
        self._fetched_then = self._fetched_bytes()

    async def _breathe(self, began_t: float, position: int) -> None:
        """Lets others run; a pass that has become long leaves half of the processor."""
        elapsed_s = trio.current_time() - began_t
        if elapsed_s < FIRST_WAIT_S:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(min(0.05, elapsed_s / position * FILES_PER_PIECE / 2))
