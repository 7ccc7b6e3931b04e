"""Which requests of the kernel are being answered now, oldest first: what the watchdog looks at.

Invariant: one entry per task that is inside a guarded handler, in the order in which they began (a dictionary keeps it, and a
task answers one request at a time). Changed on the trio thread only; entering and leaving cost a dictionary entry each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import trio


@dataclass(frozen=True, slots=True)
class UnderWay:
    """One request. `began_s` is of `time.monotonic`."""

    name: str
    began_s: float
    task: trio.lowlevel.Task


class RequestsUnderWay:
    """See the module's text."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[trio.lowlevel.Task, tuple[str, float]] = {}

    def begin(self, name: str) -> trio.lowlevel.Task:
        """The current task answers a request from now on; gives what `end` wants."""
        task = trio.lowlevel.current_task()
        self._entries[task] = (name, time.monotonic())
        return task

    def end(self, task: trio.lowlevel.Task) -> None:
        """It is answered."""
        self._entries.pop(task, None)

    def _all(self) -> Iterator[UnderWay]:
        return (UnderWay(name, began_s, task) for task, (name, began_s) in self._entries.items())

    def since(self, began_s: float) -> list[UnderWay]:
        """Those that began before `began_s`, oldest first."""
        return list(takewhile(lambda request: request.began_s < began_s, self._all()))

    def oldest(self) -> UnderWay | None:
        """The one that waits longest; None when nothing is under way."""
        return next(self._all(), None)

    def __len__(self) -> int:
        return len(self._entries)
