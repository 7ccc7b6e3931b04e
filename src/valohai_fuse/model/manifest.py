"""What inputs.json says of the files, in as little memory as a million of them need.

JSON in, columns out: name, size and place of each file's own JSON object. The large fields (signed URL, metadata,
checksums; nine tenths of the file) stay where the bytes are and are decoded when one file is asked for, a few us each.

Invariants: files are numbered 0, 1, 2... over all inputs shown, in the order of the manifest, also those whose name the tree
will refuse; every file was decoded and type-checked once, so `record` does not fail. A wrong type is an error for the whole
mount, told with its JSON path; an odd *value* (a negative size, a bad name) concerns its file only.

Must not know: where the bytes come from (`sources.manifest_file` reads them), what becomes of the names (`model.tree`).
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

import msgspec

from valohai_fuse.errors import ConfigurationError, UsageError
from valohai_fuse.model import identity
from valohai_fuse.model.names import printable
from valohai_fuse.model.notices import Notices
from valohai_fuse.ports import FileRef

ON_DEMAND = "on-demand"
SIZE_BYTES_MAX = 2**63 - 1
"""The largest offset there is (off_t)."""
_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class InputSpan:
    """One input, and its files: the manifest's indices [start, stop)."""

    name: str
    input_id: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Everything that Valohai says of one file. Locations are kept out of `repr`, for they may be signed."""

    input_name: str
    input_id: str | None
    """The file's own where it has one, else the input's."""
    index: int
    """Into the manifest."""
    position: int
    """In the input's list of files."""
    name: str
    path: str | None
    size: int | None
    """Bytes; None: unknown (Valohai writes 0, null or nothing)."""
    uri: str | None = field(repr=False)
    storage_uri: str | None = field(repr=False)
    datum_id: str | None
    download_intent: str | None
    metadata: list[dict[str, Any]]
    checksums: dict[str, str]

    def ref(self) -> FileRef:
        """The file as URL sources know it."""
        return FileRef(
            input_name=self.input_name,
            input_id=self.input_id,
            name=self.name,
            uri=self.uri,
            datum_id=self.datum_id,
            storage_uri=self.storage_uri,
            index=self.position,
        )

    def stable_id(self) -> str:
        """The identity of the file's object, for `ports.ObjectKey`; never holds a query or a credential."""
        return identity.stable_id(
            datum_id=self.datum_id,
            uri=self.uri,
            storage_uri=self.storage_uri,
            within=self.input_id or self.input_name,
            name=self.name,
        )


class _Input(msgspec.Struct):
    files: msgspec.Raw
    input_id: str | None = None


class _Checked(msgspec.Struct, gc=False):
    """One file as it is checked on loading; metadata and checksums only inform, and are taken as they are later."""

    name: str
    path: str | None = None
    size: int | float | None = None
    uri: str | None = None
    storage_uri: str | None = None
    datum_id: str | None = None
    input_id: str | None = None
    download_intent: str | None = None


class _Whole(_Checked, gc=False):
    metadata: Any = None
    checksums: Any = None


_decode_inputs = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_input = msgspec.json.Decoder(_Input).decode
_decode_files = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_checked = msgspec.json.Decoder(_Checked).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode


class Manifest:
    """The files of the inputs asked for. Built by `assemble`; immutable; used on one thread."""

    def __init__(
        self,
        *,
        inputs: Sequence[InputSpan],
        columns: _Columns,
        read: Callable[[int, int], bytes],
        mtime_ns: int,
        close: Callable[[], None],
    ) -> None:
        self.inputs = tuple(inputs)
        self.mtime_ns = mtime_ns
        """When inputs.json was written, ns since the epoch: the mtime of everything in the tree."""
        self.notices = columns.notices
        self._columns = columns
        self._starts = [span.start for span in inputs]
        self._read = read
        self._close = close

    def __len__(self) -> int:
        return len(self._columns.sizes)

    def close(self) -> None:
        """Gives back the descriptor behind `record`. Names and sizes stay readable."""
        self._close()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the person about single files, bounded in number."""
        return self.notices.lines()

    def size(self, index: int) -> int | None:
        """Bytes of the file; None: unknown."""
        size = self._columns.sizes[index]
        return None if size == _UNKNOWN else size

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes by index, -1 for unknown: the column itself, for whoever goes through all of it."""
        return self._columns.sizes

    def span(self, index: int) -> InputSpan:
        """The input that file `index` belongs to. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.inputs[bisect_right(self._starts, index) - 1]

    def names(self, span: InputSpan) -> list[bytes]:
        """The `name` of each file of one input, in order; b"" for one that UTF-8 or the separator cannot hold."""
        return self._columns.names[self.inputs.index(span)].split(b"\0") if span.start < span.stop else []

    def paths(self, span: InputSpan) -> list[bytes] | None:
        """The `path` of each file where it says anything else than .../input/name (b"" where not); None: nowhere."""
        blob = self._columns.paths[self.inputs.index(span)]
        return blob.split(b"\0") if blob else None

    def unwritable_name(self, index: int) -> str | None:
        """The name of a file for which `names` has b"", where the manifest does have one."""
        return self._columns.unwritable.get(index)

    def record(self, index: int) -> FileRecord:
        """Everything about one file: a read of its JSON and a decode, a few us. Raises IndexError."""
        span = self.span(index)
        raw = _decode_record(self._read(self._columns.offsets[index], self._columns.lengths[index]))
        return FileRecord(
            input_name=span.name,
            input_id=raw.input_id or span.input_id,
            index=index,
            position=index - span.start,
            name=raw.name,
            path=raw.path,
            size=self.size(index),
            uri=raw.uri or None,
            storage_uri=raw.storage_uri or None,
            datum_id=raw.datum_id or None,
            download_intent=raw.download_intent,
            metadata=_metadata(raw.metadata),
            checksums=_checksums(raw.checksums),
        )


def _decode_record(raw: bytes) -> _Whole:
    try:
        return _decode_whole(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # What was checked on loading decodes again; metadata that does not (not UTF-8, too deep) is done without.
        return msgspec.convert(msgspec.structs.asdict(_decode_checked(raw)), _Whole)


def _metadata(value: Any) -> list[dict[str, Any]]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict) and item]


def _checksums(value: Any) -> dict[str, str]:
    return {key: text for key, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}


# --- decoding ---------------------------------------------------------------------------------------------------------


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


class _Columns:
    """The growing columns of a manifest; what `assemble` fills."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.notices = Notices()
        self.offsets = array("Q")
        self.lengths = array("I")
        self.sizes = array("q")
        self.names: list[bytes] = []
        self.paths: list[bytes] = []
        self.unwritable: dict[int, str] = {}

    def add_input(self, part: InputPart, data: bytes | mmap, start: int) -> None:
        """Adds the files of `part`, whose array begins at `data[start]`."""
        names: list[str] = []
        paths: list[str] = []
        odd_path = False
        find, search_from = data.find, start + 1
        for raw in files_of(part, origin=self.origin):
            entry = self._decode(part, len(names), raw)
            # Between two elements stand only blanks and a comma, and a checked element starts with a brace.
            offset = find(b"{", search_from)
            length = len(memoryview(raw))
            search_from = offset + length
            self.offsets.append(offset)
            self.lengths.append(length)
            size = entry.size
            if size.__class__ is not int or not 0 < size <= SIZE_BYTES_MAX:
                size = self._odd_size(part, entry)
            self.sizes.append(size)
            name, path = entry.name, entry.path
            if "\0" in name:
                self.unwritable[len(self.sizes) - 1] = name
                name = ""
            if path and not path.endswith(f"/{part.name}/{name}") and "\0" not in path:
                odd_path = True
                paths.append(path)
            else:
                paths.append("")
            names.append(name)
        self.names.append("\0".join(names).encode())
        self.paths.append("\0".join(paths).encode() if odd_path else b"")

    def _decode(self, part: InputPart, position: int, raw: msgspec.Raw) -> _Checked:
        try:
            return _decode_checked(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise invalid(self.origin, f"{json_path(part.name)}.files[{position}]", error) from None

    def _odd_size(self, part: InputPart, entry: _Checked) -> int:
        size = entry.size
        if not size:
            return _UNKNOWN
        if 0 < size <= SIZE_BYTES_MAX and size == int(size):
            return int(size)
        shown = f"{size}" if abs(size) < 10**20 else "beyond 10^20"  # Python refuses to print a very long integer
        self.notices.add(
            f"input {printable(part.name)}: {printable(entry.name)}: the size cannot be {shown}, taken as unknown"
        )
        return _UNKNOWN


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
    columns = _Columns(origin)
    spans = []
    for part, start in parts:
        first = len(columns.sizes)
        columns.add_input(part, data, start)
        spans.append(InputSpan(part.name, part.input_id, first, len(columns.sizes)))
    return Manifest(inputs=spans, columns=columns, read=read, mtime_ns=mtime_ns, close=close)


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
