"""What may be shown of a URL or a header, and how the rest is cut out of free text.

The rule of the whole project: no query, fragment, user info or token of a URL in anything that a person or a file gets to
see. Whoever raises or logs redacts on purpose with `url_shown`; `redact` is the safety net below the logs and the error
output, and therefore rather cuts too much than too little. Pure.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

CUT = "***"

_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.\-]*://)([^\s\"<>]+)")
_SCHEMED_TOKEN = re.compile(
    r"\b(Execution-Token|Token|Bearer|Basic)([ =:]+)(?=[^\s\"']*[\d.=\-_])[^\s\"',;)\]}]{8,}", re.IGNORECASE
)
_AUTHORIZATION = re.compile(r"(\bauthorization\b[\"']?\s*[:=,]\s*)([\"']?)([^\"'\n,)}\]]+)", re.IGNORECASE)
_SIGNED_PARAMETER = re.compile(
    r"\b(X-(?:Amz|Goog)-[A-Za-z0-9\-]+|AWSAccessKeyId|GoogleAccessId|Signature|sig|temp_url_sig|temp_url_expires|token|md5)"
    r"=[^\s\"'<>&]+",
    re.IGNORECASE,
)


def url_shown(url: str) -> str:
    """`scheme://host/path` of `url`, or what is left of it when it cannot be parsed; never raises."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not a URL)"
    if not parts.scheme:
        return "(not a URL)"
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}{parts.path}"


def _cut_url(match: re.Match[str]) -> str:
    scheme, rest = match[1], match[2]
    kept = re.split(r"[?#]", rest, maxsplit=1)
    shown = kept[0]
    authority, slash, path = shown.partition("/")
    if "@" in authority:
        authority = authority.rpartition("@")[2]
    mark = f"?{CUT}" if len(kept) > 1 else ""
    return f"{scheme}{authority}{slash}{path}{mark}"


def redact(text: str) -> str:
    """`text` without queries, fragments and user info of URLs, without tokens, without loose signature parameters."""
    text = _URL.sub(_cut_url, text)
    text = _AUTHORIZATION.sub(rf"\1\2{CUT}", text)
    text = _SCHEMED_TOKEN.sub(rf"\1\2{CUT}", text)
    return _SIGNED_PARAMETER.sub(rf"\1={CUT}", text)


def printable(text: str) -> str:
    """`text` on one line: control characters and lone surrogates become escapes, so that no file name forges a log line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
