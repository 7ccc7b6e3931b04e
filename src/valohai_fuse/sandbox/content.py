"""What an object of the sandbox holds: bytes in memory, a file, or bytes that are computed when they are asked for.

Decides how a range of an object becomes memoryviews that a socket can send. Invariants: `slices(start, stop)` yields
exactly `stop - start` bytes whatever the cut, and two calls for the same bytes give the same bytes. Generated contents
are never materialised, so an object of 500 GB costs nothing. Knows nothing of names, HTTP or signatures.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

SLICE_BYTES = 256 * 1024
"""At most so many bytes go to a socket at once: large enough for > 1 GB/s, small enough that counts stay near the truth."""

RAMP_MODULUS = 251
"""Prime, so that a shift by any power of two shows."""

_RAMP = memoryview(bytes(range(RAMP_MODULUS)) * (SLICE_BYTES // RAMP_MODULUS + 2))


class Content(Protocol):
    """The bytes of one version of one object."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        ...

    @property
    def version(self) -> str:
        """The ETag without its quotes; differs where bytes differ."""
        ...

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes [start, stop), 0 <= start <= stop <= size, in pieces of at most SLICE_BYTES. Any thread."""
        ...


@dataclass(frozen=True, slots=True)
class InMemory:
    """Bytes that are simply there."""

    data: bytes = field(repr=False)
    version: str = ""

    def __post_init__(self) -> None:
        if not self.version:
            object.__setattr__(self, "version", hashlib.md5(self.data, usedforsecurity=False).hexdigest())

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.data)

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """See Content."""
        view = memoryview(self.data)
        for at in range(start, stop, SLICE_BYTES):
            yield view[at : min(at + SLICE_BYTES, stop)]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """The bytes of a file, which must not change while the sandbox runs."""

    path: str
    size: int = -1
    version: str = ""

    def __post_init__(self) -> None:
        status = os.stat(self.path)
        object.__setattr__(self, "size", status.st_size)
        object.__setattr__(self, "version", f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}")

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """See Content."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while start < stop:
                data = os.pread(descriptor, min(SLICE_BYTES, stop - start), start)
                if not data:
                    raise OSError(f"{self.path} shrank while it was served")
                yield memoryview(data)
                start += len(data)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Ramp:
    """Byte at absolute offset o is (o + shift) modulo 251; nothing is held, whatever the size."""

    size: int
    shift: int = 0

    @property
    def version(self) -> str:
        """Depends on size and shift alone, as equal objects have equal ETags."""
        return hashlib.md5(f"ramp {self.size} {self.shift}".encode(), usedforsecurity=False).hexdigest()

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """See Content."""
        while start < stop:
            phase = (start + self.shift) % RAMP_MODULUS
            length = min(SLICE_BYTES, stop - start)
            yield _RAMP[phase : phase + length]
            start += length


@dataclass(frozen=True, slots=True)
class Rows:
    """A text of lines of one width: `row(i)` computes line i, so that any range is at hand without the rest."""

    header: bytes
    row: Callable[[int], bytes] = field(repr=False)
    row_bytes: int
    rows: int
    seed: str = "rows"

    @property
    def size(self) -> int:
        """Bytes in all, header included."""
        return len(self.header) + self.rows * self.row_bytes

    @property
    def version(self) -> str:
        """Stands for the generator, its seed and the number of rows."""
        return hashlib.md5(f"{self.seed} {self.rows} {self.row_bytes}".encode(), usedforsecurity=False).hexdigest()

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """See Content."""
        if start < len(self.header) and start < stop:
            head = self.header[start:stop]
            yield memoryview(head)
            start += len(head)
        batch_rows = max(1, SLICE_BYTES // self.row_bytes - 1)
        while start < stop:
            first, skip = divmod(start - len(self.header), self.row_bytes)
            last = min(first + batch_rows, self.rows)
            text = b"".join([self.row(index) for index in range(first, last)])
            piece = text[skip : skip + stop - start]
            yield memoryview(piece)
            start += len(piece)


def ramp(size: int) -> Ramp:
    """An object of `size` bytes, byte o being o modulo 251."""
    return Ramp(size)


def as_content(source: bytes | bytearray | str | os.PathLike[str] | Content) -> Content:
    """Bytes as they are, a str or path as the file it names, a Content as it is. Raises OSError for a file not there."""
    if isinstance(source, (bytes, bytearray)):
        return InMemory(bytes(source))
    if isinstance(source, (str, os.PathLike)):
        return OnDisk(os.fspath(source))
    return source


def read_all(content: Content, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes [start, stop) in one piece, cut at the end of the object as a read of a file is."""
    stop = content.size if stop is None else min(stop, content.size)
    return b"".join(content.slices(min(start, stop), stop))
