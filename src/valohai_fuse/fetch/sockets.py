"""The sockets of a worker: how one for a connection is made, and one epoll for all that is waited for: a descriptor, what is
waited for on it, who is told."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from typing import Final

WINDOW_BYTES: Final = 1024 * 1024
"""What a store may send before it was received. Linux begins with 64 KiB and gives more only to who takes more in each round
trip: the connection that a reader waits for was given its turn 30 times, 93 KiB each, while others filled."""

Told = Callable[[int, int], None]
"""(descriptor, EPOLL* bits) of an event. What it has closed meanwhile may still be told of; nothing that it reads may block."""


def new_stream(family: int, kind: int, protocol: int = 0) -> socket.socket:
    """An unconnected stream socket with room for WINDOW_BYTES, which still grows by itself. Raises OSError."""
    sock = socket.socket(family, kind, protocol)
    with contextlib.suppress(OSError):
        # SO_RCVBUF would end the growing, and is bounded by net.core.rmem_max. A low-water mark makes room for what it asks
        # for (tcp(7), net/ipv4/tcp.c: tcp_set_rcvlowat), which stays when the mark is taken back.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WINDOW_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    return sock


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
