"""The size of an object from one ranged GET, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import trio

from support.scripted_http import Request, ScriptedHttp, response
from valohai_fuse.ports import FailureKind, FetchFailed, Lease
from valohai_fuse.sources.size_probe import HttpSizeProbe


def probe(lease: Lease) -> int:
    """One probe."""

    async def main() -> int:
        async with HttpSizeProbe(clock=time.time, connect_timeout_s=2.0, answer_timeout_s=0.5) as probe_:
            return await probe_.size(lease)

    return trio.run(main)


def size(raw: bytes | None) -> int:
    """What this answer says."""
    with ScriptedHttp(lambda request: raw) as server:
        return probe(Lease(f"{server.url}/k?sig=S3CR3T"))


def failure(raw: bytes | None) -> FetchFailed:
    """The failure that this answer makes."""
    with pytest.raises(FetchFailed) as caught:
        size(raw)
    assert "S3CR3T" not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value


def ranged(value: str) -> bytes:
    """A 206 with this Content-Range."""
    return response(206, b"x", ("Content-Range", value))


def test_what_is_sent() -> None:
    """A GET of the first byte, not encoded; the URL exactly as it came, which a normalising client would break."""
    path = "/a/./b//c%2f%2F/../d e".replace(" ", "%20") + "?X-Amz-Signature=a%2fb+c=&Y;z='(!)'~|&#gone"
    with ScriptedHttp(lambda request: ranged("bytes 0-0/1234567890123")) as server:
        assert probe(Lease(server.url + path, headers=(("X-Ms-Version", "2023"),))) == 1234567890123
        assert probe(Lease(f"{server.url}?sig=ä")) == 1234567890123
    request, second = server.requests
    assert request.method == "GET"
    assert request.target == path.partition("#")[0].encode()
    assert request.headers["range"] == "bytes=0-0"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["x-ms-version"] == "2023"
    assert "content-length" not in request.headers
    assert second.target == b"/?sig=%C3%A4"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (ranged("bytes 0-0/1"), 1),
        (ranged("BYTES 0-0/500000000000"), 500_000_000_000),
        (response(416, "", ("Content-Range", "bytes */0")), 0),
        (response(416, "<Error><ActualObjectSize>0</ActualObjectSize></Error>"), 0),
        (response(200, b"hello"), 5),
        (response(200, b""), 0),
        (response(200, b"part of a large body", length=10**12), 10**12),
    ],
)
def test_sizes(raw: bytes, expected: int) -> None:
    """206, 416 of an empty object, and 200 of a store that ignores ranges, whose body is not read."""
    assert size(raw) == expected


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (response(400, "<Code>ExpiredToken</Code>"), FailureKind.REFUSED),
        (response(401), FailureKind.REFUSED),
        (response(403), FailureKind.REFUSED),
        (response(404), FailureKind.MISSING),
        (response(410), FailureKind.MISSING),
        (response(412), FailureKind.CHANGED),
        (response(429), FailureKind.THROTTLED),
        (response(503), FailureKind.THROTTLED),
        (response(500), FailureKind.TRANSIENT),
        (response(502, "<html>"), FailureKind.TRANSIENT),
        (response(304), FailureKind.PROTOCOL),
        (response(302), FailureKind.PROTOCOL),
        (response(418), FailureKind.PROTOCOL),
        (response(416), FailureKind.PROTOCOL),
        (response(416, "", ("Content-Range", "bytes */7")), FailureKind.PROTOCOL),
        (ranged("bytes 0-0/*"), FailureKind.PROTOCOL),
        (ranged("bytes 0-0/0"), FailureKind.PROTOCOL),
        (ranged("bytes 1-1/7"), FailureKind.PROTOCOL),
        (response(206, b"x"), FailureKind.PROTOCOL),
        (response(200, b"x", ("Content-Encoding", "gzip")), FailureKind.PROTOCOL),
        (response(200, b"<html>log in", ("Content-Type", "text/html; charset=utf-8")), FailureKind.PROTOCOL),
        (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", FailureKind.PROTOCOL),
        (response(302, "", ("Location", "file:///etc/passwd")), FailureKind.FORBIDDEN),
        (response(302, "", ("Location", "ftp://h/S3CR3T?S3CR3T")), FailureKind.FORBIDDEN),
        (response(302, "", ("Location", "http://[S3CR3T")), FailureKind.FORBIDDEN),
        (response(302, "", ("Location", "/again")), FailureKind.PROTOCOL),
        (None, FailureKind.TRANSIENT),
        (b"nonsense\r\n\r\n", FailureKind.TRANSIENT),
    ],
)  # fmt: skip
def test_failures(raw: bytes | None, kind: FailureKind) -> None:
    """Each answer that holds no size is a failure of its kind, without a query in its words."""
    if raw is not None and b"ftp:" in raw:
        raw = raw.replace(b"h/S3CR3T", b"h/k")
    assert failure(raw).kind is kind


def test_failures_carry_what_the_engine_needs() -> None:
    """Status, the store's code, Retry-After and the store's clock."""
    error = failure(
        response(
            503,
            "<Error><Code>SlowDown</Code></Error>",
            ("Date", "Sat, 01 Nov 2025 10:00:00 GMT"),
            ("Retry-After", "Sat, 01 Nov 2025 10:00:07 GMT"),
        )
    )
    assert (error.status, error.retry_after_s, error.server_date_s) == (503, 7.0, 1761991200.0)
    assert error.detail.endswith("/k: HTTP 503 SlowDown")


def test_redirects_do_not_take_headers_to_other_hosts() -> None:
    """They are followed, relative ones too; what the lease carries is for its own host."""
    with ScriptedHttp(lambda request: ranged("bytes 0-0/42")) as other:

        def answer(request: Request) -> bytes:
            if request.target == b"/k?sig=1":
                return response(307, "", ("Location", "/next?a=b%2fc"))
            return response(302, "", ("Location", f"{other.url}/there?sig=2"))

        with ScriptedHttp(answer) as server:
            assert probe(Lease(f"{server.url}/k?sig=1", headers=(("X-Secret", "S3CR3T"),))) == 42
    assert [request.target for request in server.requests] == [b"/k?sig=1", b"/next?a=b%2fc"]
    assert [request.headers.get("x-secret") for request in server.requests] == ["S3CR3T", "S3CR3T"]
    (there,) = other.requests
    assert there.target == b"/there?sig=2"
    assert "x-secret" not in there.headers
    assert there.headers["range"] == "bytes=0-0"


@pytest.mark.parametrize("url", ["s3://b/k", "file:///etc/passwd", "http://h/\r\nX: y", "gopher://h/"])
def test_other_schemes_are_not_asked(url: str) -> None:
    """Nothing is sent anywhere."""
    with pytest.raises(FetchFailed) as caught:
        probe(Lease(url))
    assert caught.value.kind is FailureKind.FORBIDDEN


def test_nobody_listens_and_nobody_answers() -> None:
    """Both may pass."""
    with ScriptedHttp(lambda request: None) as server:
        url = server.url
    with pytest.raises(FetchFailed) as caught:
        probe(Lease(f"{url}/k"))
    assert caught.value.kind is FailureKind.TRANSIENT
    assert "cannot connect" in caught.value.detail
    assert failure(b"HTTP/1.1 206 X\r\n").kind is FailureKind.TRANSIENT


def _many(answerer: Callable[[Request], bytes]) -> ScriptedHttp:
    async def main() -> None:
        async with HttpSizeProbe(clock=time.time) as probe_:
            async with trio.open_nursery() as nursery:
                for n in range(100):
                    nursery.start_soon(probe_.size, Lease(f"{server.url}/{n}"))
            for n in range(20):
                with trio.move_on_after(0.0003 * (n % 7)):
                    await probe_.size(Lease(f"{server.url}/{n}"))
            with trio.fail_after(5):
                assert await probe_.size(Lease(f"{server.url}/last")) == 9

    with ScriptedHttp(answerer) as server:
        trio.run(main)
    return server


def test_many_probes_share_few_connections() -> None:
    """At most sixteen at a time, kept for the next; cancelling some costs the others nothing."""
    server = _many(lambda request: ranged("bytes 0-0/9"))
    assert server.connections <= 16 + 20
    assert len(server.requests) >= 101


def test_an_error_page_without_end_is_not_read_to_its_end() -> None:
    """4 KiB at most, and nothing is left behind."""
    assert failure(response(403, "x" * 100_000, length=10**9)).kind is FailureKind.REFUSED


@pytest.mark.parametrize("host", ["169.254.169.254", "2852039166", "[::ffff:169.254.169.254]", "[fe80::1]"])
def test_the_machines_own_network_is_not_asked(host: str) -> None:
    """A redirect to the metadata service, however it is spelled, is refused without a connection."""
    assert failure(response(307, b"", ("Location", f"http://{host}/latest/meta-data/"))).kind is FailureKind.FORBIDDEN


def test_a_name_that_leads_to_the_machines_own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by the address that was connected to, before anything is sent."""
    monkeypatch.setattr("valohai_fuse.model.peers.is_forbidden", lambda address: address == "127.0.0.1")
    with ScriptedHttp(lambda request: ranged("bytes 0-0/7")) as server:
        with pytest.raises(FetchFailed, match="own network") as caught:
            probe(Lease(server.url.replace("127.0.0.1", "localhost") + "/k?sig=S3CR3T"))
        assert caught.value.kind is FailureKind.FORBIDDEN
        assert server.requests == []
