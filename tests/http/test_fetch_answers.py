"""What a worker makes of every kind of answer a store can give: the bytes, or the failure's kind, and nothing landed that
should not be."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from support.fake_fetcher import ramp
from support.fetch_rig import CONTENT, SECRET, SIZE, landed_blocks, landed_bytes, rig
from support.raw_store import DATE, ETAG, Answer, End, chunked, head, open_store, partial, plain
from valohai_fuse.model.extents import BLOCK_BYTES, Extent
from valohai_fuse.ports import FailureKind, FetchOrder, Landed, Lease, ObjectKey

START, STOP = BLOCK_BYTES, 3 * BLOCK_BYTES
PART = CONTENT[START:STOP]
S3_DENIED = (
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message>'
    b"<Resource>/object?X-Amz-Signature=c0ffee</Resource></Error>"
)
GOOD = partial(PART, START, SIZE)


@pytest.fixture(autouse=True, params=["plain", "libcurl"])
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two brings the answers: where a proxy is configured, even one that is not to be used, that is libcurl."""
    name = str(request.param)
    if name == "libcurl":
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "*")
    return name


@dataclass(frozen=True)
class Case:
    """An answer, and what it must mean."""

    name: str
    answer: Answer
    kind: FailureKind
    status: int | None
    expect: str | None = None
    blocks: int = 0
    """How many blocks have landed all the same, from the start of the extent; -1: however many came before the fault."""


CASES = [
    Case("400", [plain(400, b"<Code>ExpiredToken</Code>")], FailureKind.REFUSED, 400),
    Case("401", [plain(401, b"Temp URL invalid")], FailureKind.REFUSED, 401),
    Case("403", [plain(403, S3_DENIED)], FailureKind.REFUSED, 403),
    Case("403 with a body without end", [head(403), b"x" * 200_000, End.HANG], FailureKind.REFUSED, 403),
    Case("403 and then a reset", [plain(403, b"short", length=99), End.RESET], FailureKind.REFUSED, 403),
    Case("404", [plain(404, b"")], FailureKind.MISSING, 404),
    Case("410", [plain(410, b"gone")], FailureKind.MISSING, 410),
    Case("412", [plain(412, b"")], FailureKind.CHANGED, 412),
    Case("416", [plain(416, b"", ("Content-Range", "bytes */10"))], FailureKind.CHANGED, 416),
    Case("429", [plain(429, b"")], FailureKind.THROTTLED, 429),
    Case("503", [plain(503, b"<Code>SlowDown</Code>")], FailureKind.THROTTLED, 503),
    Case("500", [plain(500, b"<html>oops")], FailureKind.TRANSIENT, 500),
    Case("502", [plain(502, b"")], FailureKind.TRANSIENT, 502),
    Case("504", [plain(504, b"")], FailureKind.TRANSIENT, 504),
    Case("408", [plain(408, b"")], FailureKind.TRANSIENT, 408),
    Case("204", [head(204)], FailureKind.PROTOCOL, 204),
    Case("304", [head(304)], FailureKind.PROTOCOL, 304),
    Case("418", [plain(418, b"teapot")], FailureKind.PROTOCOL, 418),
    Case("302 without a Location", [plain(302, b"")], FailureKind.PROTOCOL, 302),
    Case("no answer", [End.CLOSE], FailureKind.TRANSIENT, None),
    Case("reset instead of an answer", [End.RESET], FailureKind.TRANSIENT, None),
    Case("not HTTP", [b"220 ftp.example.com ready\r\n", End.CLOSE], FailureKind.PROTOCOL, None),
    Case("other range", [partial(CONTENT[: 2 * BLOCK_BYTES], 0, SIZE)], FailureKind.PROTOCOL, 206),
    Case("range cut short", [partial(PART[:-1], START, SIZE)], FailureKind.PROTOCOL, 206),
    Case("no Content-Range", [plain(206, PART, ("ETag", ETAG))], FailureKind.PROTOCOL, 206),
    Case("nonsense Content-Range", [plain(206, PART, ("Content-Range", "bytes x-y/z"))], FailureKind.PROTOCOL, 206),
    Case("total not told", [partial(PART, START, "*")], FailureKind.PROTOCOL, 206),
    Case("other total", [partial(PART, START, SIZE + 1)], FailureKind.CHANGED, 206),
    Case("other ETag", [GOOD], FailureKind.CHANGED, 206, expect='"v0"'),
    Case("weak ETag is another", [partial(PART, START, SIZE, etag='W/"v1"')], FailureKind.CHANGED, 206, expect='"v1"'),
    Case("ETag gone", [partial(PART, START, SIZE, etag=None)], FailureKind.CHANGED, 206, expect='"v1"'),
    Case("ETag appeared", [GOOD], FailureKind.CHANGED, 206, expect=""),
    Case(
        "gzip",
        [partial(gzip.compress(PART), START, SIZE, ("Content-Encoding", "gzip"))],
        FailureKind.PROTOCOL,
        206,
    ),
    Case(
        "multipart",
        [partial(PART, START, SIZE, ("Content-Type", "multipart/byteranges; boundary=x"))],
        FailureKind.PROTOCOL,
        206,
    ),
    Case("Content-Length disagrees", [partial(PART, START, SIZE, length=9)], FailureKind.PROTOCOL, 206),
    Case(
        "body cut",
        [
            partial(PART[: BLOCK_BYTES + 500], START, SIZE, length=len(PART)).replace(
                b"bytes 65536-131571/", b"bytes 65536-196607/"
            ),
            End.CLOSE,
        ],
        FailureKind.TRANSIENT,
        206,
        blocks=1,
    ),
    Case(
        "reset in the body",
        [head(206, ("Content-Range", f"bytes {START}-{STOP - 1}/{SIZE}")) + PART[:100], End.RESET],
        FailureKind.TRANSIENT,
        206,
    ),
    Case(
        "chunked and short",
        [chunked(206, PART[:BLOCK_BYTES], ("Content-Range", f"bytes {START}-{STOP - 1}/{SIZE}"))],
        FailureKind.TRANSIENT,
        206,
        blocks=1,
    ),
    Case(
        "chunked and long",
        [chunked(206, PART + b"more", ("Content-Range", f"bytes {START}-{STOP - 1}/{SIZE}"))],
        FailureKind.PROTOCOL,
        206,
        blocks=-1,
    ),
    Case("200 of another size", [plain(200, CONTENT + b"x")], FailureKind.CHANGED, 200),
    Case("200, an error page", [plain(200, b"<html>please log in")], FailureKind.CHANGED, 200),
    Case("200, other ETag", [plain(200, CONTENT, ("ETag", ETAG))], FailureKind.CHANGED, 200, expect='"v0"'),
    Case("200, no length, short", [chunked(200, CONTENT[:-1])], FailureKind.CHANGED, 200),
    Case("200, no length, long", [chunked(200, CONTENT + b"x")], FailureKind.CHANGED, 200),
    Case("200, no length, cut", [head(200) + CONTENT[:STOP], End.CLOSE], FailureKind.CHANGED, 200),
    Case("200, encoded", [plain(200, CONTENT, ("Content-Encoding", "br"))], FailureKind.PROTOCOL, 200),
    Case("an ETag of 8 KiB", [partial(PART, START, SIZE, etag='"' + "x" * 8192 + '"')], FailureKind.PROTOCOL, 206),
    Case("headers without end", [head(200)[:-2] + b"X: " + b"y" * 400_000, End.CLOSE], FailureKind.PROTOCOL, None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_answer(case: Case, tmp_path: Path) -> None:
    """Every answer that is not these bytes has its kind, lands nothing that is not proven, and a good one still works after
    it."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append(case.answer)
            order = r.order(START, STOP, expect=case.expect)
            failed = await r.failure(order)
            assert failed.kind is case.kind, failed
            if case.name != "headers without end":
                assert failed.status == case.status
            assert SECRET not in str(failed)
            assert "c0ffee" not in failed.detail
            count = len(landed_blocks(order)) if case.blocks < 0 else case.blocks
            assert landed_blocks(order) == {
                START + i * BLOCK_BYTES: PART[i * BLOCK_BYTES :][:BLOCK_BYTES] for i in range(count)
            }
            assert max((report.upto for report in r.reports), default=START) == START + count * BLOCK_BYTES
            again = r.order(START, STOP)
            await r.fetch(again)
            assert landed_bytes(again) == PART

    trio.run(scenario)


GOOD_ANSWERS: list[tuple[str, Answer, str]] = [
    ("206", [GOOD], ETAG),
    ("206 without an ETag", [partial(PART, START, SIZE, etag=None)], ""),
    ("206 in lower case", [GOOD.replace(b"Content-Range: bytes", b"content-range:Bytes")], ETAG),
    ("206 in two pieces", [GOOD[:-BLOCK_BYTES], 0.02, GOOD[-BLOCK_BYTES:]], ETAG),
    ("206 byte-wise headers", [bytes([b]) for b in GOOD[:40]] + [GOOD[40:]], ETAG),
    ("206 chunked", [chunked(206, PART, ("Content-Range", f"bytes {START}-{STOP - 1}/{SIZE}"))], ""),
    (
        "206 to the end of the connection",
        [head(206, ("Content-Range", f"bytes {START}-{STOP - 1}/{SIZE}"), ("Connection", "close")) + PART, End.CLOSE],
        "",
    ),
    ("206 says identity", [partial(PART, START, SIZE, ("Content-Encoding", "identity"))], ETAG),
    ("100 before it", [head(100), head(103, ("ETag", '"early"')), GOOD], ETAG),
    ("200 whole", [plain(200, CONTENT, ("ETag", ETAG))], ETAG),
    ("200 that goes on after the extent", [plain(200, CONTENT[:STOP], length=SIZE), End.HANG], ""),
    ("200 chunked", [chunked(200, CONTENT)], ""),
    ("ETag in Latin-1", [partial(PART, START, SIZE, etag='"v\xe9"')], '"v\xe9"'),
]


@pytest.mark.parametrize(("answer", "version"), [c[1:] for c in GOOD_ANSWERS], ids=[c[0] for c in GOOD_ANSWERS])
def test_good_answer(answer: Answer, version: str, tmp_path: Path) -> None:
    """Every proper way to answer gives exactly the extent's bytes and the ETag as sent."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append(answer)
            order = r.order(START, STOP)
            fetched = await r.fetch(order)
            assert landed_bytes(order) == PART
            assert set(landed_blocks(order)) == {START, START + BLOCK_BYTES}
            assert fetched.version == version
            assert {report.version for report in r.reports} == {version}
            assert r.reports[-1].upto == STOP

    trio.run(scenario)


def test_a_reused_connection_keeps_the_expected_version(tmp_path: Path) -> None:
    """An expected ETag that matches is no obstacle, the missing one ("") included."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            for etag in (ETAG, None):
                r.store.answers.append([partial(PART, START, SIZE, etag=etag)])
                fetched = await r.fetch(r.order(START, STOP, expect=etag or ""))
                assert fetched.version == (etag or "")
            assert r.store.connections == 1

    trio.run(scenario)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("Sun, 06 Nov 1994 08:50:37 GMT", 60.0),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
    ],
)
def test_retry_after_in_both_forms(header: str, seconds: float | None, tmp_path: Path) -> None:
    """Retry-After is passed on in seconds, a date counted from the store's own clock; and so is that clock."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append([plain(503, b"", ("Retry-After", header))])
            failed = await r.failure(r.order())
            assert failed.retry_after_s == seconds
            assert failed.server_date_s == 784111777  # DATE, by `date -d`
            assert DATE.endswith("08:49:37 GMT")

    trio.run(scenario)


def test_error_code_is_the_only_quote(tmp_path: Path) -> None:
    """Of an error's body the code is told, and nothing else: bodies quote signatures."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append([plain(403, S3_DENIED)])
            assert (await r.failure(r.order())).detail == "HTTP 403 AccessDenied"

    trio.run(scenario)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "s3://b/k", "//x", "", "http:///x"]
)
def test_forbidden_scheme(url: str, tmp_path: Path) -> None:
    """Only http and https are ever requested."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            failed = await r.failure(r.order(url=url))
            assert failed.kind is FailureKind.FORBIDDEN

    trio.run(scenario)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/\r\nX: y", "http://127.0.0.1:1/a b"])
def test_url_that_breaks_the_request_line(url: str, tmp_path: Path) -> None:
    """A URL cannot smuggle a header."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            assert (await r.failure(r.order(url=url))).kind is FailureKind.FORBIDDEN

    trio.run(scenario)


def test_header_that_breaks_its_line(tmp_path: Path) -> None:
    """A lease's header cannot smuggle another one."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            failed = await r.failure(r.order(headers=(("X-A", "1\r\nX-B: 2"),)))
            assert failed.kind is FailureKind.FORBIDDEN
            assert r.store.requests == []

    trio.run(scenario)


@pytest.mark.parametrize(
    ("target", "on_the_wire"),
    [
        ("/a/./b/../c?sig=%2f%2F+%e9&x=a/../b", b"/a/./b/../c?sig=%2f%2F+%e9&x=a/../b"),
        ("//double//slash/?&&=", b"//double//slash/?&&="),
        ("/caf%E9?q=%zz[]{}|^`\"<>\\'", b"/caf%E9?q=%zz[]{}|^`\"<>\\'"),
        ("/caf\xe9/\u4e2d?x=\U0001f600", "/caf\xe9/\u4e2d?x=\U0001f600".encode()),
        ("?only=query", b"/?only=query"),
    ],
)
def test_url_goes_out_as_it_came(target: str, on_the_wire: bytes, tmp_path: Path) -> None:
    """A signed URL is sent byte for byte: no folding of dots, no re-encoding."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            await r.fetch(r.order(url=r.store.url + target))
            assert r.store.requests[0].target == on_the_wire

    trio.run(scenario)


def test_request_says_what_it_should(tmp_path: Path) -> None:
    """GET only, one range, no encoding accepted, the lease's headers as they are."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            await r.fetch(r.order(START, STOP, headers=(("X-Extra", "a: b"), ("X-Empty", ""))))
            (request,) = r.store.requests
            assert request.method == b"GET"
            assert request.extent == (START, STOP)
            assert request.header("Accept-Encoding") == "identity"
            assert request.header("X-Extra") == "a: b"
            assert request.header("X-Empty") == ""
            assert (request.header("User-Agent") or "").startswith("valohai-fuse/")

    trio.run(scenario)


def _redirects_to(location: str | bytes) -> Answer:
    where = location.encode() if isinstance(location, str) else location
    return [b"HTTP/1.1 302 Found\r\nContent-Length: 4\r\nLocation: " + where + b"\r\n\r\nbody"]


def test_redirect_is_followed_byte_for_byte(tmp_path: Path) -> None:
    """Absolute, absolute path and relative redirects lead on; the range is asked for again; headers stay with the host."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            for location in (
                r.store.url + "/x/./y?s=%2f",
                "/x/./y?s=%2f",
                b"//" + r.store.url[7:].encode() + b"/x/./y?s=%2f",
            ):
                r.store.answers.append(_redirects_to(location))
                order = r.order(START, STOP, headers=(("X-Extra", "secret"),))
                await r.fetch(order)
                assert landed_bytes(order) == PART
                request = r.store.requests[-1]
                assert request.target == b"/x/./y?s=%2f"
                assert request.extent == (START, STOP)
                assert request.header("X-Extra") == "secret"
            r.store.answers.append(_redirects_to("elsewhere?q"))
            await r.fetch(r.order(START, STOP, url=r.store.url + "/dir/object?s"))
            assert r.store.requests[-1].target == b"/dir/elsewhere?q"
            assert r.store.connections == 1

    trio.run(scenario)


def test_redirect_to_another_host_does_not_get_the_headers(tmp_path: Path) -> None:
    """What a lease says to one host is not told to another."""

    async def scenario() -> None:
        async with rig(tmp_path) as r, open_store(CONTENT) as other:
            r.store.answers.append(_redirects_to(other.url + "/there"))
            order = r.order(START, STOP, headers=(("X-Extra", "secret"), ("Authorization", "Bearer x")))
            await r.fetch(order)
            assert landed_bytes(order) == PART
            (request,) = other.requests
            assert request.header("X-Extra") is None
            assert request.header("Authorization") is None
            assert request.header("Accept-Encoding") == "identity"

    trio.run(scenario)


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:0", "s3://bucket/key", "http:/x y"]
)
def test_redirect_to_another_scheme_is_forbidden(location: str, tmp_path: Path) -> None:
    """A store cannot send the worker to a local file."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append(_redirects_to(location))
            order = r.order()
            failed = await r.failure(order)
            assert failed.kind is FailureKind.FORBIDDEN
            assert landed_blocks(order) == {}

    trio.run(scenario)


def test_redirect_loop_ends(tmp_path: Path) -> None:
    """Five redirects are followed, the sixth is one too many."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.extend([_redirects_to("/again")] * 5)
            await r.fetch(r.order())
            r.store.answers.extend([_redirects_to("/again")] * 6)
            failed = await r.failure(r.order())
            assert failed.kind is FailureKind.PROTOCOL
            assert len(r.store.requests) == 12

    trio.run(scenario)


def test_nobody_listens(tmp_path: Path) -> None:
    """A refused connection and a name that does not exist are transient."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            for host in ("127.0.0.1:1", "no-such-host.invalid"):
                failed = await r.failure(r.order(url=f"http://{host}/x?{SECRET}"))
                assert failed.kind is FailureKind.TRANSIENT
                assert SECRET not in str(failed)

    trio.run(scenario)


def test_handshake_without_an_answer(tmp_path: Path) -> None:
    """The connect timeout covers TLS: a host that accepts and then says nothing is given up."""

    async def scenario() -> None:
        async with rig(tmp_path, connect_timeout_s=0.3) as r:
            failed = await r.failure(r.order(url=r.store.url.replace("http:", "https:") + "/x"))
            assert failed.kind is FailureKind.TRANSIENT
            assert "connection" in failed.detail

    trio.run(scenario)


@pytest.mark.parametrize("sent", [b"", GOOD[:100], GOOD[: -BLOCK_BYTES // 2]], ids=["silence", "in headers", "in body"])
def test_stall(sent: bytes, tmp_path: Path) -> None:
    """A transfer that goes silent is given up after the stall timeout, wherever it was; what has landed stays."""

    async def scenario() -> None:
        async with rig(tmp_path, stall_timeout_s=0.3) as r:
            r.store.answers.append([sent, End.HANG] if sent else [End.HANG])
            began = trio.current_time()
            failed = await r.failure(r.order(START, STOP))
            assert failed.kind is FailureKind.TRANSIENT
            assert 0.25 < trio.current_time() - began < 5
            assert [report.upto for report in r.reports] == ([START + BLOCK_BYTES] if len(sent) > BLOCK_BYTES else [])
            await r.store.wait_until(lambda: r.store.open_connections == 0)

    trio.run(scenario)


def test_stall_after_the_last_byte_is_no_failure(tmp_path: Path) -> None:
    """Everything has landed: that the end of the answer never comes changes nothing."""

    async def scenario() -> None:
        async with rig(tmp_path, stall_timeout_s=0.2) as r:
            ended = chunked(206, PART, ("Content-Range", f"bytes {START}-{STOP - 1}/{SIZE}"))
            r.store.answers.append([ended[: -len("0\r\n\r\n")], End.HANG])
            order = r.order(START, STOP)
            await r.fetch(order)
            assert landed_bytes(order) == PART

    trio.run(scenario)


def test_a_kept_connection_that_closes_when_it_is_asked(tmp_path: Path) -> None:
    """The store's idle time-out and the next request cross: that is no answer to it, and a new connection gets one."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            for end in (End.CLOSE, End.RESET):
                await r.fetch(r.order())
                r.store.answers.append([end])
                await r.fetch(r.order(name="other"))
            assert [request.connection for request in r.store.requests] == [0, 0, 1, 1, 1, 2]

    trio.run(scenario)


def test_slow_but_steady_is_no_stall(tmp_path: Path) -> None:
    """The stall timeout bounds silence, not the transfer."""

    async def scenario() -> None:
        async with rig(tmp_path, stall_timeout_s=0.4) as r:
            step = len(GOOD) // 8 + 1
            pieces: list[bytes | float] = []
            for at in range(0, len(GOOD), step):
                pieces += [GOOD[at : at + step], 0.1]
            r.store.answers.append(pieces)
            order = r.order(START, STOP)
            fetched = await r.fetch(order)
            assert fetched.total_s > 0.4
            assert landed_bytes(order) == PART

    trio.run(scenario)


def test_disk_failure_has_its_own_kind(tmp_path: Path) -> None:
    """Where the bytes came but could not be landed, the engine is told so; the next order works."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            failed = await r.failure(r.order(segment_path=str(tmp_path / "no" / "such" / "directory")))
            assert failed.kind is FailureKind.DISK
            assert str(tmp_path) not in failed.detail
            await r.fetch(r.order())

    trio.run(scenario)


def test_first_block_is_reported_before_the_rest_has_come(tmp_path: Path) -> None:
    """A reader does not wait for more than the blocks it needs."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            gate = trio.Event()
            head_bytes = len(GOOD) - len(PART)
            r.store.answers.append([GOOD[: head_bytes + BLOCK_BYTES + 10], gate, GOOD[head_bytes + BLOCK_BYTES + 10 :]])
            order = r.order(START, STOP)

            def landed(report: Landed) -> None:
                r.reports.append(report)
                assert landed_blocks(order)[START] == PART[:BLOCK_BYTES]
                gate.set()  # would never be, if the report waited for the rest

            await r.pool.fetch(order, landed)
            assert [report.upto for report in r.reports] == [START + BLOCK_BYTES, STOP]

    trio.run(scenario)


def test_a_whole_segment_lands_in_few_steps(tmp_path: Path) -> None:
    """Eight MiB: every byte right, and far fewer reports than blocks."""
    content = ramp(3 * 1024 * 1024 * 4, phase=7)

    async def scenario() -> None:
        async with rig(tmp_path, content) as r:
            order = r.order(8 * 1024 * 1024, len(content))
            await r.fetch(order)
            assert landed_bytes(order) == content[8 * 1024 * 1024 :]
            uptos = [report.upto for report in r.reports]
            assert uptos == sorted(set(uptos))
            assert len(uptos) < 40

    trio.run(scenario)


def test_object_identity_with_a_lone_surrogate(tmp_path: Path) -> None:
    """JSON can spell names that are no UTF-8; they must not break the conversation with the worker."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            order = FetchOrder(
                ObjectKey("odd\ud800name", SIZE),
                Extent(0, SIZE),
                Lease(r.store.url + "/x"),
                None,
                str(tmp_path / "odd"),
            )
            await r.fetch(order)
            assert landed_bytes(order) == CONTENT

    trio.run(scenario)
