"""Which URLs may be fetched, and how a URL is written where people or logs see it.

Decides two things about a URL as text: whether this mount may use it at all (http and https, nothing that could smuggle a
second header line into a request, no address of the machine's own network), and its redacted form. Invariant: whatever
`redact` and `redact_text` return holds no query, no fragment and no credentials, for any text at all. Neither raises. Must not
know who wants the URL, nor what an expiry is. A URL that may be used is never rewritten here: a signature covers it byte for
byte.
"""

from __future__ import annotations

import re
from typing import Final

from valohai_fuse.model import peers

URL_CHARS_MAX: Final = 16 * 1024
"""The longest URL that is used. S3 with temporary credentials makes about 2,000; servers stop reading at 8 to 16 KiB."""

WEB_SCHEMES: Final = frozenset({"http", "https"})
"""What is not of these is refused for its scheme, whatever else is wrong with it."""

_SHOWN_PATH_CHARS: Final = 72
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}")
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[^\s\[\]:@/\\?#%\"'<>]{1,253})(?::\d{0,5})?")
_PORT = re.compile(r":\d*\Z")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:\\?/\\?/[^\s\"'<>]*")


def scheme(url: str) -> str:
    """The scheme in lower case, "" where the text does not begin with one."""
    head, colon, _ = url.partition(":")
    return head.lower() if colon and _SCHEME.fullmatch(head) else ""


def unsupported_reason(url: str) -> str | None:
    """Why this URL must not be fetched, in words that hold nothing secret; None when it may be."""
    kind = scheme(url)
    if kind not in WEB_SCHEMES:
        return f"its location is {kind}:, which cannot be fetched from here" if kind else "its location is not a URL"
    if len(url) > URL_CHARS_MAX:
        return f"its URL has {len(url)} characters"
    if _FORBIDDEN.search(url) or not _encodable(url):
        return "its URL holds blanks or control characters"
    rest = url[len(kind) :]
    host = _authority(rest[3:]).rpartition("@")[2]
    if not rest.startswith("://") or _AUTHORITY.fullmatch(host) is None:
        return "its URL names no host"
    if peers.is_forbidden_host(_PORT.sub("", host)):
        return "its host is an address of this machine's own network"
    return None


def supported(url: str) -> bool:
    """Whether a GET may be sent to this URL: http or https, a host, no characters that could end a header line."""
    return unsupported_reason(url) is None


def first_supported(*locations: str | None) -> str | None:
    """The first that may be fetched: `storage_uri` before `uri`, which may be public https; None: neither."""
    return next((location for location in locations if location and supported(location)), None)


def obstacle(*locations: str | None) -> str | None:
    """Why none of them may be fetched; None when one may, and when there is none: datum:// names, it does not locate."""
    given = [location for location in locations if location and scheme(location) != "datum"]
    return unsupported_reason(given[0]) if given and first_supported(*given) is None else None


def redact(url: str) -> str:
    """`scheme://host/path` with the path shortened; without query, fragment or credentials. For messages and logs only."""
    kind = scheme(url)
    if not kind:
        return "<not a URL>"
    rest = re.split(r"[?#]", url[len(kind) + 1 :], maxsplit=1)[0]
    if not rest.startswith("//"):
        return f"{kind}:..."
    authority = _authority(rest[2:])
    host = authority.rpartition("@")[2]
    path = rest[2 + len(authority) :]
    if _AUTHORITY.fullmatch(host) is None:
        return f"{kind}://..." if host else f"{kind}://{_shorten(path)}"  # a password with a slash looks like this too
    return f"{kind}://{_printable(host)}{_shorten(path)}"


def redact_text(text: str) -> str:
    """`text` with each URL in it redacted; for messages that somebody else wrote."""
    return _URL_IN_TEXT.sub(lambda match: redact(match[0].replace("\\/", "/")), text)


def _authority(rest: str) -> str:
    return re.split(r"[/\\?#]", rest, maxsplit=1)[0]


def _shorten(path: str) -> str:
    path = _printable(path)
    if len(path) <= _SHOWN_PATH_CHARS:
        return path
    return f"{path[:24]}...{path[-44:]}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:4096])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
