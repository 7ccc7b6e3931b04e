"""What the httpx sources share: a client that is safe to give secrets to, and failures without secrets.

Decides four things. (1) TLS is verified against the system's authorities, plus a file of the user's. (2) httpx loses pool
slots when a request is cancelled while it connects, so its pool is left unbounded and callers bound themselves with a
CapacityLimiter. (3) httpx logs whole URLs at INFO and httpcore headers at DEBUG: both loggers are held at WARNING, whatever the
root logger says. (4) Nothing is sent to the machine's own network (`refuse_forbidden_peers`, given with each request).
Invariant: `describe` never quotes what was sent: h11's messages, for example, quote a header value that they refuse.
"""

from __future__ import annotations

import contextlib
import functools
import http.cookiejar
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import httpx
import trio

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.model import peers

KEEPALIVE_S: Final = 20.0
"""Less than the 60 s or so after which stores and balancers close an idle connection."""


@functools.cache
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """System authorities plus those in `ca_file` (PEM); one per file, for it costs 20 ms.

    Raises ConfigurationError when the file cannot be used.
    """
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(f"{ca_file}: not a file of certificates (PEM): {error}") from error
    return context


def client(*, ca_file: str | None, connect_timeout_s: float, answer_timeout_s: float) -> httpx.AsyncClient:
    """A client that follows no redirect, keeps connections, and takes proxies from the environment as curl does.

    `answer_timeout_s` bounds the wait for the next byte, not the whole answer. Raises ConfigurationError (`ca_file`).
    """
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return httpx.AsyncClient(
        verify=tls_context(ca_file),
        timeout=httpx.Timeout(answer_timeout_s, connect=connect_timeout_s, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=KEEPALIVE_S),
        follow_redirects=False,
        headers={"User-Agent": "valohai-fuse"},
        cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),  # none are kept
    )


class ForbiddenPeerError(Exception):
    """A host turned out to be at an address that must not be asked (`model.peers`)."""


async def refuse_forbidden_peers(event: str, info: Mapping[str, Any]) -> None:
    """For the `trace` extension of a request: looks at who is at the other end of each new connection, before anything is sent.

    Raises ForbiddenPeerError, with the connection closed.
    """
    if event != "connection.connect_tcp.complete":
        return
    stream = info["return_value"]
    peer = stream.get_extra_info("server_addr")
    if isinstance(peer, tuple) and peers.is_forbidden(str(peer[0])):
        await stream.aclose()
        raise ForbiddenPeerError("its host is at an address of this machine's own network")


async def read_raw(response: httpx.Response, take: Callable[[bytes], Awaitable[bool]]) -> None:
    """Gives the body, chunk by chunk as it is on the wire, to `take` until that says False or there is no more.

    httpx reads through generators within generators. Left in the middle they end when the garbage collector finds them,
    with a warning; so a body that is not read to its end is closed first and then read to the error that this makes.
    """
    chunks = response.aiter_raw()
    try:
        async for chunk in chunks:
            if not await take(chunk):
                break
    finally:
        with trio.CancelScope(shield=True):
            await response.aclose()
            with contextlib.suppress(httpx.HTTPError, httpx.StreamError):
                async for _ in chunks:
                    pass


async def read_beginning(response: httpx.Response, limit_bytes: int) -> bytes:
    """The first `limit_bytes` of the body as it is on the wire; the rest is not waited for."""
    body = bytearray()

    async def take(chunk: bytes) -> bool:
        body.extend(chunk)
        return len(body) < limit_bytes

    await read_raw(response, take)
    return bytes(body[:limit_bytes])


def describe(error: httpx.HTTPError | httpx.InvalidURL | ssl.SSLError) -> str:
    """The failure in words, without anything that was sent."""
    if isinstance(error, httpx.ConnectError):
        return f"cannot connect: {_innermost(error)[:200]}"
    words: tuple[tuple[type[Exception], str], ...] = (
        (httpx.ConnectTimeout, "connecting took too long"),
        (httpx.TimeoutException, "the answer took too long"),
        (httpx.RemoteProtocolError, "the connection ended in the middle of the answer"),
        (httpx.LocalProtocolError, "the request holds characters that HTTP does not permit"),
        (httpx.NetworkError, "the connection broke"),
        (httpx.ProxyError, "the proxy refused"),
    )
    return next((text for kind, text in words if isinstance(error, kind)), type(error).__name__)


def _innermost(error: BaseException) -> str:
    """What the operating system or OpenSSL said; httpx, httpcore and trio wrap it in exceptions without words."""
    words, cause = "no connection", error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and (cause.strerror or str(cause)):
            words = cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return words
