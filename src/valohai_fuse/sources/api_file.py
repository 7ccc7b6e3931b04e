"""api.json: how Valohai wants to be asked for new URLs.

Decides whether the file says something that can be sent at all. Invariant: no message and no repr holds a header, a token or the
URL's query. Must not know when it is asked.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.model import urls

FILE_NAME: Final = "api.json"
_BYTES_MAX: Final = 1 << 20
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", re.ASCII)
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]{0,8192}")


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """`input_request` of api.json, checked: may be sent as it is."""

    method: str
    url: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(repr=False)


class _Request(msgspec.Struct):
    url: str
    method: Annotated[str, msgspec.Meta(pattern="^[A-Za-z]{1,16}$")] | None = None
    headers: dict[str, str] | None = None

    def __repr__(self) -> str:
        return "<request>"


class _File(msgspec.Struct):
    input_request: _Request

    def __repr__(self) -> str:
        return "<api.json>"


def path_in(config_dir: str) -> str:
    """Where api.json is looked for."""
    return os.path.join(config_dir, FILE_NAME)


def load(config_dir: str) -> ApiRequest | None:
    """What `config_dir`/api.json says; None when there is no such file.

    Raises ConfigurationError naming the file and the JSON path.
    """
    path = path_in(config_dir)
    try:
        with open(path, "rb") as file:
            raw = file.read(_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > _BYTES_MAX:
        raise ConfigurationError(f"{path}: more than {_BYTES_MAX} bytes; that is no api.json")
    try:
        request = msgspec.json.decode(raw.removeprefix(b"\xef\xbb\xbf"), type=_File).input_request
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {_in_words(error)}") from None  # the cause could quote the file
    return _checked(path, request)


def _checked(path: str, request: _Request) -> ApiRequest:
    url = request.url.strip()
    reason = urls.unsupported_reason(url)
    if reason is not None:
        raise ConfigurationError(f"{path}: $.input_request.url: {reason}")
    headers = tuple((request.headers or {}).items())
    for name, value in headers:
        if _HEADER_NAME.fullmatch(name) is None:
            raise ConfigurationError(f"{path}: $.input_request.headers: a header has a name that HTTP does not permit")
        if _HEADER_VALUE.fullmatch(value) is None:
            raise ConfigurationError(f"{path}: $.input_request.headers.{name}: a value that HTTP does not permit")
    return ApiRequest((request.method or "POST").upper(), url, headers)


def _in_words(error: Exception) -> str:
    """msgspec's messages quote types and paths, never values."""
    if isinstance(error, msgspec.ValidationError):
        text, _, place = str(error).partition(" - at ")
        return f"{place.strip('`') or '$'}: {text[:1].lower()}{text[1:]}"
    if isinstance(error, msgspec.DecodeError):
        return f"not JSON: {error}"
    return "not JSON: nested too deeply" if isinstance(error, RecursionError) else "not JSON: not UTF-8"
