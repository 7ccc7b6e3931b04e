"""What other programs, or a crash, may have left in the files between commands, and what a store says of a size: no traceback."""

# ruff: noqa: PT017 - both outcomes are right here, so pytest.raises, which demands one, does not fit

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from valohai_fuse.errors import StoreUnavailableError
from valohai_fuse.model.eviction import Budget
from valohai_fuse.obs.runtime_dir import RuntimeDir
from valohai_fuse.ports import FetchFailed, Lease, ObjectKey
from valohai_fuse.sources.size_probe import HttpSizeProbe
from valohai_fuse.sources.valohai_api import _Inflow, _said, _Spool, _TryAgain, _unpacked
from valohai_fuse.store.copies import Copy
from valohai_fuse.store.room import Room

SIZE = 100_000
CONTENT = bytes(n % 251 for n in range(SIZE))
DIGEST = xxhash.xxh3_64_hexdigest(CONTENT)
HEADER = json.dumps({"id": "datum:1", "size": SIZE, "version": "v"})
_HEX = st.text("0123456789abcdef", max_size=20)
_LINES = st.lists(st.one_of(st.text(max_size=30), st.builds("{} {}".format, _HEX, st.sampled_from([DIGEST, "0" * 16]))))


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.builds(lambda lines: "\n".join([HEADER, *lines]).encode(), _LINES)))
@example(b"[" * 100_000)
@example(f"{HEADER}\n{'f' * 40} {DIGEST}\n".encode())
@example(f"{HEADER}\n0 {DIGEST}\n".encode())
def test_any_journal_of_a_download(journal: bytes) -> None:
    """Only a piece whose bytes are those that the journal names is done; everything else is fetched again."""
    with tempfile.TemporaryDirectory() as directory:
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            copy = Copy(ObjectKey("datum:1", SIZE), "a.bin", top, directory)
            Path(copy.part_path).write_bytes(CONTENT)
            Path(copy.part_path).with_suffix(".journal").write_bytes(journal)
            missing = copy.missing()
        finally:
            os.close(top)
    confirmed = DIGEST.encode() in journal and HEADER.encode() in journal
    assert len(missing) == 1 or (missing == [] and confirmed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("abc019-_.", min_size=1, max_size=12), st.binary(max_size=80)), max_size=4))
def test_any_record_of_another_process_in_the_cache(others: list[tuple[str, bytes]]) -> None:
    """Records of a cache's other users are numbers or nothing, and those of the dead go."""
    with tempfile.TemporaryDirectory() as directory:
        shares = Path(directory, "v1", "shares")
        shares.mkdir(parents=True)
        for name, content in others:
            if set(name) != {"."}:
                (shares / name).write_bytes(content)
        room = Room(directory, Budget(bytes_max=1000))
        try:
            room.measured(room.records_now(), room.records_now(), 0)
            room.beat()
            assert room.records_now()
        finally:
            room.close()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"id":"x","mountpoint":1e999}')
def test_any_record_of_a_mount(content: bytes) -> None:
    """A runtime directory may hold anything: what is no record is none."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "x.json").write_bytes(content)
        assert all(isinstance(record.mountpoint, str) for record in RuntimeDir(directory).records())


class _Body(httpx.AsyncByteStream):
    """A body that comes from a wire."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data


_RANGES = st.one_of(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    st.builds("bytes {}/{}".format, st.sampled_from(["0-0", "*", "0-5", "-1"]), st.integers(-9, 2**70)),
    st.just("bytes 0-0/" + "9" * 5000),
)


@settings(max_examples=150, deadline=None)
@given(
    status=st.sampled_from([200, 204, 206, 301, 304, 307, 400, 403, 404, 416, 429, 500, 599]),
    content_range=_RANGES,
    more=st.dictionaries(
        st.sampled_from(
            ["content-length", "content-encoding", "content-type", "etag", "location", "retry-after", "date"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30),
        max_size=4,
    ),
    body=st.binary(max_size=100),
)
def test_any_answer_about_a_size(status: int, content_range: str, more: dict[str, str], body: bytes) -> None:
    """A size from 0 to 2^63 - 1, or FetchFailed without a secret."""

    async def answer(_: httpx.Request) -> httpx.Response:
        headers = [(key.encode(), value.encode("latin-1")) for key, value in more.items()]
        return httpx.Response(
            status, headers=[*headers, (b"content-range", content_range.encode())], stream=_Body(body)
        )

    async def probed() -> int:
        async with HttpSizeProbe(clock=lambda: 0.0, connect_timeout_s=1, answer_timeout_s=1) as probe:
            await probe._client.aclose()
            probe._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), follow_redirects=False)
            return await probe.size(Lease("http://127.0.0.1:1/x?sig=SECRET"))

    try:
        assert 0 <= trio.run(probed) < 2**63
    except FetchFailed as failed:
        assert "SECRET" not in str(failed)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
@example(b"[" * 100_000)
@example(b"\x1f\x8b\x08" + bytes(50))
def test_any_body_of_the_api(body: bytes) -> None:
    """An error's words are a text; what is packed unpacks, or is asked for again."""
    assert isinstance(_said(body), str)
    assert isinstance(_unpacked(body, "gzip"), bytes)
    spool = _Spool(None)
    try:
        inflow = _Inflow(httpx.Response(200, headers={"content-encoding": "gzip"}), spool)
        trio.run(inflow.take, body)
        inflow.finish()
        assert len(spool.body()) >= 0
    except (_TryAgain, StoreUnavailableError):
        pass
    finally:
        spool.close()


@pytest.mark.parametrize("body", [b"\xff", b'{"detail": {"a": 1}}', b'{"message": [1, 2]}', b'"x"', b"1e400"])
def test_words_that_are_none(body: bytes) -> None:
    """Only texts are shown."""
    assert _said(body) == ("" if body != b'"x"' else "x")
