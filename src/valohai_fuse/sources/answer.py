"""Valohai's answer to a renewal: up to 100,000 files and 100 MB of JSON, of which one URL at a time is wanted.

Decides how to find a file's URL without keeping 100,000 of them: the body stays as it came (on disk beyond 1 MiB), memory holds
two hashes and an offset for each file, and the one entry is decoded when asked for. Indexing walks the body entry by entry
with one regular expression per entry, because a decoder that takes the whole body in one call would hold the interpreter
(and so every read of the mount) for half a second.

Invariants: an entry is given only if its own decoded text matches the file asked for, so a hash collision costs a URL and
never gives a wrong one. Names are keys here and nothing else: `..` in one matches no file.
Immutable once indexed. Must not know HTTP or clocks.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator
from typing import Final

import msgspec

from valohai_fuse.errors import StoreUnavailableError
from valohai_fuse.ports import FileRef

Buffer = bytes | mmap.mmap

_DEPTH_MAX: Final = 24
_IDS_PER_INPUT_MAX: Final = 16


def _nested(depth: int) -> bytes:
    """What may stand inside an object or array with at most `depth` more levels; possessive, hence linear."""
    string = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    inner = rb'(?:[^"{}\[\]]++|' + string + rb")*+"
    for _ in range(depth):
        inner = rb'(?:[^"{}\[\]]++|' + string + rb"|[{\[]" + inner + rb"[}\]])*+"
    return inner


_ENTRY = re.compile(rb"\{" + _nested(_DEPTH_MAX) + rb"\}", re.DOTALL)
_KEY = re.compile(rb'\s*("[^"\\]*+(?:\\.[^"\\]*+)*+")\s*:\s*', re.DOTALL)
_VALUE = re.compile(
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{\[]' + _nested(_DEPTH_MAX) + rb"[}\]]|[^\s\"{}\[\],]++",
    re.DOTALL,
)
_MARK = re.compile(rb"\s*([\[\]{},])\s*")


class _Entry(msgspec.Struct):
    filename: str
    original_uri: str | None = None
    url: str | None = None
    input_id: str | None = None

    def __repr__(self) -> str:
        return "<file>"


def _decode(raw: bytes) -> _Entry:
    """Raises msgspec.ValidationError (other types than documented), msgspec.DecodeError (not JSON)."""
    try:
        return _decoder.decode(raw)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        # Users' metadata stands in here, and Python's json writes and reads NaN, which JSON does not know.
        try:
            return msgspec.convert(json.loads(raw), _Entry)
        except (ValueError, RecursionError) as other:
            if isinstance(other, msgspec.ValidationError):
                raise
            raise error from None


_decoder = msgspec.json.Decoder(_Entry)
_text_decoder = msgspec.json.Decoder(str)


class Answer:
    """An indexed answer; `ports.Renewal`. About 230 bytes of memory a file, and the body."""

    def __init__(self, body: Buffer, minted_at_s: float) -> None:
        """Indexes `body`, for a second where it is 100 MB: call it in a thread.

        Raises StoreUnavailableError when it is not the JSON that was asked for, or not all of it.
        """
        self.minted_at_s = minted_at_s
        self.files = 0
        self.skipped = 0
        """Entries that have no name, or fields of other types than documented."""
        self._body = body
        self._by_name: dict[int, int] = {}
        self._by_uri: dict[int, int] = {}
        self._groups: dict[str, list[int | str]] = {}
        """By input name: the input ids that its entries carry, and the positions of its groups, for entries that carry none."""
        self._index()

    def url_for(self, file: FileRef) -> str | None:
        """By (input id, name), then by the object's URI; of several entries the last one counts."""
        groups = reversed(self._groups.get(file.input_name, ()))
        for group in [file.input_id, *groups] if file.input_id else groups:
            entry = self._entry(self._by_name.get(hash((group, file.name))))
            belongs = entry is not None and (entry.input_id or None) in {None, file.input_id or entry.input_id}
            if entry is not None and belongs and entry.filename == file.name:
                return entry.url or None
        for uri in (file.uri, f"datum://{file.datum_id}" if file.datum_id else None):
            entry = self._entry(self._by_uri.get(hash(uri))) if uri else None
            if entry is not None and entry.original_uri == uri:
                return entry.url or None
        return None

    def _entry(self, offset: int | None) -> _Entry | None:
        match = None if offset is None else _ENTRY.match(self._body, offset)
        return _decode(match[0]) if match else None

    def _index(self) -> None:
        walk = _Walk(self._body)
        ids: dict[int, list[str]] = {}
        for group, offset, raw in walk.entries():
            try:
                entry = _decode(raw)
            except msgspec.ValidationError:
                self.skipped += 1
                continue
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise StoreUnavailableError(f"Valohai's answer is not JSON: {error}, in a file's entry") from None
            self.files += 1
            self._by_name[hash((entry.input_id or group, entry.filename))] = offset
            if entry.original_uri:
                self._by_uri[hash(entry.original_uri)] = offset
            known = ids.setdefault(group, [])
            if entry.input_id and entry.input_id not in known and len(known) < _IDS_PER_INPUT_MAX:
                known.append(entry.input_id)
        for group, name in enumerate(walk.names):
            self._groups.setdefault(name, []).extend((group, *ids.get(group, ())))


def open_body(descriptor: int) -> Buffer:
    """The whole file behind `descriptor` as something to index; the descriptor may be closed afterwards."""
    size = os.fstat(descriptor).st_size
    return mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else b""


# --- walking the body: [{"name": ..., "files": [{...}, ...], ...}, ...] ----------------------------------------------------


class _Walk:
    """One pass over a body. `at` is where it stands; `names` are those of the inputs ("groups") that it has passed."""

    def __init__(self, body: Buffer) -> None:
        self._body = body
        self._at = 3 if body[:3] == b"\xef\xbb\xbf" else 0
        self.names: list[str] = []

    def entries(self) -> Iterator[tuple[int, int, bytes]]:
        """(group, offset, raw JSON) of each file's entry. Raises StoreUnavailableError where the shape is another."""
        if self._mark(b"[{") != b"[":
            raise self._odd("it is not a list of inputs")
        mark = self._mark(b"{]")
        while mark == b"{":
            group = len(self.names)
            for offset, raw in self._group():
                yield group, offset, raw
            mark = self._mark(b",]")
            if mark == b",":
                mark = self._mark(b"{")
        if self._at < len(self._body):
            raise self._odd("something follows its end")

    def _group(self) -> Iterator[tuple[int, bytes]]:
        """An input's object, from behind its `{` to behind its `}`."""
        name = ""
        mark = self._mark(b"}") if self._next() == b"}" else b","
        while mark == b",":
            key = _text(self._taken(_KEY, "a key is missing")[1])
            if key == "files" and self._next() == b"[":
                yield from self._files()
            else:
                value = self._taken(_VALUE, "a value is missing or cut off")[0]
                if key == "name" and value[:1] == b'"':
                    name = _text(value)
            mark = self._mark(b",}")
        self.names.append(name)

    def _files(self) -> Iterator[tuple[int, bytes]]:
        """(offset, raw JSON) of each object in an array, from its `[` to behind its `]`."""
        self._mark(b"[")
        mark = self._mark(b"]") if self._next() == b"]" else b","
        while mark == b",":
            offset = self._at
            yield offset, self._taken(_ENTRY, "a file's entry is no object, or is cut off")[0]
            mark = self._mark(b",]")

    def _next(self) -> bytes:
        return self._body[self._at : self._at + 1]

    def _mark(self, among: bytes) -> bytes:
        mark: bytes = self._taken(_MARK, "it ends early or is malformed")[1]
        if mark not in among:
            raise self._odd("it is malformed")
        return mark

    def _taken(self, pattern: re.Pattern[bytes], otherwise: str) -> re.Match[bytes]:
        match = pattern.match(self._body, self._at)
        if match is None:
            raise self._odd(otherwise)
        self._at = match.end()
        return match

    def _odd(self, what: str) -> StoreUnavailableError:
        place = f"byte {self._at} of {len(self._body)}"
        return StoreUnavailableError(f"Valohai's answer is not understood: {what} ({place})")


def _text(raw: bytes) -> str:
    try:
        return _text_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise StoreUnavailableError("Valohai's answer is not understood: a malformed string") from None
