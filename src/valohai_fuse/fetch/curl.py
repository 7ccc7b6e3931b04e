"""Brings answers by libcurl: TLS, proxies, names, and whatever else a URL can ask for.

libcurl appends header lines and body chunks to the transfer's lists (`list.append` is the callback: no Python frame per
16 KiB). It also makes bare connections for `plain`: resolved, judged and connected as for its own requests.

One thread. Invariants: each exchange ends once, in `collect` or by `release`; a connection is kept after every answer that
was read to its end. Must not know: what is landed, orders.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pycurl

from valohai_fuse import __version__
from valohai_fuse.fetch import location
from valohai_fuse.fetch.response import Rejected
from valohai_fuse.fetch.sockets import Sockets, new_stream
from valohai_fuse.fetch.transfer import Transfer
from valohai_fuse.fetch.wire import Configure
from valohai_fuse.model import peers
from valohai_fuse.ports import FailureKind

USER_AGENT: Final = f"valohai-fuse/{__version__}"
IDLE_CONNECTION_S: Final = 110
"""Below the 118 s of libcurl and the 2-5 minutes of the large stores: a kept connection should still be alive."""
_BUFFER_BYTES: Final = 512 * 1024

_KINDS: Final = {
    pycurl.E_UNSUPPORTED_PROTOCOL: FailureKind.PROTOCOL,  # our own schemes are checked: an answer in HTTP/0.9
    pycurl.E_URL_MALFORMAT: FailureKind.FORBIDDEN,
    pycurl.E_FTP_WEIRD_SERVER_REPLY: FailureKind.PROTOCOL,  # the same number as E_WEIRD_SERVER_REPLY
    pycurl.E_BAD_CONTENT_ENCODING: FailureKind.PROTOCOL,
    100: FailureKind.PROTOCOL,  # CURLE_TOO_LARGE, which pycurl does not name: headers without end
}
_TEXTS: Final = {
    pycurl.E_COULDNT_RESOLVE_PROXY: "the proxy's name cannot be resolved",
    pycurl.E_COULDNT_RESOLVE_HOST: "the host's name cannot be resolved",
    pycurl.E_COULDNT_CONNECT: "cannot connect",
    pycurl.E_OPERATION_TIMEDOUT: "no connection in time",
    pycurl.E_PARTIAL_FILE: "the body ended early",
    pycurl.E_GOT_NOTHING: "the connection was closed without an answer",
    pycurl.E_RECV_ERROR: "the connection broke while receiving",
    pycurl.E_SEND_ERROR: "the connection broke while sending",
    pycurl.E_SSL_CONNECT_ERROR: "the TLS handshake failed",
    pycurl.E_PEER_FAILED_VERIFICATION: "the store's certificate is not trusted",
    pycurl.E_SSL_CACERT_BADFILE: "the file of certificate authorities cannot be read",
}

Connected = Callable[[Transfer, socket.socket], None]
"""What is done with a connection once it is there; the socket does not block, and is the callee's to close."""


class Exchange:
    """One request on a handle of libcurl's, or one connection that it makes."""

    __slots__ = ("connected", "curl", "forbidden_peer", "single_use", "transfer")

    def __init__(self, transfer: Transfer, curl: pycurl.Curl, connected: Connected | None) -> None:
        self.transfer = transfer
        self.curl = curl
        self.connected = connected
        self.single_use = connected is not None
        """Whether the handle cannot be used for another request."""
        self.forbidden_peer = False
        """Whether the host turned out to be at an address that must not be asked."""

    def open_socket(self, purpose: int, address: Any) -> socket.socket | int:
        """libcurl has resolved the host (or the proxy's) and wants to connect to this address of it."""
        if purpose == pycurl.SOCKTYPE_IPCXN and peers.is_forbidden(str(address.addr[0])):
            self.forbidden_peer = True
            return pycurl.SOCKET_BAD
        self.transfer.is_connecting = True
        return new_stream(address.family, address.socktype, address.protocol)

    def broken(self, code: int, message: str) -> Rejected:
        """What it means that libcurl gave up with `code`."""
        proxy_status = self.curl.getinfo(pycurl.HTTP_CONNECTCODE)
        if proxy_status >= 300:
            self.transfer.head_lines.clear()  # the proxy's words, not the store's
            return Rejected(FailureKind.TRANSIENT, f"the proxy answered HTTP {proxy_status}")
        if self.forbidden_peer:
            return self.transfer.cut_off(Rejected(FailureKind.FORBIDDEN, location.FORBIDDEN_PEER))
        words = _TEXTS.get(code, f"curl error {code}")
        if code == pycurl.E_PEER_FAILED_VERIFICATION and message:
            words += f" ({message[:120]})"  # OpenSSL's reason; holds no URL
        return self.transfer.cut_off(Rejected(_KINDS.get(code, FailureKind.TRANSIENT), words))


class CurlCarrier:
    """See the module's text."""

    def __init__(self, sockets: Sockets) -> None:
        self.due_at_s: float | None = None
        """When `tick` is to be called at the latest (`time.monotonic`)."""
        self._sockets = sockets
        self._configure = Configure(connections=16, connect_timeout_s=10, stall_timeout_s=30, ca_file=None)
        self._ca_path: str | None = None
        self._idle_curls: list[pycurl.Curl] = []
        self._by_curl: dict[pycurl.Curl, Exchange] = {}
        self._by_transfer: dict[Transfer, Exchange] = {}
        self._multi: Any = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)

    def configure(self, configure: Configure) -> None:
        """For all requests from now on. Raises OSError for a file of authorities that cannot be read."""
        self._configure = configure
        self._ca_path = _merged_ca_path(configure.ca_file, configure.extra_ca_file)
        self._multi.setopt(pycurl.M_MAXCONNECTS, configure.connections)

    def send(self, transfer: Transfer) -> None:
        """Asks for what the transfer wants. Raises Rejected, with nothing begun."""
        headers = [name + b": " + value if value else name + b";" for name, value in transfer.headers()]
        exchange = Exchange(transfer, self._new_curl(), None)
        curl = exchange.curl
        curl.setopt(pycurl.URL, transfer.url)
        if not transfer.url.isascii():
            # libcurl percent-encodes bytes beyond ASCII in a URL's path, so such a target is given apart from the URL, which
            # cannot be taken back.
            exchange.single_use = True
            curl.setopt(pycurl.REQUEST_TARGET, location.target(transfer.url))
        curl.setopt(pycurl.HTTPHEADER, headers)
        curl.setopt(pycurl.HEADERFUNCTION, transfer.head_lines.append)
        curl.setopt(pycurl.WRITEFUNCTION, transfer.incoming.append)
        self._add(exchange)

    def connect(self, transfer: Transfer, connected: Connected) -> None:
        """Makes a connection to the host of the transfer's URL and hands it over; `collect` tells of a failure."""
        exchange = Exchange(transfer, self._set_up(pycurl.Curl()), connected)
        exchange.curl.setopt(pycurl.URL, location.origin(transfer.url))
        exchange.curl.setopt(pycurl.CONNECT_ONLY, 1)
        self._add(exchange)

    def release(self, transfer: Transfer) -> None:
        """Ends what goes on for the transfer, if anything does; a connection whose answer was not read to its end is closed."""
        exchange = self._by_transfer.pop(transfer, None)
        if exchange is None:
            return
        del self._by_curl[exchange.curl]
        self._multi.remove_handle(exchange.curl)
        if exchange.single_use:
            exchange.curl.close()
        else:
            self._idle_curls.append(exchange.curl)

    def account(self, transfer: Transfer) -> None:
        """Writes down in the transfer what its answer took."""
        exchange = self._by_transfer.get(transfer)
        if exchange is not None:
            curl = exchange.curl
            transfer.connections_new += curl.getinfo(pycurl.NUM_CONNECTS)
            taken_s = curl.getinfo(pycurl.STARTTRANSFER_TIME) - curl.getinfo(pycurl.PRETRANSFER_TIME)
            transfer.first_byte_s = max(0.0, float(taken_s))

    def tick(self, now_s: float) -> None:
        """Once `due_at_s` has come: libcurl's own deadlines."""
        if self.due_at_s is not None and now_s >= self.due_at_s:
            self.due_at_s = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)

    def collect(self) -> Iterator[tuple[Transfer, Rejected | None]]:
        """The exchanges that have ended since the last call, and why, if not well; each is to be released."""
        left = 1
        while left:
            left, succeeded, broken = self._multi.info_read()
            for curl in succeeded:
                exchange = self._by_curl[curl]
                if exchange.connected is None:
                    yield exchange.transfer, None
                elif (rejected := self._hand_over(exchange, exchange.connected)) is not None:
                    yield exchange.transfer, rejected
            for curl, code, message in broken:
                exchange = self._by_curl[curl]
                yield exchange.transfer, exchange.broken(code, message)

    def _hand_over(self, exchange: Exchange, connected: Connected) -> Rejected | None:
        try:
            own = socket.socket(fileno=os.dup(exchange.curl.getinfo(pycurl.ACTIVESOCKET)))  # libcurl closes its own
        except OSError as error:
            return Rejected(FailureKind.TRANSIENT, error.strerror or "the connection is gone")
        own.setblocking(False)
        self.release(exchange.transfer)
        connected(exchange.transfer, own)
        return None

    def _add(self, exchange: Exchange) -> None:
        exchange.curl.setopt(pycurl.OPENSOCKETFUNCTION, exchange.open_socket)
        self._by_curl[exchange.curl] = exchange
        self._by_transfer[exchange.transfer] = exchange
        self._multi.add_handle(exchange.curl)

    def _new_curl(self) -> pycurl.Curl:
        return self._idle_curls.pop() if self._idle_curls else self._set_up(pycurl.Curl())

    def _set_up(self, curl: pycurl.Curl) -> pycurl.Curl:
        """Sets everything that is the same for all requests."""
        for option, value in (
            (pycurl.HTTPGET, 1),
            (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1),
            (pycurl.HTTP09_ALLOWED, 0),
            (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
            (pycurl.FOLLOWLOCATION, 0),
            (pycurl.PATH_AS_IS, 1),
            (pycurl.HTTP_CONTENT_DECODING, 0),
            (pycurl.NOSIGNAL, 1),
            (pycurl.TCP_NODELAY, 1),
            (pycurl.TCP_KEEPALIVE, 1),
            (pycurl.BUFFERSIZE, _BUFFER_BYTES),
            (pycurl.MAXAGE_CONN, IDLE_CONNECTION_S),
            (pycurl.CONNECTTIMEOUT_MS, max(1, round(self._configure.connect_timeout_s * 1000))),
            (pycurl.USERAGENT, USER_AGENT),
        ):
            curl.setopt(option, value)
        if self._ca_path is not None:
            curl.setopt(pycurl.CAINFO, self._ca_path)
        return curl

    def _watch(self, what: int, fd: int, _multi: object, _data: object) -> None:
        """libcurl says what to wait for on its socket `fd`."""
        if what == pycurl.POLL_REMOVE:
            self._sockets.unwatch(fd)
            return
        mask = (select.EPOLLIN if what & pycurl.POLL_IN else 0) | (select.EPOLLOUT if what & pycurl.POLL_OUT else 0)
        self._sockets.watch(fd, self._told, mask)

    def _told(self, fd: int, mask: int) -> None:
        self._multi.socket_action(fd, _curl_mask(mask))

    def _set_timer(self, timeout_ms: int) -> None:
        self.due_at_s = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000


def _curl_mask(mask: int) -> int:
    result = 0
    if mask & (select.EPOLLIN | select.EPOLLHUP):
        result |= pycurl.CSELECT_IN
    if mask & select.EPOLLOUT:
        result |= pycurl.CSELECT_OUT
    if mask & select.EPOLLERR:
        result |= pycurl.CSELECT_ERR
    return result


def _merged_ca_path(ca_file: str | None, extra_ca_file: str | None) -> str | None:
    """One file with the authorities of both. A path rather than a blob: libcurl keeps the parsed store of a *file* for all
    its connections (20 ms of CPU each otherwise). The memory file is this process's own and goes with it."""
    if extra_ca_file is None:
        return ca_file
    merged = b""
    for path in (ca_file, extra_ca_file):
        if path is not None:
            with open(path, "rb") as file:
                merged += file.read() + b"\n"
    descriptor = os.memfd_create("ca-bundle")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(merged)
    return f"/proc/self/fd/{descriptor}"
