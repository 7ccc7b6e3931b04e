"""One epoll for all that a worker waits for: a descriptor, what is waited for on it, who is told."""

from __future__ import annotations

import select
from collections.abc import Callable

Told = Callable[[int, int], None]
"""(descriptor, EPOLL* bits) of an event. What it has closed meanwhile may still be told of; nothing that it reads may block."""


class Sockets:
    """See the module's text."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Told] = {}

    def watch(self, fd: int, told: Told, mask: int = select.EPOLLIN) -> None:
        """Until `unwatch`; a second call changes what is waited for. Raises OSError."""
        if fd in self._told:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._told[fd] = told

    def unwatch(self, fd: int) -> None:
        """Before `fd` is closed. What is not watched is left."""
        if self._told.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def wait(self, timeout_s: float | None) -> None:
        """Tells of what has happened, once something has or the time is over; None: for ever."""
        for fd, mask in self._epoll.poll(timeout_s):
            told = self._told.get(fd)
            if told is not None:
                told(fd, mask)
