"""How large an object is, by one GET of its first byte.

Never HEAD: the signature of a signed URL covers GET only. Decides what each answer says of the size, in the same kinds of
failure as fetching. Invariants: http and https only, also after redirects; a signed URL goes out byte for byte as it
came; the lease's headers go to the host that they were given for and to no other; at most 4 KiB of any body is read.
Decides no retry.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Final, Self
from urllib.parse import urljoin

import httpx
import trio

from valohai_fuse.model import urls
from valohai_fuse.model.retry import parse_http_date, parse_retry_after
from valohai_fuse.ports import Clock, FailureKind, FetchFailed, Lease
from valohai_fuse.sources import http

PROBES_MAX: Final = 16
REDIRECTS_MAX: Final = 5
PROBE_MAX_S: Final = 60.0
_BODY_BYTES: Final = 4096

_CONTENT_RANGE = re.compile(r"bytes 0-0/(\d{1,19})", re.ASCII | re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,19})", re.ASCII | re.IGNORECASE)
_ACTUAL_SIZE = re.compile(rb"<ActualObjectSize>0</ActualObjectSize>")
_ERROR_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_ORIGIN = re.compile(r"[A-Za-z]+://[^/?#]+")
_NOT_VISIBLE = re.compile(rb"[^\x21-\x7e]")
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_KINDS: Final = {
    400: FailureKind.REFUSED,
    401: FailureKind.REFUSED,
    403: FailureKind.REFUSED,
    404: FailureKind.MISSING,
    410: FailureKind.MISSING,
    412: FailureKind.CHANGED,
    408: FailureKind.TRANSIENT,
    429: FailureKind.THROTTLED,
    503: FailureKind.THROTTLED,
}


class HttpSizeProbe:
    """`ports.SizeProbe` over httpx, on trio; at most PROBES_MAX requests at a time."""

    def __init__(
        self,
        *,
        clock: Clock,
        ca_file: str | None = None,
        connect_timeout_s: float = 10.0,
        answer_timeout_s: float = 30.0,
    ) -> None:
        self.server_date_s: float | None = None
        """What the latest answer said of the time, by its store's clock (epoch seconds)."""
        self._clock = clock
        self._limiter = trio.CapacityLimiter(PROBES_MAX)
        self._client = http.client(
            ca_file=ca_file, connect_timeout_s=connect_timeout_s, answer_timeout_s=answer_timeout_s
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        with trio.CancelScope(shield=True):
            await self._client.aclose()

    async def size(self, lease: Lease) -> int:
        """Total bytes of the object. Raises FetchFailed."""
        url = lease.url
        async with self._limiter:
            with trio.move_on_after(PROBE_MAX_S):
                for _ in range(REDIRECTS_MAX + 1):
                    headers = lease.headers if _origin(url) == _origin(lease.url) else ()
                    answer = await self._ask(url, headers)
                    if isinstance(answer, int):
                        return answer
                    url = answer
                raise FetchFailed(
                    FailureKind.PROTOCOL, f"{urls.redact(lease.url)}: more than {REDIRECTS_MAX} redirects"
                )
        raise FetchFailed(FailureKind.TRANSIENT, f"{urls.redact(url)}: no size within {PROBE_MAX_S:.0f} s")

    async def _ask(self, url: str, headers: tuple[tuple[str, str], ...]) -> int | str:
        """The size, or where the answer redirects to."""
        reason = urls.unsupported_reason(url)
        if reason is not None:
            raise FetchFailed(FailureKind.FORBIDDEN, f"{urls.redact(url)}: {reason}")
        ranged = [*headers, ("Range", "bytes=0-0"), ("Accept-Encoding", "identity")]
        try:
            async with self._client.stream(
                "GET",
                f"{_origin(url)}/",
                headers=ranged,
                extensions={"target": _target(url), "trace": http.refuse_forbidden_peers},
            ) as response:
                return await self._size_in(response, url)
        except http.ForbiddenPeerError as error:
            raise FetchFailed(FailureKind.FORBIDDEN, f"{urls.redact(url)}: {error}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            odd = isinstance(error, httpx.LocalProtocolError | httpx.InvalidURL)
            kind = FailureKind.PROTOCOL if odd else FailureKind.TRANSIENT
            raise FetchFailed(kind, f"{urls.redact(url)}: {http.describe(error)}") from None

    async def _size_in(self, response: httpx.Response, url: str) -> int | str:
        status, headers = response.status_code, response.headers
        self.server_date_s = parse_http_date(headers.get("date"))
        if status == 200:
            return _size_of_whole(
                response, url
            )  # leaving without its body closes the connection: the store ignores ranges
        body = await http.read_beginning(response, _BODY_BYTES)
        if status == 206:
            match = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
            if match is None or int(match[1]) == 0:
                raise _failed(response, url, FailureKind.PROTOCOL, "Content-Range is not that of the first byte")
            return int(match[1])
        if status == 416:
            match = _UNSATISFIED.fullmatch(headers.get("content-range", "").strip())
            if (match is not None and int(match[1]) == 0) or (match is None and _ACTUAL_SIZE.search(body)):
                return 0
            raise _failed(response, url, FailureKind.PROTOCOL, "refuses the first byte of an object that is not empty")
        if status in _REDIRECTS and headers.get("location"):
            return _followed(url, headers["location"])
        kind = _KINDS.get(status, FailureKind.TRANSIENT if status >= 500 else FailureKind.PROTOCOL)
        code = _ERROR_CODE.search(body)
        date_s = parse_http_date(headers.get("date"))
        raise FetchFailed(
            kind,
            f"{urls.redact(url)}: HTTP {status}" + (f" {code[1].decode()}" if code else ""),
            status=status,
            retry_after_s=parse_retry_after(headers.get("retry-after"), self._clock() if date_s is None else date_s),
            server_date_s=date_s,
        )


def _size_of_whole(response: httpx.Response, url: str) -> int:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    length = response.headers.get("content-length", "").strip()
    if encoding not in {"", "identity"}:
        raise _failed(response, url, FailureKind.PROTOCOL, "the body is encoded, its length is not the object's")
    if _is_page(response.headers):
        raise _failed(response, url, FailureKind.PROTOCOL, "a web page instead of the object")
    if not re.fullmatch(r"\d{1,19}", length, re.ASCII):
        raise _failed(response, url, FailureKind.PROTOCOL, "no Content-Length and no Content-Range")
    return int(length)


def _is_page(headers: httpx.Headers) -> bool:
    """Whether a 200 looks like the log-in or error page of something in between: nothing here would ever contradict the size of
    it, and its text would be read as the file's content. An object that is a page has an ETag or a Last-Modified."""
    page = headers.get("content-type", "").strip().lower().startswith(("text/html", "application/xhtml"))
    return page and "etag" not in headers and "last-modified" not in headers


def _failed(response: httpx.Response, url: str, kind: FailureKind, what: str) -> FetchFailed:
    date_s = parse_http_date(response.headers.get("date"))
    detail = f"{urls.redact(url)}: HTTP {response.status_code}, {what}"
    return FetchFailed(kind, detail, status=response.status_code, server_date_s=date_s)


def _followed(url: str, location: str) -> str:
    """An absolute target as it came; a relative one resolved. What is no http(s) URL is refused when it is asked."""
    if urls.scheme(location):
        return location
    try:
        return urljoin(url, location)
    except ValueError:
        return location


def _origin(url: str) -> str:
    match = _ORIGIN.match(url)
    return match[0] if match else ""


def _target(url: str) -> bytes:
    """Path and query exactly as they came, which httpx would normalise and so break signatures; octets that no request
    line can hold are percent-encoded."""
    rest = url[len(_origin(url)) :].partition("#")[0]
    rest = rest if rest.startswith("/") else f"/{rest}"
    return _NOT_VISIBLE.sub(lambda match: b"%%%02X" % match[0][0], rest.encode())
