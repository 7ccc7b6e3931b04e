"""Brings answers over plain HTTP: its own HTTP/1.1 on sockets, for libcurl hands a body over in pieces of 16 KiB, each an
object and a callback, and a third of a cold stream's processor time in the worker went there (docs/decisions.md).

A body is received straight into its place in memory, where it has one, or else into one buffer that stays in the processor's
cache, and goes on from there. Where several
answers have come, what somebody waits for goes first, then what was asked for first: a stream's next bytes do not share the
processor with those that it needs later.

Connections come from `curl`, which resolves names and races addresses, and are kept by `connections`.

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
from typing import Final

from valohai_fuse.fetch import location
from valohai_fuse.fetch.connections import Connection, Connections
from valohai_fuse.fetch.curl import USER_AGENT, CurlCarrier
from valohai_fuse.fetch.framing import Answer
from valohai_fuse.fetch.response import Rejected
from valohai_fuse.fetch.sockets import Sockets
from valohai_fuse.fetch.transfer import Transfer
from valohai_fuse.fetch.wire import Configure
from valohai_fuse.ports import FailureKind

RECEIVE_BYTES: Final = 256 * 1024
"""At a time and at the most: stays in a processor's own cache until it is at its place."""
_RECEIVES_MAX: Final = 8
"""In one turn of the loop, which then looks what else there is to do."""
SPARES_FROM_BYTES: Final = 32 * 1024 * 1024
"""An object of this size is likely to be read by several requests at once."""
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


class PlainCarrier:
    """See the module's text."""

    def __init__(self, sockets: Sockets, curl: CurlCarrier) -> None:
        self._sockets = sockets
        self._curl = curl
        self._connections = Connections(sockets, self._told)
        self._is_direct = True
        self._buffer = memoryview(mmap.mmap(-1, RECEIVE_BYTES))  # pages of its own: memory only once it is used
        self._by_transfer: dict[Transfer, Connection] = {}
        self._ready: list[Connection] = []
        """Where something has come."""
        self._ended: list[tuple[Transfer, Rejected | OSError | None]] = []

    def configure(self, configure: Configure) -> None:
        """For all requests from now on."""
        self._connections.idle_max = configure.connections
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
        connection = self._connections.take(location.origin(transfer.url))
        if connection is None:
            self._curl.connect(transfer, self._connected)
        else:
            self._ask(connection, transfer)

    def release(self, transfer: Transfer) -> None:
        """Ends what goes on for the transfer, if anything does: closes its connection, for the answer was not read to the end."""
        self._curl.release(transfer)
        connection = self._by_transfer.pop(transfer, None)
        if connection is not None:
            self._connections.close(connection)
        elif self._ended:
            self._ended = [ended for ended in self._ended if ended[0] is not transfer]

    def receive(self) -> None:
        """Takes what has come, after `Sockets.wait`. What is left is told of again."""
        ready, self._ready = self._ready, []
        if len(ready) > 1:
            ready.sort(key=_turn)
        left = _RECEIVES_MAX
        for connection in ready:
            while left and self._connections.get(connection.fd) is connection:
                left -= 1
                if not self._receive(connection):
                    break

    def collect(self) -> list[tuple[Transfer, Rejected | OSError | None]]:
        """The exchanges that have ended since the last call, and why, if not well."""
        ended, self._ended = self._ended, []
        return ended

    # --- requests -----------------------------------------------------------------------------------------------------

    def _connected(self, transfer: Transfer, sock: socket.socket) -> None:
        try:
            connection = self._connections.add(location.origin(transfer.url), sock)
        except OSError as error:
            self._ended.append((transfer, Rejected(FailureKind.TRANSIENT, error.strerror or "no connection")))
        else:
            self._ask(connection, transfer)

    def _ask(self, connection: Connection, transfer: Transfer) -> None:
        connection.transfer = transfer
        connection.answer = Answer()
        self._by_transfer[transfer] = connection
        connection.unsent = _request(transfer)
        connection.sent_at_s = now_s = time.monotonic()
        if not connection.is_counted:
            connection.is_counted = True
            transfer.connections_new += 1
        self._send(connection, transfer)
        if transfer.order.size >= SPARES_FROM_BYTES and connection.transfer is transfer:
            self._connections.open_spares(connection, now_s)  # many system calls: not before the request
        if connection.unsent and connection.transfer is transfer:
            self._sockets.watch(connection.fd, self._told, select.EPOLLIN | select.EPOLLOUT)

    def _send(self, connection: Connection, transfer: Transfer) -> None:
        try:
            sent = connection.sock.send(connection.unsent)
        except BlockingIOError:
            return
        except OSError:
            self._broke(connection, transfer, Rejected(FailureKind.TRANSIENT, "the connection broke while sending"))
            return
        connection.unsent = connection.unsent[sent:]

    def _told(self, fd: int, mask: int) -> None:
        connection = self._connections.get(fd)
        if connection is None:
            return
        if connection.is_connecting:
            self._connections.spare_told(connection)
            return
        if mask & select.EPOLLOUT and connection.transfer is not None and connection.unsent:
            self._send(connection, connection.transfer)
            if self._connections.get(fd) is not connection:
                return
            if not connection.unsent:
                self._sockets.watch(fd, self._told)
        if mask & ~select.EPOLLOUT:
            self._ready.append(connection)

    def _receive(self, connection: Connection) -> bool:
        """Takes what has come, RECEIVE_BYTES at the most; whether there may be more of it."""
        transfer, answer = connection.transfer, connection.answer
        if transfer is None:
            self._hear(connection)
            return False
        place = transfer.room(min(RECEIVE_BYTES, answer.plain_bytes))
        with self._buffer[: answer.read_bytes(RECEIVE_BYTES)] if place is None else place as into:
            try:
                received = connection.sock.recv_into(into)
            except BlockingIOError:
                return False
            except OSError:
                received = -1
            if received <= 0:
                self._closed(connection, transfer, is_reset=received < 0)
                return False
            if not answer.began:
                transfer.first_byte_s = time.monotonic() - connection.sent_at_s
            try:
                if place is not None:
                    answer.took(received)
                    transfer.took(into[:received])
                else:
                    pieces = answer.feed(into[:received])
                    transfer.head = answer.head
                    if pieces:
                        transfer.receive(pieces)
            except (Rejected, OSError) as reason:
                self._end(connection, transfer, reason)
                return False
            may_be_more = received == len(into) and not answer.ended
        if answer.ended:
            self._end(connection, transfer, None)
        return may_be_more

    def _hear(self, connection: Connection) -> None:
        """An idle one: its store has closed it, or speaks out of turn."""
        try:
            connection.sock.recv_into(self._buffer, 1)
        except BlockingIOError:
            return
        except OSError:
            pass
        self._connections.close(connection)

    def _closed(self, connection: Connection, transfer: Transfer, *, is_reset: bool) -> None:
        if is_reset:
            self._broke(connection, transfer, Rejected(FailureKind.TRANSIENT, "the connection broke while receiving"))
            return
        try:
            connection.answer.end()
        except Rejected as early:
            self._broke(connection, transfer, early)
        else:
            self._end(connection, transfer, None)

    def _broke(self, connection: Connection, transfer: Transfer, reason: Rejected) -> None:
        if connection.is_reused and not connection.answer.began:
            # It was closed while it was idle, as far as anybody can tell: that is no answer to this request.
            del self._by_transfer[transfer]
            self._connections.close(connection)
            self.send(transfer)
        else:
            self._end(connection, transfer, transfer.cut_off(reason))

    def _end(self, connection: Connection, transfer: Transfer, reason: Rejected | OSError | None) -> None:
        del self._by_transfer[transfer]
        connection.transfer = None
        if reason is None and connection.answer.keeps and not connection.unsent:
            self._connections.keep(connection)
        else:
            self._connections.close(connection)
        self._ended.append((transfer, reason))


def _turn(connection: Connection) -> tuple[bool, int]:
    transfer = connection.transfer
    return (False, 0) if transfer is None else (not transfer.is_awaited, transfer.order.id)


def _request(transfer: Transfer) -> bytes:
    url = transfer.url
    authority = url[len(b"http://") : len(location.origin(url))]
    headers = transfer.headers()
    given = {name.lower() for name, _ in headers}
    lines = [b"GET " + location.target(url) + b" HTTP/1.1", b"Host: " + authority.removesuffix(b":80")]
    lines += [name + b": " + value for name, value in _DEFAULT_HEADERS if name.lower() not in given]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"
