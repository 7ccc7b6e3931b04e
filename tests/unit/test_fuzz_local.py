"""Whatever stands in a cache file, or comes over the control socket: the right bytes or none, an answer or a refusal."""

# ruff: noqa: PT017 - both outcomes are right here, so pytest.raises, which demands one, does not fit

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.segment_paths import segment_path
from valohai_fuse.errors import UsageError, ValohaiFuseError
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, Extent
from valohai_fuse.obs import control
from valohai_fuse.obs.control_client import ask
from valohai_fuse.ports import NotHere, ObjectKey
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.segments import SegmentStore

KEY = ObjectKey("datum://fuzzed", 2 * BLOCK_BYTES + 777)
CONTENT = bytes(n % 251 for n in range(KEY.size))
WHOLE = Extent(0, KEY.size)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=segment.PAGE_BYTES + 10))
def test_any_bytes_as_a_segments_first_page(page: bytes) -> None:
    """A header or none, a table or an empty one."""
    header = segment.decode_header(page)
    assert header is None or isinstance(header.version, str)
    assert all(isinstance(entry, int) for entry in segment.decode_table(page.ljust(segment.PAGE_BYTES, b"\0")))


def read_whole(store: SegmentStore) -> bytes | None:
    """What the store gives of the object, waiting for the disk where it must."""

    async def read() -> bytes | None:
        found = await store.read(KEY, "v", WHOLE)
        return None if isinstance(found, NotHere) else bytes(found)

    return trio.run(read)


@pytest.mark.expect_warnings(".")
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_damage_to_a_segment(data: st.DataObject) -> None:
    """Bytes flipped, cut off, zeroed or replaced anywhere: the object's bytes, or absence."""
    with tempfile.TemporaryDirectory() as directory:
        first = SegmentStore(directory)
        path = segment_path(first, KEY, 0)
        with SegmentWriter(path, KEY, 0, "v") as writer:
            writer.land(0, CONTENT)
        first.close()
        raw = bytearray(Path(path).read_bytes())
        start = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, segment.PAGE_BYTES - 1), label="start")
        length = data.draw(st.integers(1, 2 * segment.PAGE_BYTES), label="length")
        kind = data.draw(st.sampled_from(["flip", "cut", "zero", "noise", "grow", "shift"]), label="kind")
        if kind == "flip":
            raw[start] ^= data.draw(st.integers(1, 255), label="bits")
        elif kind == "cut":
            del raw[start:]
        elif kind == "grow":
            raw += bytes(length)
        elif kind == "shift":
            del raw[start : start + length]
        else:
            stop = min(len(raw), start + length)
            raw[start:stop] = bytes(stop - start) if kind == "zero" else os.urandom(stop - start)
        Path(path).write_bytes(raw)
        store = SegmentStore(directory)
        try:
            found = read_whole(store)
            assert found is None or found == CONTENT
            with SegmentWriter(segment_path(store, KEY, 0), KEY, 0, "v") as writer:  # and it can be mended
                writer.land(0, CONTENT)
            assert read_whole(store) in {None, CONTENT}
        finally:
            store.close()


# --- the control socket -----------------------------------------------------------------------------------------------


async def _echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"path": str(request.get("path", ""))}


async def _fails(request: dict[str, Any]) -> dict[str, Any]:
    raise UsageError(f"no {request.get('path')} at https://h/x?token=S3CR3T")


HANDLERS = {"echo": _echo, "fails": _fails}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@settings(max_examples=66, deadline=None)
@given(
    st.binary()
    | anything.map(lambda value: json.dumps(value).encode())
    | st.builds(
        lambda op, path: json.dumps({"op": op, "path": path}).encode(),
        st.sampled_from([*HANDLERS, "x", 1, None]),
        anything,
    )
)
@example(b"[" * 900_000)
@example(b'{"op":' * 100_000)
@example(b'{"op":"echo","path":' + b"9" * 5000 + b"}")
@example(b'{"op":"echo","path":"\\ud800"}')
def test_any_line_to_the_control_socket(line: bytes) -> None:
    """One line of JSON comes back, and no secret in it."""

    async def answer() -> dict[str, Any]:
        return await control._answer(line.replace(b"\n", b" "), HANDLERS)

    said = trio.run(answer)
    assert json.loads(json.dumps(said)) is not None
    assert isinstance(said["ok"], bool)
    assert "S3CR3T" not in json.dumps(said)


@settings(max_examples=40, deadline=None)
@given(st.binary() | anything.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"ok": false, "error": "SystemExit"}')
@example(b'{"ok": false, "error": "ValohaiFuseError", "message": 3, "hint": []}')
@example(b"[1]")
def test_any_answer_of_a_daemon(raw: bytes) -> None:
    """Whoever asks is given fields, or an error of ours."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            thread = threading.Thread(target=_answer_once, args=(listener, raw.replace(b"\n", b" ") + b"\n"))
            thread.start()
            try:
                assert isinstance(ask(path, "status", timeout_s=5), dict)
            except ValohaiFuseError as error:
                assert isinstance(error.message, str)
            finally:
                thread.join()


def _answer_once(listener: socket.socket, raw: bytes) -> None:
    channel, _ = listener.accept()
    with channel:
        channel.recv(65536)
        channel.sendall(raw)
