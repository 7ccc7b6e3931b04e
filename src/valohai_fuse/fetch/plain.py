"""Brings answers over plain HTTP: its own HTTP/1.1 on sockets, for libcurl hands a body over in pieces of 16 KiB, each an
object and a callback, and a third of a cold stream's processor time in the worker went there (docs/decisions.md).

A body is received into one buffer that stays in the processor's cache, and goes on from there to its place. Connections come
from `curl`, which resolves names and races addresses; they are kept, by origin, after every answer that was read to its end.

What is not plain is libcurl's whole: TLS, proxies, credentials in the URL, hosts in other characters than ASCII's, headers
that would change what a connection does (`takes`).

One thread. Invariants: each exchange ends once, in `collect` or by `release`; a kept connection that its store closed before a
new answer began costs a new connection, not the order. Must not know: what is landed, orders.
"""

from __future__ import annotations

import mmap
import re
import select
import socket
import time
from collections import OrderedDict
from typing import Final

from valohai_fuse.fetch import location
from valohai_fuse.fetch.curl import IDLE_CONNECTION_S, USER_AGENT, CurlCarrier
from valohai_fuse.fetch.framing import Answer
from valohai_fuse.fetch.response import Rejected
from valohai_fuse.fetch.sockets import Sockets
from valohai_fuse.fetch.transfer import Transfer
from valohai_fuse.fetch.wire import Configure
from valohai_fuse.ports import FailureKind

RECEIVE_BYTES: Final = 256 * 1024
"""At a time and at the most: stays in a processor's own cache until it is at its place."""
_RECEIVES_MAX: Final = 4
"""One after the other, before others have their turn: each turn of the loop looks at all transfers."""
_PLAIN_ORIGIN: Final = re.compile(rb"http://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?\Z")
_LIBCURLS_HEADERS: Final = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_DEFAULT_HEADERS: Final = ((b"User-Agent", USER_AGENT.encode()), (b"Accept", b"*/*"))


class _Connection:
    """One connection, and the answer that comes on it, if one is awaited."""

    __slots__ = ("answer", "fd", "idle_at_s", "is_reused", "origin", "sent_at_s", "sock", "transfer", "unsent")

    def __init__(self, origin: bytes, sock: socket.socket) -> None:
        self.origin = origin
        self.sock = sock
        self.fd = sock.fileno()
        self.transfer: Transfer | None = None
        self.answer = Answer()
        self.unsent = b""
        """Of the request."""
        self.is_reused = False
        self.sent_at_s = 0.0
        self.idle_at_s = 0.0


class PlainCarrier:
    """See the module's text."""

    def __init__(self, sockets: Sockets, curl: CurlCarrier) -> None:
        self._sockets = sockets
        self._curl = curl
        self._connections_max = 16
        self._is_direct = True
        self._buffer = memoryview(mmap.mmap(-1, RECEIVE_BYTES))  # pages of its own: memory only once it is used
        self._by_fd: dict[int, _Connection] = {}
        self._by_transfer: dict[Transfer, _Connection] = {}
        self._idle: OrderedDict[int, _Connection] = OrderedDict()
        """By descriptor, the longest idle first."""
        self._ended: list[tuple[Transfer, Rejected | OSError | None]] = []

    def configure(self, configure: Configure) -> None:
        """For all requests from now on."""
        self._connections_max = configure.connections
        self._is_direct = not configure.has_http_proxy

    def takes(self, transfer: Transfer) -> bool:
        """Whether the transfer's URL and headers are plain enough."""
        return (
            self._is_direct
            and _PLAIN_ORIGIN.match(location.origin(transfer.url)) is not None
            and not any(name.lower() in _LIBCURLS_HEADERS for name, _ in transfer.order.headers)
        )

    def send(self, transfer: Transfer) -> None:
        """Asks for what the transfer wants. Raises Rejected, with nothing begun."""
        transfer.headers()  # raises before anything is begun
        connection = self._take_idle(location.origin(transfer.url))
        if connection is None:
            self._curl.connect(transfer, self._connected)
        else:
            self._ask(connection, transfer)

    def release(self, transfer: Transfer) -> None:
        """Ends what goes on for the transfer, if anything does: closes its connection, for the answer was not read to the end."""
        self._curl.release(transfer)
        connection = self._by_transfer.pop(transfer, None)
        if connection is not None:
            self._close(connection)
        elif self._ended:
            self._ended = [ended for ended in self._ended if ended[0] is not transfer]

    def collect(self) -> list[tuple[Transfer, Rejected | OSError | None]]:
        """The exchanges that have ended since the last call, and why, if not well."""
        ended, self._ended = self._ended, []
        return ended

    # --- connections --------------------------------------------------------------------------------------------------

    def _connected(self, transfer: Transfer, sock: socket.socket) -> None:
        connection = _Connection(location.origin(transfer.url), sock)
        try:
            self._sockets.watch(connection.fd, self._told)
        except OSError as error:  # the limit of watched descriptors
            sock.close()
            self._ended.append((transfer, Rejected(FailureKind.TRANSIENT, error.strerror or "no connection")))
            return
        self._by_fd[connection.fd] = connection
        transfer.connections_new += 1
        self._ask(connection, transfer)

    def _take_idle(self, origin: bytes) -> _Connection | None:
        """The one that was used last: what is not needed grows old."""
        for connection in reversed(self._idle.values()):
            if connection.origin == origin:
                break
        else:
            return None
        del self._idle[connection.fd]
        if time.monotonic() - connection.idle_at_s <= IDLE_CONNECTION_S:
            return connection
        self._close(connection)
        return self._take_idle(origin)

    def _keep(self, connection: _Connection) -> None:
        connection.idle_at_s = time.monotonic()
        connection.is_reused = True
        self._idle[connection.fd] = connection
        if len(self._idle) > self._connections_max:
            _, oldest = self._idle.popitem(last=False)
            self._close(oldest)

    def _close(self, connection: _Connection) -> None:
        self._sockets.unwatch(connection.fd)
        self._idle.pop(connection.fd, None)
        self._by_fd.pop(connection.fd, None)
        connection.transfer = None
        connection.sock.close()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _ask(self, connection: _Connection, transfer: Transfer) -> None:
        connection.transfer = transfer
        connection.answer = Answer()
        self._by_transfer[transfer] = connection
        connection.unsent = _request(transfer)
        connection.sent_at_s = time.monotonic()
        self._send(connection, transfer)
        if connection.unsent and connection.transfer is transfer:
            self._sockets.watch(connection.fd, self._told, select.EPOLLIN | select.EPOLLOUT)

    def _send(self, connection: _Connection, transfer: Transfer) -> None:
        try:
            sent = connection.sock.send(connection.unsent)
        except BlockingIOError:
            return
        except OSError:
            self._broke(connection, transfer, Rejected(FailureKind.TRANSIENT, "the connection broke while sending"))
            return
        connection.unsent = connection.unsent[sent:]

    def _told(self, fd: int, mask: int) -> None:
        connection = self._by_fd.get(fd)
        if connection is None:
            return
        if mask & select.EPOLLOUT and connection.transfer is not None and connection.unsent:
            self._send(connection, connection.transfer)
            if self._by_fd.get(fd) is not connection:
                return
            if not connection.unsent:
                self._sockets.watch(fd, self._told)
        if mask & ~select.EPOLLOUT:
            for _ in range(_RECEIVES_MAX):
                if not self._receive(connection):
                    break

    def _receive(self, connection: _Connection) -> bool:
        """Takes what has come, a buffer full at the most; whether there may be more of it."""
        transfer, answer = connection.transfer, connection.answer
        try:
            received = connection.sock.recv_into(self._buffer, answer.read_bytes(RECEIVE_BYTES) if transfer else 1)
        except BlockingIOError:
            return False
        except OSError:
            received = -1
        if transfer is None:  # it was idle: its store has closed it, or speaks out of turn
            self._close(connection)
            return False
        if received <= 0:
            self._closed(connection, transfer, is_reset=received < 0)
            return False
        if not answer.began:
            transfer.first_byte_s = time.monotonic() - connection.sent_at_s
        try:
            pieces = answer.feed(self._buffer[:received])
            transfer.head = answer.head
            if pieces:
                transfer.receive(pieces)
        except (Rejected, OSError) as reason:
            self._end(connection, transfer, reason)
        else:
            if not answer.ended:
                return received == RECEIVE_BYTES
            self._end(connection, transfer, None)
        return False

    def _closed(self, connection: _Connection, transfer: Transfer, *, is_reset: bool) -> None:
        if is_reset:
            self._broke(connection, transfer, Rejected(FailureKind.TRANSIENT, "the connection broke while receiving"))
            return
        try:
            connection.answer.end()
        except Rejected as early:
            self._broke(connection, transfer, early)
        else:
            self._end(connection, transfer, None)

    def _broke(self, connection: _Connection, transfer: Transfer, reason: Rejected) -> None:
        if connection.is_reused and not connection.answer.began:
            # It was closed while it was idle, as far as anybody can tell: that is no answer to this request.
            del self._by_transfer[transfer]
            self._close(connection)
            self.send(transfer)
        else:
            self._end(connection, transfer, transfer.cut_off(reason))

    def _end(self, connection: _Connection, transfer: Transfer, reason: Rejected | OSError | None) -> None:
        del self._by_transfer[transfer]
        connection.transfer = None
        if reason is None and connection.answer.keeps and not connection.unsent:
            self._keep(connection)
        else:
            self._close(connection)
        self._ended.append((transfer, reason))


def _request(transfer: Transfer) -> bytes:
    url = transfer.url
    authority = url[len(b"http://") : len(location.origin(url))]
    headers = transfer.headers()
    given = {name.lower() for name, _ in headers}
    lines = [b"GET " + location.target(url) + b" HTTP/1.1", b"Host: " + authority.removesuffix(b":80")]
    lines += [name + b": " + value for name, value in _DEFAULT_HEADERS if name.lower() not in given]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"
