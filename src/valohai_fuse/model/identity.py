"""What an object *is*: the stable id under which its bytes are cached, for every execution on the host and for years.

Invariants: the same object has the same id in every execution, whatever its signed URL is this time; two objects never
share one; an id never holds a query, a credential or a fragment in clear, for it is written to disk and into logs.

A query is not always a signature: `?versionId=...` or `?id=7` says *which* object. So the parts that are known to sign are
dropped, and what remains enters as a hash. A signer unknown to the list costs cache hits, never a wrong byte.
"""

from __future__ import annotations

import hashlib
from urllib.parse import unquote_plus

_SIGNING_PREFIXES = ("x-amz-", "x-goog-", "temp_url_", "response-")
_SIGNING_PARAMETERS = frozenset(
    (
        # S3 SigV2, CloudFront, GCS v2, nginx secure_link
        *("awsaccesskeyid", "signature", "expires", "key-pair-id", "policy", "googleaccessid", "md5"),
        # Azure SAS (service, account, user delegation)
        *("sv", "ss", "srt", "sp", "st", "se", "spr", "sip", "sr", "sig", "si", "sdd", "saoid", "suoid", "scid"),
        *("skoid", "sktid", "skt", "ske", "sks", "skv", "ses", "rscc", "rscd", "rsce", "rscl", "rsct"),
    )
)


def stable_id(*, datum_id: str | None, uri: str | None, storage_uri: str | None, within: str, name: str) -> str:
    """`datum:<id>`, else `uri:<location>`, else `input:<within>/<name>`, which is stable within that input at least.

    `within` is the input's id, or its name where it has none.
    """
    if datum_id:
        return f"datum:{datum_id}"
    if uri and uri[:8].lower() == "datum://":
        datum = without_secrets(uri)[8:].strip("/")
        if datum:
            return f"datum:{datum}"
    for location in (uri, storage_uri):
        if location and without_secrets(location):
            return f"uri:{_identifying(location)}"
    return f"input:{within}/{name}"


def without_secrets(location: str) -> str:
    """scheme://host/path of a URL, byte for byte: without credentials, query and fragment."""
    base, _query, _fragment = _split(location)
    scheme, separator, rest = base.partition("://")
    if not separator:
        return base
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def _split(location: str) -> tuple[str, str, str]:
    base, _, fragment = location.partition("#")
    base, _, query = base.partition("?")
    return base, query, fragment


def _identifying(location: str) -> str:
    base, query, fragment = _split(location)
    rest = [part for part in query.split("&") if part and not _signs(part)]
    if fragment and base.partition("://")[0].lower() not in {"http", "https"}:
        rest.append(
            "#" + fragment
        )  # a bare s3:// key may hold '#' itself; over HTTP a fragment never reaches the store
    plain = without_secrets(location)
    if not rest:
        return plain
    digest = hashlib.sha256("&".join(rest).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain}~{digest[:32]}"


def _signs(parameter: str) -> bool:
    key = unquote_plus(parameter.partition("=")[0]).lower()
    return key in _SIGNING_PARAMETERS or key.startswith(_SIGNING_PREFIXES)
