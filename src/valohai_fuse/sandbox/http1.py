"""A small HTTP/1.1 server for loopback that can misbehave on purpose: a thread per connection, raw sockets.

Decides how requests are read and how a `Response` goes onto the wire, including every way for it not to arrive: cut,
reset, stalled, dripped, too long. A standard server refuses to be that wrong. Who answers what is the handler's business;
this module knows nothing of objects, signatures or Valohai.

Concurrency: one accept thread and one thread per connection. `_lock` guards the gauges, the list of exchanges and the set
of connections. Every wait of a connection thread is a poll on its socket, so that a client that leaves, or `stop()`, which
shuts the sockets down, ends the wait at once; `stop()` joins all threads. The port stays reserved by a bound socket that
does not listen, so that a stopped server refuses connections and comes back on the same port.
"""

from __future__ import annotations

import contextlib
import fcntl
import http
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from valohai_fuse.sandbox.content import SLICE_BYTES
from valohai_fuse.sandbox.messages import Ending, Exchange, Request, Response

HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 16 * 1024 * 1024
HANDSHAKE_TIMEOUT_S = 10.0
SMALL_BYTES = 64 * 1024


class ClientGone(Exception):  # noqa: N818 - how a connection thread ends, seen by nobody else
    """The peer hung up, or the server is stopping."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Gauges and totals since the server was made, over stops and starts."""

    requests: int
    sent_bytes: int
    connections: int
    open_connections: int
    open_connections_max: int
    active_requests: int
    active_requests_max: int


Handler = Callable[[Request, Exchange], Response]


class Server:
    """Serves `handle` on 127.0.0.1; start and stop as often as you like, always on the same port. Any thread."""

    def __init__(self, name: str, handle: Handler, tls: ssl.SSLContext | None = None) -> None:
        self.name = name
        self._handle = handle
        self._tls = tls
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._threads: set[threading.Thread] = set()
        self._accepting: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._refusal: threading.Timer | None = None
        self._exchanges: list[Exchange] = []
        self._opened = self._open_max = self._active = self._active_max = 0
        self._reservation = _bound_socket(0)
        self.port: int = self._reservation.getsockname()[1]

    @property
    def origin(self) -> str:
        """scheme://host:port, without a slash behind."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listens. Does nothing when it does already."""
        with self._lock:
            if self._listener is None:
                self._listener = _bound_socket(self.port)
                self._listener.listen(512)
                self._accepting = threading.Thread(
                    target=self._accept, args=(self._listener,), name=f"sandbox-{self.name}-accept", daemon=True
                )
                self._accepting.start()

    def stop(self) -> None:
        """Refuses connections from now on, cuts those that are open, and returns when its threads have ended."""
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            refusal.cancel()
            if refusal is not threading.current_thread():
                refusal.join()
        self._close_listener()
        with self._lock:
            for connection in self._connections.values():
                connection.shut_down()
            threads, self._threads = self._threads, set()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def use_tls(self, context: ssl.SSLContext) -> None:
        """Another certificate, for the connections that are made from now on; those that are open live on."""
        self._tls = context

    def close(self) -> None:
        """Stops for good and gives the port back."""
        self.stop()
        self._reservation.close()

    def refuse_for(self, seconds: float) -> None:
        """New connections are refused for so long; open ones live on. Callable from a handler."""
        self._close_listener()
        if self._refusal is not None:
            self._refusal.cancel()
        self._refusal = threading.Timer(seconds, self.start)
        self._refusal.daemon = True
        self._refusal.start()

    def exchanges(self) -> list[Exchange]:
        """Every request so far, in the order of arrival; those under way are still being filled in."""
        with self._lock:
            return list(self._exchanges)

    def forget_exchanges(self) -> None:
        """Starts the record anew: the next assertion counts from here."""
        with self._lock:
            self._exchanges.clear()

    def statistics(self) -> ServerStatistics:
        """Counts since the last `forget_exchanges`, and gauges."""
        with self._lock:
            return ServerStatistics(
                requests=len(self._exchanges),
                sent_bytes=sum(exchange.sent_bytes for exchange in self._exchanges),
                connections=self._opened,
                open_connections=len(self._connections),
                open_connections_max=self._open_max,
                active_requests=self._active,
                active_requests_max=self._active_max,
            )

    def _close_listener(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
            accepting, self._accepting = self._accepting, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); close alone does not
            if accepting is not None:
                accepting.join()
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._listener is not listener:
                    raw.close()
                    return
                self._opened += 1
                connection = _Connection(raw, self._opened)
                self._connections[connection.id] = connection
                self._open_max = max(self._open_max, len(self._connections))
                thread = threading.Thread(
                    target=self._serve, args=(connection,), name=f"sandbox-{self.name}-{connection.id}", daemon=True
                )
                # Ended ones are dropped here and not by themselves, so that stop() joins each until it is really gone.
                self._threads = {known for known in self._threads if known.is_alive()} | {thread}
                thread.start()

    def _serve(self, connection: _Connection) -> None:
        try:
            if self._tls is not None:
                connection.start_tls(self._tls)
            while (request := connection.read_request()) is not None:
                if not self._answer(connection, request):
                    break
        except (ClientGone, OSError):
            pass  # hanging up is a client's right; what it got stands in the exchange
        finally:
            with self._lock:
                del self._connections[connection.id]
                connection.close()

    def _answer(self, connection: _Connection, request: Request) -> bool:
        """Sends the answer to one request; False when the connection is to be closed."""
        exchange = Exchange(
            server=self.name,
            method=request.method,
            path=request.path,
            range=request.headers.get("range"),
            headers={key: ("present" if key == "authorization" else text) for key, text in request.headers.items()},
            connection_id=connection.id,
            at_s=time.monotonic(),
        )
        with self._lock:
            self._exchanges.append(exchange)
            self._active += 1
            self._active_max = max(self._active_max, self._active)
        try:
            response = self._handle(request, exchange)
            exchange.status = response.status
            keep = connection.send_response(response, exchange, with_body=request.method != "HEAD")
        finally:
            exchange.ended_at_s = time.monotonic()
            with self._lock:
                self._active -= 1
        return keep and request.headers.get("connection", "").lower() != "close"


class _Connection:
    """One accepted socket and its unread bytes. Used by its own thread, except `shut_down`."""

    def __init__(self, raw: socket.socket, connection_id: int) -> None:
        self.id = connection_id
        self._socket: socket.socket = raw
        self._unread = bytearray()
        self._requests = 0
        self._held = b""
        """Head or trailer that goes out with the next bytes."""
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start_tls(self, context: ssl.SSLContext) -> None:
        self._socket.settimeout(HANDSHAKE_TIMEOUT_S)
        self._socket = context.wrap_socket(self._socket, server_side=True, suppress_ragged_eofs=True)
        self._socket.settimeout(None)

    def shut_down(self) -> None:
        """Wakes whatever the thread waits in. The plain method, for SSLSocket's would pull TLS from under the thread."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def pause(self, seconds: float) -> None:
        """Waits so long (math.inf: for ever). Raises ClientGone as soon as nobody is there any more."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        if poll.poll(None if seconds == float("inf") else max(1, round(seconds * 1000))):
            raise ClientGone

    def read_request(self) -> Request | None:
        """The next request; None when the client is done. Raises ClientGone for anything that is no request."""
        head = self._read_head()
        if head is None:
            return None
        lines = head.decode("latin-1").split("\r\n")
        try:
            method, target, _ = lines[0].split(" ")
            headers = {key.strip().lower(): text.strip() for key, text in (line.split(":", 1) for line in lines[1:])}
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise ClientGone from None
        if not 0 <= length <= BODY_BYTES_MAX or "transfer-encoding" in headers:
            raise ClientGone
        while len(self._unread) < length:
            self._receive()
        body = bytes(self._unread[:length])
        del self._unread[:length]
        self._requests += 1
        return Request(method, target, headers, body, self.id, self._requests)

    def _read_head(self) -> bytes | None:
        while (end := self._unread.find(b"\r\n\r\n")) < 0:
            if len(self._unread) > HEAD_BYTES_MAX:
                raise ClientGone
            try:
                self._receive()
            except ClientGone:
                if self._unread:
                    raise
                return None
        head = bytes(self._unread[:end])
        del self._unread[: end + 4]
        return head

    def _receive(self) -> None:
        data = self._socket.recv(64 * 1024)
        if not data:
            raise ClientGone
        self._unread += data

    def send_response(self, response: Response, exchange: Exchange, *, with_body: bool) -> bool:
        """Everything that `response` says; False when the connection must not be used again."""
        if response.delay_s > 0:
            self.pause(response.delay_s)
        if response.silent:
            return self._end(response.ending)
        self._held = _encoded_head(response)
        if with_body and response.status not in {204, 304} and not self._send_body(response, exchange):
            return False
        self._flush()
        return self._end(response.ending)

    def _send_body(self, response: Response, exchange: Exchange) -> bool:
        """The body; False when it was cut and nothing may follow."""
        started_s, sent = time.monotonic(), 0
        for piece in _pieces(response):
            if sent == response.cut_after_bytes and not self._cut(response):
                return False
            if response.piece_pause_s:
                self._flush()
                self.pause(response.piece_pause_s)
            self._send(piece, exchange, chunked=response.chunked)
            sent += len(piece)
            if response.rate_bytes_per_s:
                ahead_s = started_s + sent / response.rate_bytes_per_s - time.monotonic()
                if ahead_s > 0.001:
                    self.pause(ahead_s)
        if sent == response.cut_after_bytes and not self._cut(response):
            return False
        self._held += (b"0\r\n\r\n" if response.chunked else b"") + response.trailing
        return True

    def _send(self, piece: memoryview, exchange: Exchange, *, chunked: bool) -> None:
        # Counted before: the client may look at the record as soon as it has the last byte.
        exchange.sent_bytes += len(piece)
        try:
            if chunked:
                self._held += b"%x\r\n%s\r\n" % (len(piece), bytes(piece))
                self._flush()
            elif len(piece) <= SMALL_BYTES:
                self._held += bytes(piece)  # one packet for a small answer
                self._flush()
            else:
                self._flush()
                self._socket.sendall(piece)
        except OSError:
            exchange.sent_bytes -= len(piece)
            raise

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held:
            self._socket.sendall(held)

    def _cut(self, response: Response) -> bool:
        """What happens in mid-body; True when the rest follows after all."""
        self._flush()
        if response.at_cut is not None:
            response.at_cut()
        if response.resume_after_s is not None:
            self.pause(response.resume_after_s)
            return True
        self._end(response.ending)
        return False

    def _end(self, ending: Ending) -> bool:
        if ending is Ending.STALL:
            self.pause(float("inf"))
        if ending is Ending.RESET:
            self._reset()
        return ending is Ending.KEEP_ALIVE

    def _reset(self) -> None:
        """RST instead of FIN, once the peer's kernel has all that was sent: the cut is where it was asked for."""
        deadline_s = time.monotonic() + 1.0
        while _unsent_bytes(self._socket) and time.monotonic() < deadline_s:
            self.pause(0.001)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _unsent_bytes(connected: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


def _encoded_head(response: Response) -> bytes:
    try:
        reason = http.HTTPStatus(response.status).phrase
    except ValueError:
        reason = "Unknown"
    headers = dict(response.headers)
    if response.chunked:
        headers.pop("Content-Length", None)
        headers["Transfer-Encoding"] = "chunked"
    lines = [f"HTTP/1.1 {response.status} {reason}", *(f"{key}: {text}" for key, text in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _pieces(response: Response) -> Iterator[memoryview]:
    """The body in pieces of which none crosses the cut."""
    limit = response.piece_bytes or SLICE_BYTES
    if response.rate_bytes_per_s:  # some twenty pieces a second make an even flow
        limit = min(limit, max(1024, int(response.rate_bytes_per_s / 20)))
    sent, cut = 0, response.cut_after_bytes or 0
    for piece in response.content.slices(response.start, response.stop):
        at = 0
        while at < len(piece):
            until_cut = cut - sent if sent < cut else limit
            part = piece[at : at + min(limit, until_cut)]
            yield part
            at += len(part)
            sent += len(part)
