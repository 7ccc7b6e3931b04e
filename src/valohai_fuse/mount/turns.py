"""Whose turn it is to take the kernel's next request, and for how long.

pyfuse3 has tasks that each wait under a lock until the session is readable, take one request, answer it, and wait again. With
trio's fair lock and a wait for each of them that is two rounds of the loop and three system calls a request, more than most
answers cost. Here a task that has answered at once goes on with what is waiting already, for TURN_S at the most; then, or when
nothing waits, or when an answer has to wait itself, everything else has its turn.

It comes in where pyfuse3 puts in what stands for trio when it runs on asyncio: its global `trio`.
"""

from __future__ import annotations

import select
import time
import types
from typing import Any, Final

import pyfuse3
import trio

TURN_S: Final = 0.001
"""So long nothing else runs on the loop, and the time of the answer that was begun last."""


class ReadLock:
    """Held by the one task that waits for a request. Unlike `trio.Lock` it does not go to the next task when it is given back:
    that one is woken, and parks again if the first was faster."""

    def __init__(self) -> None:
        self._held = False
        self._parked = trio.lowlevel.ParkingLot()
        self._woken = False
        """One is on its way out of the parking lot, and sees to it that there is always somebody who waits."""

    async def __aenter__(self) -> None:
        while self._held:
            try:
                await self._parked.park()
            finally:
                self._woken = False
        self._held = True

    async def __aexit__(self, *exc_info: object) -> None:
        self._held = False
        if not self._woken and self._parked:
            self._woken = True
            self._parked.unpark()


class Turns:
    """Waits until a descriptor is readable, and does not ask the loop where that is so already."""

    def __init__(self) -> None:
        self._polls: dict[int, select.poll] = {}
        self._until_s = 0.0

    async def wait_readable(self, fd: int) -> None:
        """As `trio.lowlevel.wait_readable`, but a checkpoint only once in TURN_S."""
        if time.monotonic() < self._until_s and self._poll(fd).poll(0):
            return
        await trio.lowlevel.wait_readable(fd)
        self._until_s = time.monotonic() + TURN_S

    def _poll(self, fd: int) -> select.poll:
        found = self._polls.get(fd)
        if found is None:
            found = self._polls[fd] = select.poll()
            found.register(fd, select.POLLIN)
        return found


class _Instead(types.ModuleType):
    """A module but for what is set on it."""

    def __init__(self, module: types.ModuleType, **instead: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(instead)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install() -> None:
    """Has pyfuse3 take turns so. Before its `main`; once a process."""
    lowlevel = _Instead(trio.lowlevel, wait_readable=Turns().wait_readable)
    pyfuse3.trio = _Instead(trio, Lock=ReadLock, lowlevel=lowlevel)  # type: ignore[attr-defined]
