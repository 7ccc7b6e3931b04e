"""The control socket: answers, refuses, and survives its clients."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from valohai_fuse.errors import MountFailedError, ValohaiFuseError
from valohai_fuse.obs import control
from valohai_fuse.obs.control_client import NoAnswerError, ask
from valohai_fuse.obs.metrics import COUNTERS, GAUGES, Counts, hit_rate


async def _status(request: dict[str, Any]) -> dict[str, Any]:
    return {"files": 3, "asked": request.get("extra")}


async def _refuse(_request: dict[str, Any]) -> dict[str, Any]:
    raise MountFailedError("busy", hint="wait")


async def _broken(_request: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("https://h/p?sig=abc")


HANDLERS = {"status": _status, "refuse": _refuse, "broken": _broken}


def _with_server(path: str, client: Callable[[], None]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(control.serve, path, HANDLERS)
            await trio.to_thread.run_sync(client)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_question_is_answered_and_the_socket_is_the_owners_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    def client() -> None:
        assert ask(path, "status", extra=[1, "é"]) == {"files": 3, "asked": [1, "é"]}
        assert os.stat(path).st_mode & 0o777 == 0o600

    _with_server(path, client)
    assert not os.path.exists(path)


@pytest.mark.expect_warnings("the control request 'broken' failed")
def test_errors_come_back_as_their_class_and_bugs_without_secrets(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    def client() -> None:
        with pytest.raises(MountFailedError, match="busy") as caught:
            ask(path, "refuse")
        assert caught.value.hint == "wait"
        with pytest.raises(ValohaiFuseError, match=r"internal: RuntimeError: https://h/p\?\*\*\*$"):
            ask(path, "broken")
        with pytest.raises(ValohaiFuseError, match="unknown request; known are broken, refuse, status"):
            ask(path, "nonsense")

    _with_server(path, client)


@pytest.mark.parametrize(
    "sent", [b"\n", b"[]\n", b"{\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"x" * (control.REQUEST_BYTES_MAX + 70_000)]
)
def test_a_bad_client_hurts_itself_only(tmp_path: Path, sent: bytes) -> None:
    path = str(tmp_path / "s")

    def client() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
            bad.connect(path)
            try:
                bad.sendall(sent)
                reply = bad.recv(65536)
            except (BrokenPipeError, ConnectionResetError):
                reply = b""
            assert reply == b"" or b'"ok": false' in reply
            assert ask(path, "status")["files"] == 3

    _with_server(path, client)


def test_several_questions_on_one_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    def client() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(path)
            channel.sendall(b'{"op": "status"}\n{"op": "status"}\n')
            with channel.makefile("rb") as answers:
                assert answers.readline() == answers.readline() != b""

    _with_server(path, client)


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(path)
    with pytest.raises(NoAnswerError) as caught:
        ask(path, "status")
    assert caught.value.refused
    _with_server(path, lambda: None if ask(path, "status") else pytest.fail("no answer"))


def test_a_daemon_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(path)
        mute.listen()
        with pytest.raises(NoAnswerError) as caught:
            ask(path, "status", timeout_s=0.05)
    assert not caught.value.refused


def test_counts_start_at_zero_add_up_and_never_raise() -> None:
    counts = Counts()
    assert counts.snapshot() == dict.fromkeys([*COUNTERS, *GAUGES], 0)
    counts.count("reads")
    counts.count("read_bytes", 10)
    counts.gauge("open_files", 2)
    counts.count("never heard of")
    taken = counts.snapshot()
    counts.count("reads")
    assert (taken["reads"], taken["read_bytes"], taken["open_files"], taken["never heard of"]) == (1, 10, 2, 1)


def test_the_hit_rate_is_unknown_before_the_first_read() -> None:
    assert hit_rate({}) is None
    assert hit_rate({"hit_bytes": 3, "miss_bytes": 1}) == 0.75
