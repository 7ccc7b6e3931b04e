"""Ordinary files made out of verified pieces: what `download` writes. One `Copy` is one file on its way.

A file is written under a private name in a *partial* directory beside the target and renamed into place when all of it is there, so
that a name which exists is a file which is complete. The journal beside it says which pieces have been written, each with the
xxh3 of its bytes: whoever goes on later believes a line of it only when the bytes on the disk agree, so neither a kill nor a
power cut needs an fsync here. The journal is bound to the object's version; pieces of two versions never meet in one file.

Names come from the manifest and are safe (`model.names`); the directories below the target are walked without following links,
so that a link which somebody put there leads nowhere. Everything here blocks: call it in threads, one thread per piece.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
from dataclasses import dataclass, field
from typing import Final

import xxhash

from valohai_fuse.model.extents import SEGMENT_BYTES, Extent, split_by_segment
from valohai_fuse.model.segment import object_digest
from valohai_fuse.ports import ObjectKey, Version

CHECKSUMS: Final = ("sha512", "sha256", "sha1", "md5")
"""The strongest that the manifest gives is the one that is verified."""
_HASHED_BYTES: Final = 4 * 1024 * 1024
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class InTheWayError(Exception):
    """The target name is taken by something else; `args[0]` says by what."""


class ChecksumError(Exception):
    """The complete file is not what the manifest says; `args[0]` names the algorithm."""


class OtherVersionError(Exception):
    """A piece is of another version of the object than those before it."""


@dataclass(slots=True)
class Copy:
    """One file. `path` is relative to `target_fd`, a descriptor of the target directory; `partial_dir` is on its file system."""

    key: ObjectKey
    path: str
    target_fd: int
    partial_dir: str
    _version: Version | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def _name(self) -> str:
        return os.path.join(
            self.partial_dir, object_digest(self.key.stable_id + "\0" + self.path, self.key.size).hex()[:40]
        )

    @property
    def part_path(self) -> str:
        """The file while it grows."""
        return self._name + ".part"

    @property
    def _journal_path(self) -> str:
        return self._name + ".journal"

    # --- what is there ------------------------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Whether the target is there with the right size. Raises InTheWayError when something else is there, OSError."""
        directory, _, name = self.path.rpartition("/")
        try:
            parent = _walk(self.target_fd, directory, make=False)
        except FileNotFoundError:
            return False
        try:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        finally:
            os.close(parent)
        if not stat.S_ISREG(found.st_mode):
            raise InTheWayError("something that is not a file is there already")
        if found.st_size != self.key.size:
            raise InTheWayError(f"a file of {found.st_size} bytes is there already, the object has {self.key.size}")
        return True

    def missing_unless_complete(self) -> list[Extent] | None:
        """None for a file that is complete, else `missing`. Raises as `is_complete` does."""
        return None if self.is_complete() else self.missing()

    def missing(self) -> list[Extent]:
        """The pieces that are still to be written; those that the journal names and the bytes confirm are not."""
        done = self._confirmed()
        return [
            piece for piece in split_by_segment(Extent(0, self.key.size)) if piece.start // SEGMENT_BYTES not in done
        ]

    def _confirmed(self) -> set[int]:
        try:
            with open(self._journal_path, encoding="ascii") as file:
                header, *lines = file.read().split("\n")
            said = json.loads(header)
            if said["id"] != self.key.stable_id or said["size"] != self.key.size:
                return set()
            self._version = str(said["version"])
            with open(self.part_path, "rb", buffering=0) as part:
                return {
                    int(index, 16)
                    for index, digest in _entries(lines)
                    if self._piece_digest(part.fileno(), index) == digest
                }
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            self._version = None
            return set()

    def _piece_digest(self, part: int, index: str) -> str:
        start = int(index, 16) * SEGMENT_BYTES
        if start >= self.key.size:
            return ""
        length = min(SEGMENT_BYTES, self.key.size - start)
        data = os.pread(part, length, start)
        return xxhash.xxh3_64_hexdigest(data) if len(data) == length else ""

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, piece: Extent, data: bytes | bytearray | memoryview, version: Version) -> None:
        """Writes one piece and notes it. Raises OtherVersionError, OSError."""
        with self._lock:
            if self._version is None:
                self._begin(version)
            elif self._version != version:
                raise OtherVersionError
        part = os.open(self.part_path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            rest, offset = memoryview(data), piece.start
            while rest:
                written = os.pwrite(part, rest, offset)
                rest, offset = rest[written:], offset + written
        finally:
            os.close(part)
        if self.key.size > SEGMENT_BYTES:  # a file of one piece has nothing to go on from
            self._note(f"{piece.start // SEGMENT_BYTES:x} {xxhash.xxh3_64_hexdigest(data)}\n", os.O_APPEND)

    def _begin(self, version: Version) -> None:
        """Starts anew, under this version."""
        self.discard()
        if self.key.size > SEGMENT_BYTES:
            header = json.dumps({"id": self.key.stable_id, "size": self.key.size, "version": version})
            self._note(header + "\n", os.O_CREAT | os.O_EXCL)
        self._version = version

    def _note(self, line: str, flags: int) -> None:
        journal = os.open(self._journal_path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
        try:
            os.write(journal, line.encode("ascii"))
        finally:
            os.close(journal)

    def discard(self) -> None:
        """Removes what was written so far."""
        self._version = None
        for path in (self.part_path, self._journal_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def complete(self, checksums: dict[str, str], mtime_ns: int) -> None:
        """All pieces are written: verifies the whole where there is a checksum, and gives the file its name.

        Raises ChecksumError (what was written is removed then), InTheWayError, OSError.
        """
        part = os.open(self.part_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(part, self.key.size)
            wrong = _mismatch(part, checksums)
            if wrong is not None:
                self.discard()
                raise ChecksumError(wrong)
            os.fchmod(part, 0o644)
            os.utime(part, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(part)
        directory, _, name = self.path.rpartition("/")
        parent = _walk(self.target_fd, directory, make=True)
        try:
            if not self.is_complete():
                os.rename(self.part_path, name, dst_dir_fd=parent)
        finally:
            os.close(parent)
        self.discard()


def _entries(lines: list[str]) -> list[tuple[str, str]]:
    """Index and digest of each whole line; one that a kill has cut is left out."""
    split = [line.split(" ") for line in lines]
    return [
        (entry[0], entry[1]) for entry in split if len(entry) == 2 and len(entry[1]) == 16 and int(entry[0], 16) >= 0
    ]


def _walk(top_fd: int, path: str, *, make: bool) -> int:
    """A descriptor of the directory `path` below `top_fd`; no link is followed. Raises InTheWayError, OSError."""
    here = os.dup(top_fd)
    for component in filter(None, path.split("/")):
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(component, 0o755, dir_fd=here)
            below = os.open(component, _DIRECTORY, dir_fd=here)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR}:
                raise InTheWayError(f"{component} is not a directory") from None
            raise
        finally:
            os.close(here)
        here = below
    return here


def _mismatch(part: int, checksums: dict[str, str]) -> str | None:
    """The algorithm whose digest is not what it should be; None when it is, or when there is none to compare."""
    algorithm = next((name for name in CHECKSUMS if checksums.get(name)), None)
    if algorithm is None:
        return None
    digest, offset = hashlib.new(algorithm, usedforsecurity=False), 0
    while data := os.pread(part, _HASHED_BYTES, offset):
        digest.update(data)
        offset += len(data)
    return None if digest.hexdigest() == checksums[algorithm].strip().lower() else algorithm
