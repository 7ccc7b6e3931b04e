"""`fetch.framing`: where an answer ends, in whatever pieces it comes, and what is no answer."""

from __future__ import annotations

import random

import pytest

from valohai_fuse.fetch.framing import HEAD_BYTES_MAX, Answer
from valohai_fuse.fetch.response import Rejected
from valohai_fuse.ports import FailureKind

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 206 Because\r\nContent-Length: 5\r\n\r\n"


def feed(raw: bytes, *cuts: int, closed: bool = False) -> tuple[Answer, bytes]:
    """The answer fed with `raw`, cut at `cuts`, and its body; `closed`: then the connection is."""
    answer, body = Answer(), b""
    for start, stop in zip((0, *cuts), (*cuts, len(raw)), strict=True):
        if start < stop and not answer.ended:
            body += b"".join(answer.feed(memoryview(raw)[start:stop]))
    if closed:
        answer.end()
    return answer, body


GOOD = {
    "sized": (SIZED + b"12345", b"12345", True),
    "sized, HTTP/1.0": (SIZED.replace(b"1.1", b"1.0") + b"12345", b"12345", False),
    "sized, HTTP/1.0, kept": (SIZED.replace(b"1.1 206 Because", b"1.0 206\r\nconnection: Keep-Alive") + b"12345", b"12345", True),
    "sized, closing": (SIZED.replace(b"Con", b"Connection: foo, Close\r\nCon") + b"12345", b"12345", False),
    "twice the same length": (SIZED.replace(b"Con", b"content-length: 5\r\nCon") + b"12345", b"12345", True),
    "bare line feeds": (SIZED.replace(b"\r", b"") + b"12345", b"12345", True),
    "folded": (SIZED.replace(b"Content-Length: ", b"X: a\r\n\tb\r\nContent-Length:\r\n ") + b"12345", b"12345", True),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "no body whatever it says": (SIZED.replace(b"206", b"304"), b"", True),
    "empty body": (SIZED.replace(b"5", b"0"), b"", True),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + SIZED + b"12345", b"12345", True),
    "chunks": (CHUNKED + b"3\r\nabc\r\n0a;x=y\r\n0123456789\r\n0\r\n\r\n", b"abc0123456789", True),
    "chunks and trailers": (CHUNKED + b"1 \r\n\n\r\n0\r\nX: y\r\n\r\n", b"\n", True),
    "chunks and a length": (CHUNKED.replace(b"Tr", b"Content-Length: 7\r\nTr") + b"1\nx\n0\n\n", b"x", False),
    "no chunk": (CHUNKED + b"0\r\n\r\n", b"", True),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "body", "keeps"), GOOD.values(), ids=GOOD)
def test_an_answer_has_the_same_end_however_it_is_cut(raw: bytes, body: bytes, keeps: bool) -> None:
    """Whole, in two pieces wherever they meet, byte by byte: the same body, and not ended a byte before its end."""
    for cuts in [(), *((at,) for at in range(1, len(raw))), tuple(range(1, len(raw)))]:
        answer, got = feed(raw, *cuts)
        assert (got, answer.ended, answer.keeps) == (body, True, keeps), cuts
        assert answer.head is not None
    for stop in range(len(raw)):
        assert not feed(raw[:stop])[0].ended


@pytest.mark.parametrize("raw", [raw for raw, _, _ in GOOD.values()], ids=GOOD)
def test_what_comes_behind_an_answer_is_not_of_it(raw: bytes) -> None:
    """It is not handed out, and the connection is out of step."""
    answer, body = feed(raw + b"HTTP/1.1 200 OK\r\n")
    assert body == feed(raw)[1]
    assert answer.ended
    # Of an answer without a body nobody is fed more than was asked for.
    assert not answer.keeps


def test_no_more_is_asked_for_than_is_known_to_come() -> None:
    """The next answer's bytes stay in the socket."""
    answer, _ = feed(SIZED + b"12")
    assert answer.read_bytes(100) == 3
    assert answer.read_bytes(2) == 2
    assert feed(SIZED[:10])[0].read_bytes(100) == 100
    assert feed(CHUNKED)[0].read_bytes(100) == 100


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    """And only that."""
    answer, body = feed(b"HTTP/1.1 200 OK\r\n\r\nabc", closed=True)
    assert (body, answer.ended, answer.keeps) == (b"abc", True, False)


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 2", SIZED, SIZED + b"1234", CHUNKED, CHUNKED + b"1\r\nx\r\n0\r\n"])
def test_a_connection_that_is_closed_early(raw: bytes) -> None:
    """Is worth another try."""
    with pytest.raises(Rejected) as caught:
        feed(raw, closed=True)
    assert caught.value.kind is FailureKind.TRANSIENT


@pytest.mark.parametrize(
    "raw",
    [
        b"220 ftp.example.com ready\r\n",
        b"\r\n" + SIZED,
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        SIZED.replace(b"5", b"5, 6"),
        SIZED.replace(b"5", b"-5"),
        SIZED.replace(b"5", b""),
        SIZED.replace(b"Con", b"content-length: 6\r\nCon"),
        SIZED.replace(b"5", b"5\r\nX: \0"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        CHUNKED + b"x\r\n",
        CHUNKED + b"\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"1\r\nab\r\n",
        CHUNKED + b"f" * 16 + b"\r\n",
        CHUNKED + b"1;" + b"x" * 20_000,
        CHUNKED + b"0\r\n" + b"X: y\r\n" * 5_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (HEAD_BYTES_MAX // 5),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
    ],
)
def test_what_is_no_answer(raw: bytes) -> None:
    """Is rejected, however it comes, and for good: the URL is not asked again."""
    for cuts in [(), tuple(range(1, min(len(raw), 3000)))]:
        with pytest.raises(Rejected) as caught:
            feed(raw, *cuts)
        assert caught.value.kind is FailureKind.PROTOCOL


def test_rubbish_is_rejected_and_nothing_else() -> None:
    """Answers with bytes changed, lost and doubled: an end, more to come, or Rejected, and never more body than came."""
    rng = random.Random(5)
    raws = [raw for raw, _, _ in GOOD.values()]
    for _ in range(5_000):
        raw = bytearray(rng.choice(raws))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.choice(
                [b"", b"\r", b"\n", b"\r\n", b"0", b"9", b":", bytes([rng.randrange(256)])]
            )
        cuts = sorted(rng.sample(range(1, len(raw)), 2)) if len(raw) > 2 else []
        try:
            answer, body = feed(bytes(raw), *cuts)
        except Rejected:
            continue
        assert len(body) <= len(raw)
        assert answer.began == bool(raw)


def test_what_is_body_and_nothing_else_may_be_read_elsewhere() -> None:
    """As many bytes as are known to be: none before the head, none of chunks or of what goes on to the connection's end."""
    answer, _ = feed(SIZED[:-1])
    assert answer.plain_bytes == 0
    answer, body = feed(SIZED + b"12")
    assert (body, answer.plain_bytes) == (b"12", 3)
    answer.took(2)
    assert (answer.plain_bytes, answer.ended) == (1, False)
    answer.took(1)
    assert (answer.plain_bytes, answer.ended, answer.keeps) == (0, True, True)
    for unframed in (CHUNKED + b"5\r\n12", b"HTTP/1.1 200 OK\r\n\r\n12"):
        assert feed(unframed)[0].plain_bytes == 0
