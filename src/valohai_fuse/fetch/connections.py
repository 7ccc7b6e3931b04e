"""Plain connections to stores: kept, by origin, after every answer that was read to its end, and opened before they are needed.

When a large object begins to be read, spare connections are opened to the address that the first one has, while its bytes are
on their way: what is asked for next need not wait a round trip for them. A spare that fails is not missed.

One thread. Invariants: a connection that is taken is nobody else's; what is closed is not told of again. Must not know: HTTP,
what is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections import OrderedDict
from typing import Final

from valohai_fuse.fetch.curl import IDLE_CONNECTION_S
from valohai_fuse.fetch.framing import Answer
from valohai_fuse.fetch.sockets import Sockets, Told, new_stream
from valohai_fuse.fetch.transfer import Transfer

READY: Final = 12
"""Connections to one origin, once a large object of it is read: what a stream has under way at once when its window has grown."""
SPARES_EVERY_S: Final = 10.0
"""At the most: a store that closes what is not used at once is not asked again and again."""
_SPARED_ORIGINS_MAX: Final = 64


class Connection:
    """One connection, and the answer that comes on it, if one is awaited."""

    __slots__ = (
        "answer",
        "fd",
        "idle_at_s",
        "is_connecting",
        "is_counted",
        "is_reused",
        "origin",
        "sent_at_s",
        "sock",
        "transfer",
        "unsent",
    )

    def __init__(self, origin: bytes, sock: socket.socket) -> None:
        self.origin = origin
        self.sock = sock
        self.fd = sock.fileno()
        self.transfer: Transfer | None = None
        self.answer = Answer()
        self.unsent = b""
        """Of the request."""
        self.is_connecting = False
        self.is_reused = False
        """Whether it has lain idle, so that its store may have closed it."""
        self.is_counted = False
        """Whether a transfer has been told that it was opened."""
        self.sent_at_s = 0.0
        self.idle_at_s = 0.0


class Connections:
    """See the module's text. `told` hears of events on connections that are not idle or being opened, too."""

    def __init__(self, sockets: Sockets, told: Told) -> None:
        self.idle_max = 16
        self._sockets = sockets
        self._told = told
        self._by_fd: dict[int, Connection] = {}
        self._idle: OrderedDict[int, Connection] = OrderedDict()
        """By descriptor, the longest idle first."""
        self._spared_at_s: dict[bytes, float] = {}
        """By origin, when spare ones were last opened."""

    def get(self, fd: int) -> Connection | None:
        """The connection with this descriptor."""
        return self._by_fd.get(fd)

    def add(self, origin: bytes, sock: socket.socket) -> Connection:
        """One that is made, now ours. Raises OSError (the limit of watched descriptors), with the socket closed."""
        connection = Connection(origin, sock)
        self._watch(connection, select.EPOLLIN)
        return connection

    def take(self, origin: bytes) -> Connection | None:
        """An idle one to the origin, the one that was used last: what is not needed grows old."""
        for connection in reversed(self._idle.values()):
            if connection.origin == origin:
                break
        else:
            return None
        del self._idle[connection.fd]
        if time.monotonic() - connection.idle_at_s <= IDLE_CONNECTION_S:
            return connection
        self.close(connection)
        return self.take(origin)

    def keep(self, connection: Connection) -> None:
        """It is idle now."""
        connection.idle_at_s = time.monotonic()
        connection.is_reused = True
        self._idle[connection.fd] = connection
        if len(self._idle) > self.idle_max:
            _, oldest = self._idle.popitem(last=False)
            self.close(oldest)

    def close(self, connection: Connection) -> None:
        """It is gone."""
        self._sockets.unwatch(connection.fd)
        self._idle.pop(connection.fd, None)
        self._by_fd.pop(connection.fd, None)
        connection.transfer = None
        connection.sock.close()

    def open_spares(self, like: Connection, now_s: float) -> None:
        """Begins connecting to where `like` is connected, up to READY in all."""
        if now_s - self._spared_at_s.get(like.origin, -SPARES_EVERY_S) < SPARES_EVERY_S:
            return
        if len(self._spared_at_s) >= _SPARED_ORIGINS_MAX:
            self._spared_at_s.clear()
        self._spared_at_s[like.origin] = now_s
        there = sum(other.origin == like.origin for other in self._by_fd.values())
        with contextlib.suppress(OSError):
            for _ in range(min(READY, self.idle_max) - there):
                self._open(like)

    def spare_told(self, spare: Connection) -> None:
        """A spare one is connected, or has failed."""
        if spare.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close(spare)
            return
        spare.is_connecting = False
        self._sockets.watch(spare.fd, self._told)
        self.keep(spare)

    def _open(self, like: Connection) -> None:
        peer = like.sock.getpeername()
        sock = new_stream(like.sock.family, like.sock.type)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sock.connect_ex(peer) not in {0, errno.EINPROGRESS}:
            sock.close()
            return
        spare = Connection(like.origin, sock)
        spare.is_connecting = True
        self._watch(spare, select.EPOLLOUT)

    def _watch(self, connection: Connection, mask: int) -> None:
        try:
            self._sockets.watch(connection.fd, self._told, mask)
        except OSError:
            connection.sock.close()
            raise
        self._by_fd[connection.fd] = connection
