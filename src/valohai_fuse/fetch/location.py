"""Where a request may go: schemes, redirects, and who may see a lease's headers. URLs are bytes here, sent as they came.

Pure. `urllib` is imported only for a relative redirect, which no store is known to send: start-up time of a worker.
"""

from __future__ import annotations

import re
from typing import Final

from valohai_fuse.fetch.response import Rejected
from valohai_fuse.model import peers
from valohai_fuse.ports import FailureKind

REDIRECTS_MAX: Final = 5
FORBIDDEN_PEER: Final = "its host is at an address of this machine's own network"
_ORIGIN: Final = re.compile(rb"(https?)://([^/?#\\]+)", re.IGNORECASE)
_ABSOLUTE: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*:")
_PORT: Final = re.compile(r":\d*\Z")
_UNSENDABLE: Final = re.compile(rb"[\x00-\x20\x7f]")


def checked(url: bytes) -> bytes:
    """The URL itself. Raises Rejected(FORBIDDEN) unless it is http or https, can stand in a request line as it is, and its host
    is no address that must not be asked (names are judged when they are connected to, by the worker)."""
    if _ORIGIN.match(url) is None:
        raise Rejected(FailureKind.FORBIDDEN, "not an http or https URL")
    if _UNSENDABLE.search(url):
        raise Rejected(FailureKind.FORBIDDEN, "the URL holds blanks or control characters")
    if peers.is_forbidden_host(_PORT.sub("", origin(url).decode("latin-1").rpartition("//")[2].rpartition("@")[2])):
        raise Rejected(FailureKind.FORBIDDEN, FORBIDDEN_PEER)
    return url


def origin(url: bytes) -> bytes:
    """`scheme://host:port` in lower case: what has to be equal for a lease's headers to be sent along."""
    match = _ORIGIN.match(url)
    return match[0].lower() if match else b""


def target(url: bytes) -> bytes:
    """Path and query as they stand in the URL: what belongs into the request line."""
    rest = url[len(origin(url)) :].partition(b"#")[0]
    return rest if rest.startswith(b"/") else b"/" + rest


def followed(url: bytes, location: bytes) -> bytes:
    """Where an answer of `url` with this Location leads, byte for byte where it is absolute.

    Raises Rejected(FORBIDDEN) for another scheme than http and https, and for a step from https down to http.
    """
    if location.startswith(b"//"):
        location = url.partition(b":")[0] + b":" + location
    elif location.startswith(b"/"):
        location = origin(url) + location
    elif not _ABSOLUTE.match(location):
        from urllib.parse import urljoin  # noqa: PLC0415 - see the module's text

        try:  # as latin-1, which is byte for byte
            location = urljoin(url.decode("latin-1"), location.decode("latin-1")).encode("latin-1")
        except ValueError:
            raise Rejected(FailureKind.FORBIDDEN, "a redirect to what is no URL") from None
    if origin(url).startswith(b"https:") and not origin(location).startswith(b"https:"):
        raise Rejected(FailureKind.FORBIDDEN, "a redirect from https to another scheme")
    return checked(location)
