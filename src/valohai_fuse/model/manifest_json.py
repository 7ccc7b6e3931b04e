"""Decodes inputs.json: JSON in, the columns of a `Manifest` out, and messages with the JSON path where it is not one.

In three steps, so that an input that nobody asked for costs a scan and no more: the inputs as undecoded parts (`split`), the
files of a part as undecoded parts, and each file checked against its type (`assemble`). Peak memory is that of the parts,
about 60 bytes a file; the JSON itself may be a map of a file.

A message never holds a value of the manifest, for a value may be a signed URL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from mmap import mmap

import msgspec

from valohai_fuse.errors import ConfigurationError, UsageError
from valohai_fuse.model import urls
from valohai_fuse.model.manifest import (
    SIZE_BYTES_MAX,
    UNKNOWN,
    CheckedFile,
    Columns,
    InputSpan,
    Manifest,
    decode_checked,
)
from valohai_fuse.model.names import printable

_OBSTACLES_MAX = 255
"""A byte a file says which; the last one stands for all that came later."""
_PLAIN_URLS = ("https://", "http://")
"""What begins so is looked at when it is fetched: to check each of a million signed URLs would cost seconds."""


class _Input(msgspec.Struct):
    files: msgspec.Raw
    input_id: str | None = None


_decode_inputs = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_input = msgspec.json.Decoder(_Input).decode
_decode_files = msgspec.json.Decoder(list[msgspec.Raw]).decode


@dataclass(slots=True)
class InputPart:
    """One input as it stands in the JSON: `files` is the array, not decoded yet."""

    name: str
    input_id: str | None
    files: msgspec.Raw


def split(data: bytes | mmap, *, origin: str, wanted: Sequence[str] | None) -> list[InputPart]:
    """The inputs asked for (None: all), in the manifest's order; the others are skipped, not checked.

    `origin` names the file in messages. Raises ConfigurationError (not JSON, not the shape of a manifest) and UsageError
    (an input that does not exist; lists those that do).
    """
    if not len(data):
        raise ConfigurationError(f"{origin}: the file is empty", hint="it is written when an execution starts")
    every = _decode_all(data, origin)
    if wanted is not None and (unknown := [name for name in wanted if name not in every]):
        there = ", ".join(sorted(printable(name) for name in every)) or "none"
        raise UsageError(
            f"no such input: {', '.join(printable(name) for name in unknown)}", hint=f"inputs in {origin}: {there}"
        )
    parts = []
    for name, raw in every.items():
        if wanted is None or name in wanted:
            try:
                header = _decode_input(raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise invalid(origin, json_path(name), error) from None
            parts.append(InputPart(name, header.input_id or None, header.files))
    return parts


def _decode_all(data: bytes | mmap, origin: str) -> dict[str, msgspec.Raw]:
    try:
        return _decode_inputs(data)
    except msgspec.ValidationError as error:
        raise invalid(origin, "$", error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        mended = without_lone_surrogates(data)
        if mended is None:
            raise not_json(origin, data, error) from None
    return _decode_all(mended, origin)


def files_of(part: InputPart, *, origin: str) -> list[msgspec.Raw]:
    """The JSON of each file of an input, undecoded. Raises ConfigurationError."""
    try:
        return _decode_files(part.files)
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(origin, f"{json_path(part.name)}.files", error) from None


def without_lone_surrogates(data: bytes | mmap) -> bytes | None:
    r"""The JSON with `\u0000` for each escape of half a character (`\ud800`), so that it can be decoded; same length.

    A name with a NUL is refused by the tree, one by one, which is what becomes of such names. None: there was none.
    """
    count = 0

    def mend(match: re.Match[bytes]) -> bytes:
        nonlocal count
        if match[1] is None:
            return match[0]
        count += 1
        return b"\\u0000"

    mended = _ESCAPE.sub(mend, data)
    return mended if count else None


_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a whole pair: kept
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"  # half of one
    rb"|\\.",  # any other escape, so that `\\ud800` (a backslash, then text) is not taken for one
    re.DOTALL,
)


class _Filling:
    """The columns of a manifest while its inputs are decoded into them."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.columns = Columns()
        self._obstacle_by_schemes: dict[tuple[str, str], int] = {}
        """Where neither location is of the web; a million files in a store behind machine roles are all of one kind."""

    def add_input(self, part: InputPart, data: bytes | mmap, start: int) -> None:
        """Adds the files of `part`, whose array begins at `data[start]`."""
        columns = self.columns
        names: list[str] = []
        paths: list[str] = []
        odd_path = False
        below = f"/{part.name}/"
        find, search_from = data.find, start + 1
        for raw in files_of(part, origin=self.origin):
            entry = self._decode(part, len(names), raw)
            # Between two elements stand only blanks and a comma, and a checked element starts with a brace.
            offset = find(b"{", search_from)
            length = len(memoryview(raw))
            search_from = offset + length
            columns.offsets.append(offset)
            columns.lengths.append(length)
            size = entry.size
            if size.__class__ is not int or not 0 < size <= SIZE_BYTES_MAX:
                size = self._odd_size(part, entry)
            columns.sizes.append(size)
            location = entry.storage_uri or entry.uri
            plain = location is not None and location.startswith(_PLAIN_URLS)
            columns.obstacles.append(0 if plain else self._obstacle(entry))
            name, path = entry.name, entry.path
            if "\0" in name:
                columns.unwritable[len(columns.sizes) - 1] = name
                name = ""
            # Kept only where it says something else than `name` does; nearly always it is .../<input>/<name>.
            if path and path[path.find(below) + len(below) :] != name and "\0" not in path:
                odd_path = True
                paths.append(path)
            else:
                paths.append("")
            names.append(name)
        columns.names.append("\0".join(names).encode())
        columns.paths.append("\0".join(paths).encode() if odd_path else b"")

    def _decode(self, part: InputPart, position: int, raw: msgspec.Raw) -> CheckedFile:
        try:
            return decode_checked(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise invalid(self.origin, f"{json_path(part.name)}.files[{position}]", error) from None

    def _obstacle(self, entry: CheckedFile) -> int:
        """What stands in the way of fetching it, numbered: few kinds of many files."""
        schemes = urls.scheme(entry.storage_uri or ""), urls.scheme(entry.uri or "")
        number = self._obstacle_by_schemes.get(schemes)
        if number is None:
            number = self._obstacle_by_words(entry)
            if not urls.WEB_SCHEMES.intersection(schemes) and len(self._obstacle_by_schemes) < _OBSTACLES_MAX:
                self._obstacle_by_schemes[schemes] = number
        return number

    def _obstacle_by_words(self, entry: CheckedFile) -> int:
        if urls.first_supported(entry.storage_uri, entry.uri) is not None:
            return 0
        words, reason = self.columns.obstacle_words, urls.obstacle(entry.storage_uri, entry.uri) or "it has no URL"
        if reason in words:
            return words.index(reason)
        if len(words) > _OBSTACLES_MAX:
            return _OBSTACLES_MAX
        words.append(reason if len(words) < _OBSTACLES_MAX else "its URL is none that can be fetched")
        return len(words) - 1

    def _odd_size(self, part: InputPart, entry: CheckedFile) -> int:
        size = entry.size
        if not size:
            return UNKNOWN
        if 0 < size <= SIZE_BYTES_MAX and size == int(size):
            return int(size)
        shown = f"{size}" if abs(size) < 10**20 else "beyond 10^20"  # Python refuses to print a very long integer
        self.columns.notices.add(
            f"input {printable(part.name)}: {printable(entry.name)}: the size cannot be {shown}, taken as unknown"
        )
        return UNKNOWN


def assemble(
    parts: Iterable[tuple[InputPart, int]],
    data: bytes | mmap,
    *,
    origin: str,
    mtime_ns: int,
    read: Callable[[int, int], bytes],
    close: Callable[[], None] = lambda: None,
) -> Manifest:
    """A manifest from inputs and where in `data` the array of each begins; `read(offset, length)` gives the same bytes
    later on. Raises ConfigurationError naming `origin` and the JSON path."""
    filling = _Filling(origin)
    spans = []
    for part, start in parts:
        first = len(filling.columns.sizes)
        filling.add_input(part, data, start)
        spans.append(InputSpan(part.name, part.input_id, first, len(filling.columns.sizes)))
    return Manifest(inputs=spans, columns=filling.columns, read=read, mtime_ns=mtime_ns, close=close)


def from_json(
    data: bytes, *, inputs: Sequence[str] | None = None, origin: str = "inputs.json", mtime_ns: int = 0
) -> Manifest:
    """A manifest that keeps its JSON in memory: for small ones. Raises as `split` and `assemble` do."""
    parts = split(data, origin=origin, wanted=inputs)
    kept = b"".join(bytes(part.files) for part in parts)
    starts = []
    offset = 0
    for part in parts:
        starts.append((part, offset))
        offset += len(memoryview(part.files))
    return assemble(
        starts, kept, origin=origin, mtime_ns=mtime_ns, read=lambda start, length: kept[start : start + length]
    )


# --- messages ---------------------------------------------------------------------------------------------------------


def json_path(input_name: str) -> str:
    """The JSON path of an input."""
    return (
        f"$.{input_name}" if re.fullmatch(r"[A-Za-z_][\w-]*", input_name, re.ASCII) else f"$[{printable(input_name)}]"
    )


def invalid(origin: str, path: str, error: Exception) -> ConfigurationError:
    """`file: $.json.path: what is wrong there`; never the value, which may be a signed URL."""
    if isinstance(error, RecursionError):
        return ConfigurationError(f"{origin}: {path}: nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return ConfigurationError(f"{origin}: {path}: not UTF-8")
    problem, _, inner = str(error).partition(" - at `$")
    problem = problem.replace("`", "").replace("int | float | null", "int | null")
    return ConfigurationError(f"{origin}: {path}{inner.rstrip('`')}: {problem[:1].lower()}{problem[1:]}")


def not_json(origin: str, data: bytes | mmap, error: Exception) -> ConfigurationError:
    """Says where the JSON breaks off or goes wrong: line and column where the decoder gives a byte."""
    if isinstance(error, RecursionError):
        return ConfigurationError(f"{origin}: $: nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return ConfigurationError(f"{origin}: not UTF-8")
    match = re.fullmatch(r"JSON is malformed: (.*) \(byte (\d+)\)", str(error))
    if match is None:
        return ConfigurationError(
            f"{origin}: not JSON: it ends too early, after {len(data)} bytes",
            hint="was it cut off while being written?",
        )
    before = data[: int(match[2])]
    line = before.count(b"\n") + 1
    column = len(before) - before.rfind(b"\n")
    return ConfigurationError(f"{origin}: not JSON: {match[1]} at line {line}, column {column} (byte {match[2]})")
