"""A small HTTP server on loopback whose every answer is the test's: raw bytes, so that any oddity can be told.

Runs in threads of its own; records requests as they came off the wire.
"""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Request:
    """One request; header names in lower case."""

    method: str
    target: bytes
    headers: dict[str, str]
    connection: int


Answerer = Callable[[Request], bytes | None]
"""The raw response; None: close the connection without a word."""


def response(
    status: int, body: bytes | str = b"", *headers: tuple[str, str], length: int | None = None, close: bool = False
) -> bytes:
    """A response with its Content-Length, or with a false one."""
    raw = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers)]
    lines.append(f"Content-Length: {len(raw) if length is None else length}")
    if close or (length is not None and length != len(raw)):
        lines.append("Connection: close")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 64
    scripted: ScriptedHttp


class _Handler(socketserver.StreamRequestHandler):
    timeout = 20

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        connection = server.scripted.connected()
        while line := self._line():
            method, target, _ = line.split(b" ", 2)
            headers: dict[str, str] = {}
            while (field_line := self._line()) and field_line.strip():
                name, _, value = field_line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            self.rfile.read(int(headers.get("content-length", "0")))
            raw = server.scripted.answer(Request(method.decode(), target, headers, connection))
            if raw is None:
                return
            try:
                self.wfile.write(raw)
            except OSError:
                return
            if b"\r\nconnection: close" in raw.partition(b"\r\n\r\n")[0].lower():
                return

    def _line(self) -> bytes:
        try:
            return self.rfile.readline(65536)
        except OSError:
            return b""


@dataclass
class ScriptedHttp:
    """`with ScriptedHttp(answerer) as server:`; `server.url` has no path."""

    answerer: Answerer
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.scripted = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def connected(self) -> int:
        """Counts connections; the new one's number."""
        self.connections += 1
        return self.connections

    def answer(self, request: Request) -> bytes | None:
        """Records and answers."""
        self.requests.append(request)
        return self.answerer(request)
