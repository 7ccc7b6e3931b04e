"""A client without manners: one request on a raw socket, and everything that came back, however it ended.

A real client hides what tests of a server must see: where the bytes stopped, and whether by FIN, RST or silence.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

HeaderMap = dict[str, str]


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What came back. `body` is as on the wire: chunks are not decoded, encodings neither."""

    status: int
    """0 when not even a head came."""
    headers: HeaderMap = field(repr=False)
    """Lower-case names."""
    body: bytes = field(repr=False)
    ended: Literal["complete", "closed", "reset", "silent"]
    """By Content-Length; by FIN; by RST; by nothing more coming."""


def raw_request(
    url: str,
    headers: HeaderMap | None = None,
    *,
    method: str = "GET",
    silence_s: float = 10.0,
    until_end: bool = False,
) -> RawAnswer:
    """Sends the URL's path and query byte for byte. `until_end` reads on behind Content-Length, up to FIN or silence.

    `silence_s` without a byte ends it as "silent"; short only where silence is what is expected.
    """
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": parts.netloc, "Content-Length": "0"} if method == "POST" else {"Host": parts.netloc}
    lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in (fields | (headers or {})).items()), "", ""]
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=5) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        connection.settimeout(silence_s)
        received = bytearray()
        ended: Literal["complete", "closed", "reset", "silent"] = "closed"
        while until_end or not _complete(received, method):
            try:
                data = connection.recv(1 << 20)
            except TimeoutError:
                ended = "silent"
                break
            except ConnectionResetError:
                ended = "reset"
                break
            if not data:
                break
            received += data
        else:
            ended = "complete"
    return _parsed(bytes(received), ended)


def ranged_get(
    url: str, start: int, stop: int, headers: HeaderMap | None = None, *, silence_s: float = 10.0
) -> RawAnswer:
    """GET of the bytes [start, stop)."""
    return raw_request(url, {"Range": f"bytes={start}-{stop - 1}", **(headers or {})}, silence_s=silence_s)


def _complete(received: bytes | bytearray, method: str) -> bool:
    answer = _parsed(bytes(received), "closed")
    if not answer.status:
        return False
    if answer.status in {204, 304} or method == "HEAD":
        return True
    length = answer.headers.get("content-length")
    return length is not None and len(answer.body) >= int(length)


def _parsed(received: bytes, ended: Literal["complete", "closed", "reset", "silent"]) -> RawAnswer:
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return RawAnswer(0, {}, b"", ended)
    lines = head.decode("latin-1").split("\r\n")
    headers = {key.lower(): text.strip() for key, text in (line.split(":", 1) for line in lines[1:])}
    return RawAnswer(int(lines[0].split(" ")[1]), headers, body, ended)
