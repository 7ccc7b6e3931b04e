"""The control socket of a daemon: status, info and unmount for whoever owns the mount (unix socket, 0600).

Serves JSON lines (format: `control_client`). Bounded in every direction: clients at a time, bytes of a request, seconds
for an answer and a silence. A client that sends nonsense, reads nothing or goes away hurts itself only; a handler that
raises is one `ok: false`, and its secrets are cut.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from valohai_fuse.errors import ValohaiFuseError
from valohai_fuse.obs.control_client import NoAnswerError, address, ask
from valohai_fuse.obs.redaction import redact

__all__ = ["Handler", "NoAnswerError", "ask", "serve"]

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Gets the request (with its `op`), returns the fields of the answer; may raise any ValohaiFuseError."""

REQUEST_BYTES_MAX = 1024 * 1024
CLIENTS_MAX = 32
IDLE_S = 30.0
ANSWER_S = 120.0

_log = logging.getLogger(__name__)


async def serve(
    path: str,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listens at `path` until cancelled; reports started when a client can connect.

    Removes a stale socket first, and its own at the end.

    Raises OSError when the socket cannot be made there.
    """
    listener = await _listen(path)
    limit = trio.CapacityLimiter(CLIENTS_MAX)
    identity = os.stat(path).st_ino
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    _log.warning("the control socket cannot accept a client: %s", error.strerror)
                    await trio.sleep(0.1)  # out of descriptors, most likely; they come back
                    continue
                nursery.start_soon(_converse, stream, handlers, limit)
    finally:
        listener.socket.close()
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == identity:
                os.unlink(path)


async def _listen(path: str) -> trio.SocketListener:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    channel = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        with address(path) as where:
            await channel.bind(where)
        os.chmod(path, 0o600)
        channel.listen(CLIENTS_MAX)
        return trio.SocketListener(channel)
    except BaseException:
        channel.close()
        raise


async def _converse(stream: trio.SocketStream, handlers: Mapping[str, Handler], limit: trio.CapacityLimiter) -> None:
    async with stream, limit:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pending = bytearray()
            while (line := await _next_line(stream, pending)) is not None:
                answer = await _answer(line, handlers)
                with trio.fail_after(ANSWER_S):
                    await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _next_line(stream: trio.SocketStream, pending: bytearray) -> bytes | None:
    """The next request; None when the client is done or breaks a limit."""
    with trio.move_on_after(IDLE_S):
        while (end := pending.find(b"\n")) < 0:
            if len(pending) > REQUEST_BYTES_MAX:
                return None
            chunk = await stream.receive_some(65536)
            if not chunk:
                return None
            pending += chunk
        line = bytes(pending[:end])
        del pending[: end + 1]
        return line
    return None


async def _answer(line: bytes, handlers: Mapping[str, Handler]) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return _refusal("UsageError", "not a line of JSON")
    handler = handlers.get(str(request.get("op"))) if isinstance(request, dict) else None
    if handler is None:
        return _refusal("UsageError", f"an unknown request; known are {', '.join(sorted(handlers))}")
    try:
        with trio.fail_after(ANSWER_S):
            return {"ok": True, **await handler(request)}
    except trio.TooSlowError:
        return _refusal("DeadlineExceededError", f"no answer within {ANSWER_S:.0f} s")
    except ValohaiFuseError as error:
        return _refusal(type(error).__name__, error.message, error.hint)
    except Exception as error:  # noqa: BLE001 - the edge: a bug in a handler is one refused request, told in the log
        _log.exception("the control request %r failed", request.get("op"))
        return _refusal("ValohaiFuseError", f"internal: {type(error).__name__}: {error}")


def _refusal(kind: str, message: str, hint: str | None = None) -> dict[str, Any]:
    return {"ok": False, "error": kind, "message": redact(message), "hint": hint}
