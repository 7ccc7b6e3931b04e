"""Asks a running daemon something over its control socket. Synchronous and light: the command line and the supervisor use
it, and neither loads trio.

One request is one line of JSON, `{"op": "status", ...}`; so is the answer, `{"ok": true, ...}` or
`{"ok": false, "error": <class in errors.py>, "message": ..., "hint": ...}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from valohai_fuse import errors

ANSWER_BYTES_MAX = 64 * 1024 * 1024
_ADDRESS_BYTES_MAX = 100
"""A unix address holds 107 bytes (unix(7)); above this it is written through a descriptor of its directory."""


class NoAnswerError(errors.ValohaiFuseError):
    """Nobody listens at the socket, or no complete answer came in time. `refused`: nobody listens, so the daemon is gone."""

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


def ask(path: str, op: str, /, timeout_s: float = 5.0, **fields: Any) -> dict[str, Any]:
    """The daemon's answer to `op`, without its `ok`.

    Raises NoAnswerError, or the error the daemon answered with (as its class of `errors`, else ValohaiFuseError).
    """
    request = json.dumps({"op": op, **fields}).encode() + b"\n"
    try:
        raw = _exchange(path, request, timeout_s)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoAnswerError(f"no daemon listens at {path}", refused=True) from None
    except OSError as error:
        raise NoAnswerError(f"no answer from {path}: {error.strerror or error}", refused=False) from None
    try:
        answer = json.loads(raw)
        ok = answer.pop("ok")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise NoAnswerError(f"an answer from {path} that makes no sense", refused=False) from None
    if not ok:
        kind = getattr(errors, str(answer.get("error")), None)
        if not (isinstance(kind, type) and issubclass(kind, errors.ValohaiFuseError)):
            kind = errors.ValohaiFuseError
        raise kind(str(answer.get("message", "the daemon failed")), hint=answer.get("hint"))
    return dict(answer)


@contextlib.contextmanager
def address(path: str) -> Iterator[str]:
    """`path` in a form that fits a unix address, valid inside the block. Raises OSError when its directory is not there."""
    if len(os.fsencode(path)) <= _ADDRESS_BYTES_MAX:
        yield path
        return
    directory, name = os.path.split(path)
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def _exchange(path: str, request: bytes, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(timeout_s)
        with address(path) as where:
            channel.connect(where)
        channel.sendall(request)
        received = bytearray()
        while not received.endswith(b"\n"):
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = channel.recv(1 << 20)
            if not chunk:
                raise ConnectionResetError("it hung up")
            received += chunk
            if len(received) > ANSWER_BYTES_MAX:
                raise ConnectionAbortedError("its answer is too long")
        return bytes(received)
