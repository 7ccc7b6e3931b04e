"""The near end of `probe_process`: touches a mount in another process, with a time-out for every step."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

PROGRAM = Path(__file__).with_name("probe_process.py")


class HangingError(AssertionError):
    """A step did not end in time: the one thing that a mount must never do."""


class Prober:
    """One process that opens and reads. A context manager; what it has open dies with it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._received = bytearray()

    @property
    def pid(self) -> int:
        """The process that waits for the mount."""
        return self._process.pid

    def ask(self, op: str, **arguments: Any) -> Any:
        """The value or the bytes of a step (see `probe_process.act`). Raises OSError with its errno; HangingError."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        deadline_s = time.monotonic() + self._timeout_s
        what = f"{op} {arguments}"
        while b"\n" not in self._received:
            self._receive(deadline_s, what)
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received[:] = rest
        answer = json.loads(line)
        if "errno" in answer:
            raise OSError(answer["errno"], what)
        if "bytes" not in answer:
            return answer["value"]
        size = answer["bytes"]
        while len(self._received) < size:
            self._receive(deadline_s, what)
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def _receive(self, deadline_s: float, what: str) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
        if not ready:
            self._process.kill()
            raise HangingError(f"no answer within {self._timeout_s:g} s: {what}")
        piece = self._process.stdout.read(1 << 20)
        assert piece, f"the probing process died: {what}"
        self._received += piece

    def close(self) -> None:
        """Ends the process; one that hangs in the kernel is left to whoever aborts the mount."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
