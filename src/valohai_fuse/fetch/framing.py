"""Where an HTTP/1.1 answer's head and body begin and end (RFC 9112), while its bytes come in.

Pure. Strict where two readings are possible, for then the next answer on the connection could be mistaken for a part of this
one: such an answer is rejected, or its connection not kept. Lenient only in what every client takes: lines that end without a
carriage return, folded header lines.

Invariants: no byte is handed out that is not of the body; once `ended`, nothing more is handed out. Must not know: sockets,
which of the bytes are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from valohai_fuse.fetch.response import Head, Rejected
from valohai_fuse.ports import FailureKind

HEAD_BYTES_MAX: Final = 64 * 1024
"""Of a head; the large stores stay below 8 KiB."""
_HEAD_PIECE_BYTES: Final = 4096
"""So much is looked through at a time: what is behind the head is not to be copied."""
INTERIM_MAX: Final = 16
"""How many interim answers (1xx) may come before the one that counts."""
_CHUNK_LINE_BYTES_MAX: Final = 16 * 1024
"""Of a chunk's size line, and of all trailers."""
_HEAD_END: Final = re.compile(rb"\n\r?\n")
_FOLD: Final = re.compile(rb"\r?\n[ \t]+")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.(\d) \d{3}(?:[ \r\n]|$)")
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.DOTALL)
_BODILESS: Final = frozenset({101, 204, 304})


class Answer:
    """One answer, fed with what its connection delivers."""

    __slots__ = ("_chunks", "_interim", "_left_bytes", "_raw", "ended", "head", "keeps")

    def __init__(self) -> None:
        self.head: Head | None = None
        """Once it is whole."""
        self.ended = False
        self.keeps = False
        """Whether the connection can be used again after the end."""
        self._raw = b""
        """What has come of a head that is not whole."""
        self._interim = 0
        self._left_bytes: int | None = None
        """Of the body; None: to the end of a chunk without data, or of the connection."""
        self._chunks: _Chunks | None = None

    @property
    def began(self) -> bool:
        """Whether anything of it has come."""
        return bool(self._raw or self._interim) or self.head is not None

    def read_bytes(self, most: int) -> int:
        """How many bytes to read next, `most` at the most: none of the next answer, where that is known."""
        return most if self._left_bytes is None else min(most, self._left_bytes)

    @property
    def plain_bytes(self) -> int:
        """How many bytes come next that are body and nothing else, at the least; who reads them elsewhere says so by `took`."""
        return self._left_bytes if self._left_bytes is not None and self.head is not None and not self.ended else 0

    def took(self, byte_count: int) -> None:
        """So many of `plain_bytes` have come and need not be fed."""
        assert self._left_bytes is not None
        assert byte_count <= self._left_bytes
        self._left_bytes -= byte_count
        self.ended = not self._left_bytes

    def feed(self, data: memoryview) -> list[memoryview]:
        """What of `data`, the next bytes, is body, in pieces. Raises Rejected(PROTOCOL) for what is not HTTP/1.x."""
        if self.head is None:
            data = self._feed_head(data)
            if self.head is None:
                return []
        if self._chunks is not None:
            pieces = self._chunks.feed(data)
            if self._chunks.ended:
                self.ended = True
                self.keeps = self.keeps and not self._chunks.has_more
            return pieces
        if self._left_bytes is not None:
            if len(data) > self._left_bytes:
                self.keeps = False
                data = data[: self._left_bytes]
            self._left_bytes -= len(data)
            self.ended = not self._left_bytes
        return [data] if data else []

    def end(self) -> None:
        """The connection was closed. Raises Rejected(TRANSIENT) unless that is how this answer ends."""
        if self.ended:
            return
        if not self.began:
            raise Rejected(FailureKind.TRANSIENT, "the connection was closed without an answer")
        if self.head is None or self._chunks is not None or self._left_bytes is not None:
            raise Rejected(FailureKind.TRANSIENT, "the body ended early" if self.head else "the answer ended early")
        self.ended = True

    def _feed_head(self, data: memoryview) -> memoryview:
        """Takes heads from the start of `data` up to the one that counts; returns what is behind it."""
        while data:
            known = len(self._raw)
            raw = self._raw + data[:_HEAD_PIECE_BYTES]
            if not b"HTTP/".startswith(raw[:5]):
                raise _garbled("an answer that is not HTTP/1")
            match = _HEAD_END.search(raw, max(0, known - 2))
            if match is None:
                if len(raw) > HEAD_BYTES_MAX:
                    raise _garbled("headers without end")
                self._raw = raw
                data = data[_HEAD_PIECE_BYTES:]
                continue
            self._raw = b""
            data = data[match.end() - known :]
            minor = _STATUS_LINE.match(raw)
            if minor is None or b"\0" in raw[: match.start()]:
                raise _garbled("an answer that is not HTTP/1")
            head = Head(_FOLD.sub(b" ", raw[: match.start()]).split(b"\n"))
            if 100 <= head.status <= 199 and head.status != 101:
                self._interim += 1
                if self._interim > INTERIM_MAX:
                    raise _garbled("interim answers without end")
                continue
            self.head = head
            self._frame(head, is_keeping=minor[1] != b"0")
            break
        return data

    def _frame(self, head: Head, *, is_keeping: bool) -> None:
        connection = {token.strip() for token in head.headers.get("connection", "").lower().split(",")}
        self.keeps = "close" not in connection and (is_keeping or "keep-alive" in connection)
        encoding = head.headers.get("transfer-encoding")
        if head.status in _BODILESS:
            self._left_bytes = 0
            self.keeps = self.keeps and head.status != 101
        elif encoding is not None:
            if encoding.lower() != "chunked":
                raise _garbled("a Transfer-Encoding that nobody asked for")
            self._chunks = _Chunks()
            self.keeps = self.keeps and "content-length" not in head.headers
        elif "content-length" in head.headers:
            self._left_bytes = head.content_length()
            if self._left_bytes is None:
                raise _garbled("a Content-Length that is no length")
        else:
            self.keeps = False
        self.ended = self._left_bytes == 0


class _Chunks:
    """A body in chunks."""

    __slots__ = ("_left_bytes", "_line", "_take_line", "_trailer_bytes", "ended", "has_more")

    def __init__(self) -> None:
        self.ended = False
        self.has_more = False
        """Whether something came behind the end."""
        self._left_bytes = 0
        """Of the chunk's data."""
        self._line = b""
        """What has come of a line that is not whole."""
        self._take_line: Callable[[bytes], None] = self._take_size
        self._trailer_bytes = 0

    def feed(self, data: memoryview) -> list[memoryview]:
        """As `Answer.feed`."""
        pieces: list[memoryview] = []
        while data:
            if self.ended:
                self.has_more = True
                break
            if self._left_bytes:
                piece = data[: self._left_bytes]
                pieces.append(piece)
                self._left_bytes -= len(piece)
                data = data[len(piece) :]
                continue
            known = len(self._line)
            raw = self._line + data[:_CHUNK_LINE_BYTES_MAX]
            at = raw.find(b"\n", known)
            if at < 0:
                if len(raw) >= _CHUNK_LINE_BYTES_MAX:
                    raise _garbled("a line between chunks that has no end")
                self._line = raw
                break
            data = data[at + 1 - known :]
            self._line = b""
            self._take_line(raw[:at].removesuffix(b"\r"))
        return pieces

    def _take_size(self, line: bytes) -> None:
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise _garbled("a chunk without a size")
        self._left_bytes = int(match[1], 16)
        self._take_line = self._take_end if self._left_bytes else self._take_trailer

    def _take_end(self, line: bytes) -> None:
        if line:
            raise _garbled("a chunk that does not end where it says")
        self._take_line = self._take_size

    def _take_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line)
        if self._trailer_bytes > _CHUNK_LINE_BYTES_MAX:
            raise _garbled("trailers without end")
        self.ended = not line


def _garbled(detail: str) -> Rejected:
    return Rejected(FailureKind.PROTOCOL, detail)
