"""Decides what a store's answer means, before a single byte of it is landed.

Pure: status line and headers in, a `Body` (which part of the body is ours) or a `Rejected` out. The table of kinds is the one
of `ports.FailureKind`. Nothing here must quote a URL: a `detail` goes to logs.

Invariants: whatever passes `accept` has the right total size, the expected ETag, no encoding, and says at which offset its
body begins; a stale, foreign or garbled answer can therefore never reach a segment file.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from typing import Final

from valohai_fuse.fetch.wire import Order
from valohai_fuse.ports import FailureKind

UNSIZED_OBJECT_BYTES_MAX: Final = 64 * 1024 * 1024
"""A store that ignores ranges *and* gives no length must be read to the end of the object before its size is known to be
right. Beyond this, that would be a download of the object per segment: refused instead."""

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.IGNORECASE | re.ASCII)
"""Bounded, for Python refuses to read numbers of thousands of digits, and no object has them."""
_ERROR_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9._-]{1,64})</Code>")
_HTTP_DATE: Final = re.compile(r"[A-Z][a-z]{2}, (\d{2}) ([A-Z][a-z]{2}) (\d{4}) (\d{2}):(\d{2}):(\d{2}) GMT")
_MONTHS: Final = {
    name: number
    for number, name in enumerate(
        ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), start=1
    )
}


class Rejected(Exception):  # noqa: N818 - a message to the pool, like ports.FetchFailed
    """This answer, or its body so far, ends the order."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class Head:
    """Status and headers of the last answer on a connection; names in lower case, of repeated headers the last one."""

    __slots__ = ("headers", "status")

    def __init__(self, lines: Iterable[bytes]) -> None:
        """`lines` with or without their ends; interim answers (1xx, a proxy's CONNECT) come before the one that counts."""
        self.status = 0
        self.headers: dict[str, str] = {}
        for line in lines:
            if line.startswith(b"HTTP/"):
                parts = line.split(None, 2)
                self.status = int(parts[1]) if len(parts) > 1 and len(parts[1]) == 3 and parts[1].isdigit() else 0
                self.headers = {}
                continue
            name, colon, value = line.partition(b":")
            if colon:
                key, content = name.strip().lower().decode("latin-1"), value.strip().decode("latin-1")
                if key == "content-length" and self.headers.get(key, content) != content:
                    content = ""  # two lengths are none
                self.headers[key] = content

    @property
    def version(self) -> str:
        """The ETag exactly as sent; "" when there is none."""
        return self.headers.get("etag", "")

    @property
    def date_s(self) -> float | None:
        """The Date header as epoch seconds."""
        return parse_http_date_s(self.headers.get("date", ""))

    def retry_after_s(self, now_s: float) -> float | None:
        """Retry-After in either of its forms; a date is counted from the store's own Date, else from `now_s`."""
        text = self.headers.get("retry-after", "")
        if text.isascii() and text.isdigit() and len(text) < 10:
            return float(text)
        until_s = parse_http_date_s(text)
        if until_s is None:
            return None
        from_s = self.date_s
        return max(0.0, until_s - (now_s if from_s is None else from_s))

    def content_length(self) -> int | None:
        """Content-Length, if it is there and counts (it does not with a Transfer-Encoding)."""
        text = self.headers.get("content-length", "")
        if "transfer-encoding" in self.headers or not (text.isascii() and text.isdigit() and len(text) < 20):
            return None
        return int(text)


class Body:
    """Which bytes of a response's body are the order's: `skip_bytes` to pass over, then the extent.

    `hold`: nothing may be landed before the body has ended with exactly `total_bytes` (an answer without a length).
    """

    __slots__ = ("hold", "skip_bytes", "total_bytes", "version")

    def __init__(self, *, version: str, skip_bytes: int, total_bytes: int, hold: bool) -> None:
        self.version = version
        self.skip_bytes = skip_bytes
        self.total_bytes = total_bytes
        """Bytes that the whole body has, ours and others'."""
        self.hold = hold


def accept(order: Order, head: Head) -> Body:
    """What to land of this answer. Raises Rejected for everything that is not this object's bytes, plain and whole."""
    if head.status not in {200, 206}:
        raise Rejected(status_kind(head.status), f"HTTP {head.status}")
    encoding = head.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", ""}:
        raise Rejected(FailureKind.PROTOCOL, "the body is encoded")
    if head.headers.get("content-type", "").lower().startswith("multipart/byteranges"):
        raise Rejected(FailureKind.PROTOCOL, "a multipart answer to a single range")
    body = _ranged(order, head) if head.status == 206 else _whole(order, head)
    if order.expect_version is not None and order.expect_version != body.version:
        raise Rejected(FailureKind.CHANGED, "another ETag than before")
    return body


def _ranged(order: Order, head: Head) -> Body:
    match = _CONTENT_RANGE.fullmatch(head.headers.get("content-range", ""))
    if match is None:
        raise Rejected(FailureKind.PROTOCOL, "206 without a usable Content-Range")
    if match[3] == "*":
        raise Rejected(FailureKind.PROTOCOL, "Content-Range without the object's size")
    if int(match[3]) != order.size:
        raise Rejected(FailureKind.CHANGED, f"the object has {int(match[3])} bytes, not {order.size}")
    if (int(match[1]), int(match[2]) + 1) != (order.start, order.stop):
        raise Rejected(FailureKind.PROTOCOL, "the answer is for another range")
    length = head.content_length()
    if length is not None and length != order.stop - order.start:
        raise Rejected(FailureKind.PROTOCOL, "Content-Length and Content-Range disagree")
    return Body(version=head.version, skip_bytes=0, total_bytes=order.stop - order.start, hold=False)


def _whole(order: Order, head: Head) -> Body:
    length = head.content_length()
    if length is not None and length != order.size:
        raise Rejected(FailureKind.CHANGED, f"the object has {length} bytes, not {order.size}")
    if length is None and order.size > UNSIZED_OBJECT_BYTES_MAX:
        raise Rejected(FailureKind.PROTOCOL, "the store ignores ranges and gives no length")
    return Body(version=head.version, skip_bytes=order.start, total_bytes=order.size, hold=length is None)


def status_kind(status: int) -> FailureKind:
    """What a status other than 200 and 206 means for an order."""
    match status:
        case 400 | 401 | 403:
            return FailureKind.REFUSED
        case 404 | 410:
            return FailureKind.MISSING
        case 412 | 416:
            return FailureKind.CHANGED
        case 429 | 503:
            return FailureKind.THROTTLED
        case 408 | 425:
            return FailureKind.TRANSIENT
    return FailureKind.TRANSIENT if 500 <= status <= 599 else FailureKind.PROTOCOL


def error_code(body: bytes) -> str | None:
    """The <Code> of an error body as S3, GCS and Azure write it; nothing else of a body is fit for a log."""
    match = _ERROR_CODE.search(body)
    return match[1].decode("ascii") if match else None


def parse_http_date_s(text: str) -> float | None:
    """`Sun, 06 Nov 1994 08:49:37 GMT` -> epoch seconds; None for anything else. (`strptime` depends on the locale.)"""
    match = _HTTP_DATE.fullmatch(text)
    if match is None or match[2] not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(match[i]) for i in (1, 3, 4, 5, 6))
    try:
        moment = dt.datetime(year, _MONTHS[match[2]], day, hour, minute, min(second, 59), tzinfo=dt.UTC)
    except ValueError:
        return None
    return moment.timestamp()
