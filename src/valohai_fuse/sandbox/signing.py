"""Signed URLs that really expire, in the forms that Valohai's stores use.

Decides what a signed query looks like, whether one is good, and how a store refuses one that is not. A signature is an
HMAC over the raw path and the raw rest of the query: a client that re-encodes a URL is refused, as a real store would. The
signature begins with the serial number of the batch it was minted in, so that two batches never give the same URL and
everything minted so far can be revoked at once. Forms, statuses and bodies follow what the real stores answer. Knows
nothing of objects and sockets.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args
from urllib.parse import parse_qsl, unquote

Form = Literal[
    "s3-sigv4", "s3-sts", "s3-sigv2", "minio", "gcs-v4", "gcs-v2", "azure-sas", "swift", "swift-iso", "plain"
]
FORMS: tuple[Form, ...] = get_args(Form)

_SIGNATURE_KEYS = {"x-amz-signature", "x-goog-signature", "signature", "sig", "temp_url_sig"}
_SERIAL_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a store says no."""

    status: int
    content_type: str
    body: str
    why: Literal["expired", "signature", "unsigned"]


@dataclass(frozen=True, slots=True)
class Batch:
    """URLs minted together, as one answer of the API holds them."""

    serial: int
    expires_at_s: int
    sign: Callable[[str], str]
    """Raw path -> query with the question mark in front; "" for the plain form."""


class Signer:
    """Mints and judges. Any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._serial = 0
        self._revoked_serial = 0

    def batch(self, form: Form, lifetime_s: float, age_s: float = 0.0) -> Batch:
        """A batch minted `age_s` ago that lives `lifetime_s` (at least 1; whole seconds, as the forms have no more)."""
        with self._lock:
            self._serial += 1
            serial = self._serial
        minted_s, lifetime = int(self._clock() - age_s), max(1, int(lifetime_s))
        before, after = _query_around_signature(form, minted_s, lifetime)

        def sign(path: str) -> str:
            if form == "plain":
                return ""
            return f"?{before}{self._signature(serial, path, before + after)}{after}"

        return Batch(serial, minted_s + lifetime, sign)

    def revoke_minted(self) -> None:
        """Whatever was minted until now is refused as expired, whatever it says of itself."""
        with self._lock:
            self._revoked_serial = self._serial

    def judge(self, path: str, query: str) -> Refusal | None:
        """None when the raw path and query are properly signed and alive; how to refuse them otherwise."""
        now_s = self._clock()
        kept, signature = _without_signature(query)
        form = _form_of(query)
        if form == "plain" or not signature:
            return refusal(form, "unsigned", now_s)
        serial = int(signature[:_SERIAL_DIGITS], 16) if _is_hex(signature[:_SERIAL_DIGITS]) else -1
        if serial < 0 or not hmac.compare_digest(self._signature(serial, path, kept), signature):
            return refusal(form, "signature", now_s)
        if serial <= self._revoked_serial or now_s >= expiry(query):
            return refusal(form, "expired", now_s, expiry(query))
        return None

    def _signature(self, serial: int, path: str, rest: str) -> str:
        message = f"{serial}\n{path}\n{rest}".encode()
        return f"{serial:0{_SERIAL_DIGITS}x}{hmac.digest(self._secret, message, hashlib.sha256).hex()}"


def expiry(query: str) -> float:
    """When a signed query of any of the forms ends, seconds since the epoch. Raises KeyError, ValueError."""
    values = {key.lower(): text for key, text in parse_qsl(query)}
    for vendor in ("amz", "goog"):
        if f"x-{vendor}-date" in values:
            minted = datetime.strptime(values[f"x-{vendor}-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            return minted.timestamp() + int(values[f"x-{vendor}-expires"])
    text = values.get("se") or values.get("temp_url_expires") or values["expires"]
    return float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()


def _query_around_signature(form: Form, minted_s: int, lifetime_s: int) -> tuple[str, str]:
    """The query before and after the value of the signature."""
    compact, expires_s = _at(minted_s, "%Y%m%dT%H%M%SZ"), minted_s + lifetime_s
    day = compact[:8]
    iso_start, iso_end = (_at(s, "%Y-%m-%dT%H:%M:%SZ").replace(":", "%3A") for s in (minted_s, expires_s))
    match form:
        case "s3-sigv4" | "s3-sts" | "minio":
            access_key = {"s3-sigv4": "AKIASANDBOX", "s3-sts": "ASIASANDBOX", "minio": "minioadmin"}[form]
            return (
                f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={access_key}%2F{day}%2Feu-west-1%2Fs3%2Faws4_request"
                f"&X-Amz-Date={compact}&X-Amz-Expires={lifetime_s}&X-Amz-SignedHeaders=host&X-Amz-Signature="
            ), ("&X-Amz-Security-Token=c2FuZGJveA%3D%3D" if form == "s3-sts" else "")
        case "s3-sigv2":
            return "AWSAccessKeyId=AKIASANDBOX&Signature=", f"%3D&Expires={expires_s}"
        case "gcs-v4":
            return (
                f"X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Credential=sandbox%40valohai.invalid%2F{day}%2Fauto%2Fstorage"
                f"%2Fgoog4_request&X-Goog-Date={compact}&X-Goog-Expires={lifetime_s}&X-Goog-SignedHeaders=host"
                "&X-Goog-Signature="
            ), ""
        case "gcs-v2":
            return f"GoogleAccessId=sandbox%40valohai.invalid&Expires={expires_s}&Signature=", "%3D"
        case "azure-sas":
            return f"sv=2023-11-03&st={iso_start}&se={iso_end}&sr=b&sp=r&sig=", "%3D"
        case "swift":
            return "temp_url_sig=", f"&temp_url_expires={expires_s}"
        case "swift-iso":
            return "temp_url_sig=", f"&temp_url_expires={_at(expires_s, '%Y-%m-%dT%H:%M:%SZ')}"
        case "plain":
            return "", ""


def _without_signature(query: str) -> tuple[str, str]:
    """The query with the signature's value (up to the padding) taken out, and that value."""
    for part in query.split("&"):
        key, _, text = part.partition("=")
        if key.lower() in _SIGNATURE_KEYS:
            signature = unquote(text).rstrip("=")
            return query.replace(f"{key}={signature}", f"{key}=", 1), signature
    return query, ""


def _form_of(query: str) -> Form:
    keys = {part.partition("=")[0].lower() for part in query.split("&")}
    if "x-amz-date" in keys:
        if "x-amz-security-token" in keys:
            return "s3-sts"
        return "minio" if "minioadmin" in query else "s3-sigv4"
    if "temp_url_expires" in keys:
        return "swift-iso" if "T" in query.partition("temp_url_expires=")[2] else "swift"
    for key, form in _FORM_BY_KEY.items():
        if key in keys:
            return form
    return "plain"


_FORM_BY_KEY: dict[str, Form] = {
    "x-goog-date": "gcs-v4",
    "googleaccessid": "gcs-v2",
    "awsaccesskeyid": "s3-sigv2",
    "se": "azure-sas",
}


def refusal(
    form: Form, why: Literal["expired", "signature", "unsigned"], now_s: float, expires_s: float | None = None
) -> Refusal:
    """What the store of this form answers: the status and body of the real one."""
    xml = '<?xml version="1.0" encoding="UTF-8"?>\n'
    ended = _at(expires_s or now_s, "%Y-%m-%dT%H:%M:%SZ")
    server_time = _at(now_s, "%Y-%m-%dT%H:%M:%SZ")
    if form.startswith("swift"):
        return Refusal(401, "text/html; charset=UTF-8", "401 Unauthorized: Temp URL invalid\n", why)
    if form == "azure-sas":
        detail = f"Signature not valid in the specified time frame: Expiry [{ended}] - Current [{server_time}]"
        if why != "expired":
            detail = "Signature did not match."
        body = (
            '\ufeff<?xml version="1.0" encoding="utf-8"?><Error><Code>AuthenticationFailed</Code><Message>Server failed to '
            "authenticate the request. Make sure the value of Authorization header is formed correctly including the "
            f"signature.\nRequestId:0\nTime:{server_time}</Message><AuthenticationErrorDetail>{detail}"
            "</AuthenticationErrorDetail></Error>"
        )
        return Refusal(403, "application/xml", body, why)
    if why == "signature":
        body = f"{xml}<Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match.</Message></Error>"
        return Refusal(403, "application/xml", body, why)
    if why == "unsigned":
        return Refusal(403, "application/xml", f"{xml}{access_denied_xml()}", why)
    if form in {"gcs-v4", "gcs-v2"}:
        body = (
            "<?xml version='1.0' encoding='UTF-8'?><Error><Code>ExpiredToken</Code><Message>Invalid argument.</Message>"
            f"<Details>The provided token has expired. Request signature expired at: {ended}</Details></Error>"
        )
        return Refusal(400, "application/xml; charset=UTF-8", body, why)
    if form == "s3-sts":
        body = f"{xml}<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        return Refusal(400, "application/xml", body, why)
    body = (
        f"{xml}<Error><Code>AccessDenied</Code><Message>Request has expired</Message><Expires>{ended}</Expires>"
        f"<ServerTime>{server_time}</ServerTime><RequestId>X</RequestId><HostId>Y</HostId></Error>"
    )
    return Refusal(403, "application/xml", body, why)


def access_denied_xml() -> str:
    """What S3 says to somebody who may not, with a signature that is in order."""
    return "<Error><Code>AccessDenied</Code><Message>Access Denied</Message><RequestId>X</RequestId></Error>"


def form_of(query: str) -> Form:
    """Which form a raw query has; "plain" when it is not signed."""
    return _form_of(query)


def _at(instant_s: float, pattern: str) -> str:
    return datetime.fromtimestamp(instant_s, UTC).strftime(pattern)


def _is_hex(text: str) -> bool:
    return len(text) == _SERIAL_DIGITS and all(digit in "0123456789abcdef" for digit in text)
