"""What inputs.json says of the files, in as little memory as a million of them need.

Columns: name, size and place of each file's own JSON object. The large fields (signed URL, metadata,
checksums; nine tenths of the file) stay where the bytes are and are decoded when one file is asked for, a few us each.

Invariants: files are numbered 0, 1, 2... over all inputs shown, in the order of the manifest, also those whose name the tree
will refuse; every file was decoded and type-checked once, so `record` does not fail. A wrong type is an error for the whole
mount, told with its JSON path; an odd *value* (a negative size, a bad name) concerns its file only.

Must not know: how the columns are filled (`manifest_json`), where the bytes come from (`sources.manifest_file` reads them),
what becomes of the names (`tree`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from valohai_fuse.model import identity
from valohai_fuse.model.file_ref import FileRef
from valohai_fuse.model.notices import Notices

ON_DEMAND = "on-demand"
SIZE_BYTES_MAX = 2**63 - 1
"""The largest offset there is (off_t)."""
UNKNOWN = -1
"""A size in a column that is not known."""


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


def stable_id(record: FileRecord) -> str:
    """The identity of the file's object, for `ports.ObjectKey`; never holds a query or a credential. See `identity`."""
    return identity.stable_id(
        datum_id=record.datum_id,
        uri=record.uri,
        storage_uri=record.storage_uri,
        within=record.input_id or record.input_name,
        name=record.name,
    )


class CheckedFile(msgspec.Struct, gc=False):
    """One file as it is checked on loading; metadata and checksums only inform, and are taken as they are later."""

    name: str
    path: str | None = None
    size: int | float | None = None
    uri: str | None = None
    storage_uri: str | None = None
    datum_id: str | None = None
    input_id: str | None = None
    download_intent: str | None = None


class _WholeFile(CheckedFile, gc=False):
    metadata: Any = None
    checksums: Any = None


decode_checked = msgspec.json.Decoder(CheckedFile).decode
_decode_whole = msgspec.json.Decoder(_WholeFile).decode


@dataclass(slots=True)
class Columns:
    """What is kept of each file, by index; of names and paths one string of bytes an input, separated by NUL."""

    notices: Notices = field(default_factory=Notices)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("I"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    names: list[bytes] = field(default_factory=list)
    paths: list[bytes] = field(default_factory=list)
    unwritable: dict[int, str] = field(default_factory=dict)
    """Names that hold the separator."""
    obstacles: bytearray = field(default_factory=bytearray)
    """Why a file's location cannot be fetched, as an index into `obstacle_words`; 0: it can."""
    obstacle_words: list[str] = field(default_factory=lambda: [""])


class Manifest:
    """The files of the inputs asked for. Built by `manifest_json.assemble`; immutable; used on one thread."""

    def __init__(
        self,
        *,
        inputs: Sequence[InputSpan],
        columns: Columns,
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
        return None if size == UNKNOWN else size

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

    def has_obstacles(self) -> bool:
        """Whether any file's location cannot be fetched as it stands."""
        return len(self._columns.obstacle_words) > 1

    def obstacle(self, index: int) -> str:
        """Why a file's location cannot be fetched without another URL from Valohai; "" where it can."""
        return self._columns.obstacle_words[self._columns.obstacles[index]]

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


def _decode_record(raw: bytes) -> _WholeFile:
    try:
        return _decode_whole(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # What was checked on loading decodes again; metadata that does not (not UTF-8, too deep) is done without.
        return msgspec.convert(msgspec.structs.asdict(decode_checked(raw)), _WholeFile)


def _metadata(value: Any) -> list[dict[str, Any]]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict) and item]


def _checksums(value: Any) -> dict[str, str]:
    return {key: text for key, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}
