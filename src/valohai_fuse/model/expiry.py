"""When a signed URL dies, as far as the URL itself says.

Reads the query of every form of signed URL that Valohai's stores use (S3 SigV4 and SigV2, MinIO, GCS v4 and v2, Azure SAS,
Swift TempURL, and nginx's or CloudFront's `expires`). Keys count in any case. What a URL says is an upper bound: it may
be refused earlier (temporary credentials), so the refusal of the store is the truth and this only serves to renew in time.
Invariant: malformed is None, nothing raises. Must not know what time it is: all instants are the signer's, in seconds since
the epoch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import unquote

_EARLIEST_S: Final = 946_684_800.0  # 2000-01-01: smaller numbers are no instants but durations, counters or nonsense
_LATEST_S: Final = 253_402_300_800.0  # the year 10000; larger ones are milliseconds or nonsense
_PAIRS_MAX: Final = 64

_BASIC = re.compile(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z", re.ASCII | re.IGNORECASE)
_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,]\d{1,9})?)?(Z|[+ -]\d\d:?\d\d)?)?",
    re.ASCII | re.IGNORECASE,
)
_EPOCH = re.compile(r"\d{1,15}", re.ASCII)


def expires_at_s(url: str) -> float | None:
    """When `url` expires by its own words, by the signer's clock; the earliest where several are given, None where none is.

    A date without a time is its first second, a time without seconds its first one: an expiry guessed too early costs a
    renewal, one guessed too late costs a refusal.
    """
    query = _query(url)
    found = [_signed_for(query, prefix) for prefix in ("x-amz", "x-goog")]
    found.append(_instant(query.get("expires")))
    found.append(_instant(query.get("temp_url_expires")))
    if "sig" in query:  # `se` by itself is somebody's parameter; a SAS always has its `sig`
        found.append(_iso(query.get("se")))
    return min((at_s for at_s in found if at_s is not None), default=None)


def signed_at_s(url: str) -> float | None:
    """When `url` was signed (or begins to be valid), by the signer's clock; None where it does not say."""
    query = _query(url)
    found = [_basic(query.get(f"{prefix}-date")) for prefix in ("x-amz", "x-goog")]
    if "sig" in query:
        found.append(_iso(query.get("st")))
    return max((at_s for at_s in found if at_s is not None), default=None)


def _query(url: str) -> dict[str, str]:
    """The query's pairs by lower-case key; of a key that comes twice the first counts, as it does for most servers."""
    pairs: dict[str, str] = {}
    for key, value in _pairs(url.partition("#")[0].partition("?")[2]):
        pairs.setdefault(key, value)
    return pairs


def _pairs(query: str) -> Iterator[tuple[str, str]]:
    for pair in query.split("&", _PAIRS_MAX)[:_PAIRS_MAX]:
        key, _, value = pair.partition("=")
        if len(value) <= 256 or key.lower() == "sig":
            yield unquote(key).lower(), unquote(value).strip()


def _signed_for(query: dict[str, str], prefix: str) -> float | None:
    signed_s, duration = _basic(query.get(f"{prefix}-date")), query.get(f"{prefix}-expires", "")
    if signed_s is None or not _EPOCH.fullmatch(duration):
        return None
    expires_s = signed_s + int(duration)
    return expires_s if expires_s < _LATEST_S else None


def _instant(text: str | None) -> float | None:
    if text is not None and _EPOCH.fullmatch(text):
        return float(text) if _EARLIEST_S <= int(text) < _LATEST_S else None
    return _iso(text)


def _basic(text: str | None) -> float | None:
    match = _BASIC.fullmatch(text or "")
    return _epoch_s(match.groups(), None) if match else None


def _iso(text: str | None) -> float | None:
    match = _ISO.fullmatch(text or "")
    if match is None:
        return None
    *fields, zone = match.groups()
    return _epoch_s(fields, zone)


def _epoch_s(fields: tuple[str | None, ...] | list[str | None], zone: str | None) -> float | None:
    """Seconds since the epoch of year ... second (None: 0); `zone` is None, Z or an offset whose + may have become a blank."""
    year, month, day, hour, minute, second = (int(text or 0) for text in fields)
    try:
        at = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
        if zone is not None and zone not in "Zz":
            ahead = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
            at = at + ahead if zone[0] == "-" else at - ahead
    except (ValueError, OverflowError):
        return None
    at_s = at.timestamp()
    return at_s if _EARLIEST_S <= at_s < _LATEST_S else None
