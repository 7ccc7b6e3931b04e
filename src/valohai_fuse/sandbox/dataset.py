"""Which inputs and files the sandbox's execution has, and what its manifest says of them.

Decides names, ids, object keys and the fields of inputs.json. Invariants: ids depend on the names alone, so that two
sandboxes of the same data describe the same objects (a cache survives a remount); each file has an object key of its own
that is safe in a URL path, also where its name is not (`..`, duplicates). Knows nothing of HTTP; a URL is what the caller
puts in.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from valohai_fuse.sandbox.content import Content, as_content, read_all

Source = bytes | bytearray | str | os.PathLike[str] | Content
SizeReport = Literal["exact", "zero", "null", "missing"] | int

_NAMESPACE = uuid.UUID("019a17bd-0000-7000-8000-76616c6f6861")


class _Absent:
    """The one value of ABSENT."""


ABSENT: Final = _Absent()
"""In `SandboxFile.overrides`: the manifest does not have this field at all."""


@dataclass(frozen=True, slots=True)
class SandboxFile:
    """One file of an input. `content` is bytes, a path (str or PathLike) of a file, or a Content such as `ramp(10**12)`.

    `size` is what the manifest says: the truth, 0, null, nothing, or a lie (int). `overrides` replaces fields of the
    manifest's entry as they are (`{"datum_id": None, "uri": ABSENT}`), for the shapes that a mount must survive.
    """

    name: str
    content: Source = field(repr=False)
    intent: str = "on-demand"
    metadata: Sequence[Mapping[str, Any]] = ()
    size: SizeReport = "exact"
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SandboxInput:
    """One input; `input_id` "" makes one up from the name, None leaves it out of the manifest."""

    files: Sequence[SandboxFile]
    input_id: str | None = ""


InputSpec = SandboxInput | Sequence[SandboxFile] | Mapping[str, Source]


@dataclass(slots=True)
class Entry:
    """A file of the data set with everything derived from it. `content` is what the store serves *now*."""

    input_name: str
    input_id: str | None
    file: SandboxFile
    content: Content = field(repr=False)
    datum_id: str
    object_key: str
    """`<input>/<name>`, or `<input>/~<index>` where the name cannot be a URL path or is taken already."""
    size_at_start: int

    @property
    def uri(self) -> str:
        """The stable URI that the manifest and the API's answer name this file by."""
        return f"datum://{self.datum_id}"


class Dataset:
    """All inputs, in order. Built once; afterwards only `Entry.content` changes (a test replaces an object)."""

    def __init__(self, inputs: Mapping[str, InputSpec]) -> None:
        self.inputs: dict[str, tuple[str | None, list[Entry]]] = {}
        self.by_key: dict[str, Entry] = {}
        for name, spec in inputs.items():
            described = _described(spec)
            input_id = str(uuid.uuid5(_NAMESPACE, name)) if described.input_id == "" else described.input_id
            entries = [self._entry(name, input_id, index, file) for index, file in enumerate(described.files)]
            self.inputs[name] = (input_id, entries)

    def _entry(self, input_name: str, input_id: str | None, index: int, file: SandboxFile) -> Entry:
        key = f"{input_name}/{file.name}"
        if key in self.by_key or not _fits_url(file.name):
            key = f"{input_name}/~{index}"
        content = as_content(file.content)
        entry = Entry(
            input_name=input_name,
            input_id=input_id,
            file=file,
            content=content,
            datum_id=str(uuid.uuid5(_NAMESPACE, f"{input_name}\0{index}\0{file.name}")),
            object_key=key,
            size_at_start=content.size,
        )
        self.by_key[key] = entry
        return entry

    def entries(self) -> Iterator[Entry]:
        """Every file of every input, in the manifest's order."""
        for _, entries in self.inputs.values():
            yield from entries

    def entry(self, input_name: str, name: str) -> Entry:
        """The file of that name; of duplicates the last, as Valohai documents. Raises KeyError."""
        for entry in reversed(self.inputs[input_name][1]):
            if entry.file.name == name:
                return entry
        raise KeyError(f"{input_name}/{name}")

    def manifest(self, inputs_dir: str, url_of: Callable[[Entry], str | None]) -> dict[str, Any]:
        """What inputs.json says; `url_of` gives the storage_uri of a file."""
        return {
            name: ({} if input_id is None else {"input_id": input_id})
            | {"files": [_manifest_file(entry, inputs_dir, url_of(entry)) for entry in entries]}
            for name, (input_id, entries) in self.inputs.items()
        }

    def materialise(self, directory: str) -> None:
        """Writes every object as `<directory>/<object key>`, for a store that serves files. Generated ones in full."""
        for entry in self.entries():
            write_content(os.path.join(directory, entry.object_key), entry.content)


def write_content(path: str, content: Content) -> None:
    """Writes all bytes of `content` to `path`, making directories as needed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.writelines(content.slices(0, content.size))


def expected_bytes(entry: Entry, start: int = 0, stop: int | None = None) -> bytes:
    """What reading [start, stop) of the file must give."""
    return read_all(entry.content, start, stop)


def _described(spec: InputSpec) -> SandboxInput:
    if isinstance(spec, SandboxInput):
        return spec
    if isinstance(spec, Mapping):
        return SandboxInput([SandboxFile(name, source) for name, source in spec.items()])
    return SandboxInput(list(spec))


def _fits_url(name: str) -> bool:
    return "\0" not in name and all(part not in {"", ".", ".."} for part in name.split("/"))


def _manifest_file(entry: Entry, inputs_dir: str, url: str | None) -> dict[str, Any]:
    file = entry.file
    fields: dict[str, Any] = {
        "datum_id": entry.datum_id,
        "download_intent": file.intent,
        "input_id": entry.input_id,
        "metadata": [dict(item) for item in file.metadata],
        "name": file.name,
        "path": f"{inputs_dir}/{entry.input_name}/{file.name}",
        "size": _reported_size(file.size, entry.size_at_start),
        "storage_uri": url,
        "uri": entry.uri,
    }
    fields.update(file.overrides)
    return {key: value for key, value in fields.items() if value is not ABSENT}


def _reported_size(report: SizeReport, size: int) -> Any:
    if isinstance(report, int):
        return report
    return {"exact": size, "zero": 0, "null": None, "missing": ABSENT}[report]
