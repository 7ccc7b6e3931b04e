"""Where a request may go: schemes, redirects, and who may see a lease's headers. URLs are bytes here, sent as they came.

Pure. `urllib` is imported only for a relative redirect, which no store is known to send: start-up time of a worker.
"""

from __future__ import annotations

import re
from typing import Final

from valohai_fuse.fetch.response import Rejected
from valohai_fuse.ports import FailureKind

REDIRECTS_MAX: Final = 5
_ORIGIN: Final = re.compile(rb"(https?)://([^/?#\\]+)", re.IGNORECASE)
_ABSOLUTE: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*:")
_UNSENDABLE: Final = re.compile(rb"[\x00-\x20\x7f]")


def checked(url: bytes) -> bytes:
    """The URL itself. Raises Rejected(FORBIDDEN) unless it is http or https and can stand in a request line as it is."""
    if _ORIGIN.match(url) is None:
        raise Rejected(FailureKind.FORBIDDEN, "not an http or https URL")
    if _UNSENDABLE.search(url):
        raise Rejected(FailureKind.FORBIDDEN, "the URL holds blanks or control characters")
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

        location = urljoin(url, location)
    if origin(url).startswith(b"https:") and not origin(location).startswith(b"https:"):
        raise Rejected(FailureKind.FORBIDDEN, "a redirect from https to another scheme")
    return checked(location)
