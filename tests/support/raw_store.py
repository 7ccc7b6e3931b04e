"""A store that says exactly what a test wants, byte by byte: for misbehaviour that a proper HTTP server cannot be made to show.

Runs on trio in the test's own loop, on loopback. Each request takes the next of `answers`; when there is none, the object's
bytes are served as they should be. An answer is a list of pieces: bytes are sent, a number is a pause in seconds, an event is
waited for, `RESET` breaks the connection, `CLOSE` ends it, `HANG` keeps it open and silent.
"""

from __future__ import annotations

import contextlib
import enum
import re
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
import trio.abc

LOOPBACK_PEM = Path(__file__).with_name("loopback.pem")
"""A self-signed certificate for 127.0.0.1 and its key, for tests and nothing else; runs until 2126."""
ETAG = '"v1"'
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


class End(enum.Enum):
    """How a connection is left."""

    RESET = "reset"
    CLOSE = "close"
    HANG = "hang"


Piece = bytes | float | trio.Event | End
Answer = Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Request:
    """What came in, as it came."""

    head: bytes
    connection: int
    """The how-manieth connection since the store was opened, from 0."""

    @property
    def target(self) -> bytes:
        """Path and query of the request line, untouched."""
        return self.head.split(b" ", 2)[1]

    @property
    def method(self) -> bytes:
        """The request line's first word."""
        return self.head.split(b" ", 1)[0]

    def header(self, name: str) -> str | None:
        """The value of a header, None if it was not sent."""
        match = re.search(rb"(?im)^" + re.escape(name.encode()) + rb":[ \t]*(.*?)[ \t]*\r$", self.head)
        return match[1].decode("latin-1") if match else None

    @property
    def extent(self) -> tuple[int, int]:
        """The range asked for, half-open."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.header("Range") or "")
        assert match is not None, self.head
        return int(match[1]), int(match[2]) + 1


class RawStore:
    """See the module's text; open one with `open_store`."""

    def __init__(self, content: bytes, url: str) -> None:
        self.content = content
        self.url = url
        """scheme://host:port, without a path."""
        self.answers: deque[Answer | Callable[[Request], Answer]] = deque()
        self.hanging: set[bytes] = set()
        """Paths that are never answered, whatever `answers` holds."""
        self.requests: list[Request] = []
        self.connections = 0
        self.open_connections = 0
        self.resumed_connections = 0
        """Those over TLS that took up the session of an earlier one."""
        self.changed = trio.Event()
        """Set and replaced whenever a request arrives, or a connection begins or ends."""

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; looked at whenever something happens here."""
        while not condition():
            await self.changed.wait()

    def ordinary(self, request: Request) -> bytes:
        """What a good store answers."""
        start, stop = request.extent
        return partial(self.content[start:stop], start, len(self.content))

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection, request after request."""
        connection = self.connections
        self.connections += 1
        self.open_connections += 1
        self._announce()
        try:
            await self._converse(stream, connection)
        except trio.BrokenResourceError:
            pass
        finally:
            self.open_connections -= 1
            self._announce()
            await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.abc.Stream, connection: int) -> None:
        buffer = b""
        if isinstance(stream, trio.SSLStream):
            await stream.do_handshake()
            self.resumed_connections += bool(stream.session_reused)
        while True:
            while b"\r\n\r\n" not in buffer:
                data = await stream.receive_some(65536)
                if not data:
                    return
                buffer += data
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            request = Request(head + b"\r\n", connection)
            self.requests.append(request)
            self._announce()
            scripted: Answer | Callable[[Request], Answer] = [End.HANG]
            if request.target.partition(b"?")[0] not in self.hanging:
                scripted = self.answers.popleft() if self.answers else [self.ordinary(request)]
            if not await self._send(stream, scripted(request) if callable(scripted) else scripted):
                return

    async def _send(self, stream: trio.abc.Stream, answer: Answer) -> bool:
        """False: the connection is to be left."""
        for piece in answer:
            if isinstance(piece, bytes):
                await stream.send_all(piece)
            elif isinstance(piece, trio.Event):
                await piece.wait()
            elif piece is End.HANG:
                while await stream.receive_some(65536):
                    pass
                return False
            elif piece is End.RESET:
                assert isinstance(stream, trio.SocketStream)
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            elif isinstance(piece, End):
                return False
            else:
                await trio.sleep(piece)
        return True

    def _announce(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@contextlib.asynccontextmanager
async def open_store(content: bytes, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[RawStore]:
    """A store on a free port of loopback for the time of the block."""
    host = "127.0.0.1"
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host=host)
        scheme = "http" if tls is None else "https"
        store = RawStore(content, f"{scheme}://{host}:{listener.socket.getsockname()[1]}")
        listeners = [listener if tls is None else trio.SSLListener(listener, tls, https_compatible=True)]
        nursery.start_soon(trio.serve_listeners, store.serve, listeners)
        yield store
        nursery.cancel_scope.cancel()


def loopback_tls(version: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> ssl.SSLContext:
    """For `open_store(tls=...)`; `version` is the highest that is spoken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    context.load_cert_chain(LOOPBACK_PEM)
    return context


def head(status: int, *headers: tuple[str, str], reason: str = "Because") -> bytes:
    """Status line and headers, with the blank line."""
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def partial(
    body: bytes,
    start: int,
    total: int | str,
    *more: tuple[str, str],
    etag: str | None = ETAG,
    length: int | None = None,
) -> bytes:
    """A 206 with its headers; `length`: another Content-Length than the body's, `etag` None: without."""
    etags = () if etag is None else (("ETag", etag),)
    return (
        head(
            206,
            ("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}"),
            ("Content-Length", str(len(body) if length is None else length)),
            ("Date", DATE),
            *etags,
            *more,
        )
        + body
    )


def plain(status: int, body: bytes, *more: tuple[str, str], length: int | None = None) -> bytes:
    """Any status with a body and its length."""
    return head(status, ("Content-Length", str(len(body) if length is None else length)), ("Date", DATE), *more) + body


def chunked(status: int, body: bytes, *more: tuple[str, str]) -> bytes:
    """The same without a length."""
    return (
        head(status, ("Transfer-Encoding", "chunked"), *more) + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    )
