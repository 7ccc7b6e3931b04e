"""Reads inputs.json (inputs.yaml where there is no JSON) from the configuration directory.

The file is copied once into a private, unlinked *spool* and decoded from a map of that copy: whoever rewrites or truncates
the original later changes nothing here and cannot make a mapped read fail, and 700 MB of JSON pass through the page cache
instead of this process's own memory. Of the spool only the inputs asked for are kept, for `Manifest.record`.

YAML is turned into JSON first (`manifest_yaml`), so that there is one path of decoding, checking and messages.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap

import msgspec

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.model import manifest_json
from valohai_fuse.model.manifest import ON_DEMAND, SIZE_BYTES_MAX, Manifest
from valohai_fuse.model.manifest_json import InputPart
from valohai_fuse.sources import manifest_yaml

_BOM = b"\xef\xbb\xbf"
_COPY_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class InputSummary:
    """One input at a glance, for deciding what to mount."""

    name: str
    input_id: str | None
    files: int
    on_demand_files: int
    """Those that say `on-demand`; a file that says nothing was written by a Valohai that downloads everything."""
    bytes_known: int
    """Sum of the sizes that are known."""


def load(config_dir: str, inputs: Sequence[str] | None = None, *, spool_dir: str | None = None) -> Manifest:
    """The manifest of the inputs named (None: of all), in the order of the file. Close it when it is no longer needed.

    `spool_dir` is where the private copy goes, by default the system's directory for temporary files; memory is used where
    neither can be written. Raises ConfigurationError (missing, unreadable, not JSON or YAML, wrong shape; names file and
    JSON path) and UsageError (no such input).
    """
    source = _read_source(config_dir, spool_dir)
    parts = manifest_json.split(source.data, origin=source.origin, wanted=inputs)
    origin, mtime_ns = source.origin, source.mtime_ns
    spool_fd = _spool(lambda: (memoryview(part.files) for part in parts), spool_dir)
    try:
        data = _mapped(spool_fd)
        starts = _moved(parts, data)
        del source  # and with it the map of the whole file: its pages are not needed beside those of the spool
        return manifest_json.assemble(
            starts,
            data,
            origin=origin,
            mtime_ns=mtime_ns,
            read=lambda start, length: os.pread(spool_fd, length, start),
            close=lambda: os.close(spool_fd),
        )
    except BaseException:
        os.close(spool_fd)
        raise


def list_inputs(config_dir: str, inputs: Sequence[str] | None = None) -> list[InputSummary]:
    """The inputs named (None: all) with their numbers of files, in the order of the file.

    Checks the shape, sizes and intents, no names. Raises as `load` does.
    """
    source = _read_source(config_dir, None)
    parts = manifest_json.split(source.data, origin=source.origin, wanted=inputs)
    return [_summary(part, source.origin) for part in parts]


def _moved(parts: list[InputPart], data: bytes | mmap) -> list[tuple[InputPart, int]]:
    """The parts as views into the spool, where they stand one after another, and where each begins."""
    view, starts, start = memoryview(data), [], 0
    for part in parts:
        stop = start + len(memoryview(part.files))
        part.files = msgspec.Raw(view[start:stop])
        starts.append((part, start))
        start = stop
    return starts


class _Brief(msgspec.Struct, gc=False):
    size: int | float | None = None
    download_intent: str | None = None


_decode_brief = msgspec.json.Decoder(_Brief).decode
_decode_briefs = msgspec.json.Decoder(list[_Brief]).decode


def _summary(part: InputPart, origin: str) -> InputSummary:
    try:
        files = _decode_briefs(part.files)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        files = _briefs_one_by_one(part, origin)
    return InputSummary(
        name=part.name,
        input_id=part.input_id,
        files=len(files),
        on_demand_files=sum(file.download_intent == ON_DEMAND for file in files),
        bytes_known=sum(int(file.size) for file in files if file.size and 0 < file.size <= SIZE_BYTES_MAX),
    )


def _briefs_one_by_one(part: InputPart, origin: str) -> list[_Brief]:
    """Raises what is wrong with the path of the file that it is wrong with, which the decoder of a list does not say."""
    briefs = []
    for position, raw in enumerate(manifest_json.files_of(part, origin=origin)):
        try:
            briefs.append(_decode_brief(raw))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise manifest_json.invalid(
                origin, f"{manifest_json.json_path(part.name)}.files[{position}]", error
            ) from None
    return briefs


# --- the source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    origin: str
    data: bytes | mmap
    """All of the file as JSON, without a byte order mark; of a private copy."""
    mtime_ns: int


def _read_source(config_dir: str, spool_dir: str | None) -> _Source:
    origin, fd = _open_first(config_dir)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"{origin}: not a regular file")
        if origin.endswith(".yaml"):
            return _Source(origin, manifest_yaml.to_json(b"".join(_chunks(fd)), origin), status.st_mtime_ns)
        copy_fd = _spool(lambda: _chunks(fd), spool_dir)
        try:
            return _Source(origin, _mapped(copy_fd), status.st_mtime_ns)
        finally:
            os.close(copy_fd)  # the map keeps the copy alive
    except OSError as error:
        raise ConfigurationError(f"{origin}: cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def _open_first(config_dir: str) -> tuple[str, int]:
    """The path and an open descriptor of inputs.json, else of inputs.yaml."""
    for name in ("inputs.json", "inputs.yaml"):
        path = os.path.join(config_dir, name)
        try:
            # O_NONBLOCK: a FIFO of that name must not hang the mount; it changes nothing for a file.
            return path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    raise ConfigurationError(
        f"{os.path.join(config_dir, 'inputs.json')}: no such file, and no inputs.yaml beside it",
        hint="Valohai writes it when an execution starts; elsewhere, name its directory with --config-dir",
    )


# --- the spool --------------------------------------------------------------------------------------------------------


def _chunks(fd: int) -> Iterator[bytes]:
    offset = 0
    while chunk := os.pread(fd, _COPY_BYTES, offset):
        yield chunk.removeprefix(_BOM) if offset == 0 else chunk
        offset += len(chunk)


def _spool(chunks: Callable[[], Iterable[bytes | memoryview]], spool_dir: str | None) -> int:
    """A descriptor of a nameless private file with the chunks in it: on disk, in memory where the disk refuses."""
    try:
        with tempfile.TemporaryFile(dir=spool_dir, buffering=0) as file:
            _write_all(file.fileno(), chunks())
            return os.dup(file.fileno())
    except OSError:
        fd = os.memfd_create("valohai-fuse-inputs", os.MFD_CLOEXEC)
        try:
            _write_all(fd, chunks())
        except BaseException:
            os.close(fd)
            raise
        return fd


def _write_all(fd: int, chunks: Iterable[bytes | memoryview]) -> None:
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(fd, rest) :]


def _mapped(fd: int) -> bytes | mmap:
    """The content of a spool. No one else can truncate it, so a read of the map cannot fail."""
    length = os.fstat(fd).st_size
    return mmap(fd, length, access=ACCESS_READ) if length else b""
