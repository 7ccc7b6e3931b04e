"""Readers as processes of their own, so that a read that hangs cannot hang the test, kept so that a hundred reads are cheap.

`ReaderProcess.read(path, extents)` opens the file and preads each extent; what came is told as a digest, or the errno as an
outcome. A reader that does not answer in time is killed and replaced; the test fails with TimeoutError.
"""

from __future__ import annotations

import hashlib
import json
import queue
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

_PROGRAM = r"""
import hashlib, json, os, sys, time
for line in sys.stdin:
    path, extents = json.loads(line)
    digest, number, began = hashlib.blake2b(), 0, time.monotonic()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if extents is None:
                extents = [(0, os.fstat(descriptor).st_size)]
            for start, stop in extents:
                while start < stop:
                    data = os.pread(descriptor, min(stop - start, 1 << 20), start)
                    if not data:
                        break
                    digest.update(data)
                    start += len(data)
        finally:
            os.close(descriptor)
    except OSError as error:
        number = error.errno
    print(json.dumps([number, digest.hexdigest(), time.monotonic() - began]), flush=True)
"""

Extents = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ReadOutcome:
    """`errno` 0: all of it was read, and `digest` says what it was."""

    errno: int
    digest: str
    took_s: float


def digest_of(*pieces: bytes) -> str:
    """What the digest of a read that gives these bytes is."""
    return hashlib.blake2b(b"".join(pieces)).hexdigest()


class ReaderProcess:
    """One process, one read at a time; see the module's text."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def read(self, path: object, extents: Extents | None, timeout_s: float) -> ReadOutcome:
        """The whole file where `extents` is None. Raises TimeoutError (the reader is gone then)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(path), extents]).encode() + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            self._process.kill()
            raise TimeoutError(f"reading {path} did not end within {timeout_s} s")
        number, digest, took_s = json.loads(self._process.stdout.readline())
        return ReadOutcome(number, digest, took_s)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)


class Readers:
    """Any number of threads read through at most as many processes at a time as there are threads; a context manager."""

    def __init__(self) -> None:
        self._idle: queue.SimpleQueue[ReaderProcess] = queue.SimpleQueue()
        self._all: list[ReaderProcess] = []

    def read(self, path: object, extents: Extents | None = None, timeout_s: float = 30.0) -> ReadOutcome:
        """As `ReaderProcess.read`."""
        try:
            reader = self._idle.get_nowait()
        except queue.Empty:
            reader = ReaderProcess()
            self._all.append(reader)
        outcome = reader.read(path, extents, timeout_s)
        self._idle.put(reader)
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._all:
            reader.close()
