"""Each fault does on the wire what its name says, seen by a client on a raw socket."""

from __future__ import annotations

import gzip
import http.client
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from support.raw_http import RawAnswer, ranged_get, raw_request
from valohai_fuse.sandbox import InputSpec, Sandbox, faults, ramp
from valohai_fuse.sandbox.script import Fault

SIZE = 1_000_000
START, STOP = 1000, 301_000


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    inputs: dict[str, InputSpec] = {"data": {"big.bin": ramp(SIZE), "small.txt": b"0123456789"}}
    with Sandbox(inputs) as running:
        yield running


def get_with(sandbox: Sandbox, fault: Fault, silence_s: float = 10.0) -> RawAnswer:
    """One ranged GET that meets the fault; the one after it must not."""
    url = sandbox.mint("data", "big.bin")
    rule = sandbox.store.faults.add(fault)
    answer = ranged_get(url, START, STOP, silence_s=silence_s)
    assert rule.hits == 1
    assert sandbox.store.requests_for("data/*")[-1].fault == fault.name
    return answer


def right_bytes(sandbox: Sandbox) -> bytes:
    return sandbox.expected_bytes("data", "big.bin", START, STOP)


# --- the connection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 70_000, 299_999])
def test_reset_after(sandbox: Sandbox, cut: int) -> None:
    """Exactly that many bytes of the body, then RST."""
    answer = get_with(sandbox, faults.reset_after(cut))
    assert (answer.status, answer.ended) == (206, "reset")
    assert answer.body == right_bytes(sandbox)[:cut]
    assert answer.headers["content-length"] == str(STOP - START)


@pytest.mark.parametrize("cut", [0, 1, 70_000, 299_999])
def test_truncate_after(sandbox: Sandbox, cut: int) -> None:
    """Exactly that many bytes, then FIN, while Content-Length promised more."""
    answer = get_with(sandbox, faults.truncate_after(cut))
    assert (answer.status, answer.ended, len(answer.body)) == (206, "closed", cut)
    assert answer.headers["content-length"] == str(STOP - START)


def test_stall_after(sandbox: Sandbox) -> None:
    """So many bytes, then silence on an open connection."""
    answer = get_with(sandbox, faults.stall_after(5000), silence_s=0.5)
    assert (answer.ended, answer.body) == ("silent", right_bytes(sandbox)[:5000])


def test_stall_for_a_while_and_go_on(sandbox: Sandbox) -> None:
    """A stall with an end: all bytes come, late."""
    started_s = time.monotonic()
    answer = get_with(sandbox, faults.stall_after(5000, seconds=0.15))
    assert time.monotonic() - started_s >= 0.15
    assert (answer.ended, answer.body) == ("complete", right_bytes(sandbox))


def test_no_answer(sandbox: Sandbox) -> None:
    """Taken, never answered."""
    answer = get_with(sandbox, faults.no_answer(), silence_s=0.3)
    assert (answer.status, answer.ended) == (0, "silent")


def test_hang_up(sandbox: Sandbox) -> None:
    """FIN instead of an answer."""
    answer = get_with(sandbox, faults.hang_up())
    assert (answer.status, answer.ended) == (0, "closed")


def test_close_after(sandbox: Sandbox) -> None:
    """All of the answer, no `Connection: close`, and the connection is gone for the next request."""
    url = urlsplit(sandbox.mint("data", "small.txt"))
    sandbox.store.faults.add(faults.close_after())
    connection = http.client.HTTPConnection(url.netloc, timeout=5)
    connection.request("GET", f"{url.path}?{url.query}")
    answer = connection.getresponse()
    assert (answer.read(), answer.getheader("Connection")) == (b"0123456789", None)
    assert connection.sock.recv(1) == b""
    connection.close()


def test_refuse_connections_and_recover(sandbox: Sandbox) -> None:
    """RST for this one, refused for a while, then as if nothing had been."""
    answer = get_with(sandbox, faults.refuse_connections(0.2))
    assert (answer.status, answer.ended) == (0, "reset")
    url = sandbox.mint("data", "small.txt")
    with pytest.raises(ConnectionRefusedError):
        raw_request(url)
    deadline_s = time.monotonic() + 5
    while True:
        try:
            assert raw_request(url).body == b"0123456789"
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline_s


def test_closing_while_connections_are_refused_leaves_no_timer() -> None:
    """The end of the sandbox does not wait for the refusal's."""
    with Sandbox({"data": {"x": b"abc"}}) as sandbox:
        sandbox.store.refuse_for(3600)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 1


def test_delay(sandbox: Sandbox) -> None:
    """The right answer, late."""
    started_s = time.monotonic()
    assert get_with(sandbox, faults.delay(0.15)).body == right_bytes(sandbox)
    assert time.monotonic() - started_s >= 0.15


def test_drip(sandbox: Sandbox) -> None:
    """The right answer in small pieces with pauses."""
    started_s = time.monotonic()
    assert get_with(sandbox, faults.drip(30_000, 0.02)).body == right_bytes(sandbox)
    assert time.monotonic() - started_s >= 0.2


# --- statuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 416, 429, 500, 503])
def test_status(sandbox: Sandbox, code: int) -> None:
    """Any status, on a connection that lives on."""
    answer = get_with(sandbox, faults.status(code, "<Error/>"))
    assert (answer.status, answer.body, answer.ended) == (code, b"<Error/>", "complete")


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (faults.expired(), 403, b"Request has expired"),
        (faults.denied(), 403, b"Access Denied"),
        (faults.denied(401), 401, b"Access Denied"),
        (faults.bad_gateway(), 502, b"<h1>502 Bad Gateway</h1>"),
        (faults.internal_error(), 500, b"Server Error (500)"),
        (faults.throttled(), 503, b"SlowDown"),
        (faults.range_not_satisfiable(), 416, b"InvalidRange"),
    ],
)
def test_refusals_speak_like_real_ones(sandbox: Sandbox, fault: Fault, status: int, words: bytes) -> None:
    """Status and body of each."""
    answer = get_with(sandbox, fault)
    assert answer.status == status
    assert words in answer.body


def test_retry_after(sandbox: Sandbox) -> None:
    """With the header where asked for, without it otherwise."""
    assert get_with(sandbox, faults.throttled(429, retry_after="7")).headers["retry-after"] == "7"
    assert "retry-after" not in get_with(sandbox, faults.throttled(429)).headers


def test_not_modified(sandbox: Sandbox) -> None:
    """304, no body."""
    answer = get_with(sandbox, faults.not_modified())
    assert (answer.status, answer.body) == (304, b"")


# --- redirects --------------------------------------------------------------------------------------------------------


def test_redirects(sandbox: Sandbox) -> None:
    """To itself, to file:, and to another host that honours the same signature and notes leaked tokens."""
    url = urlsplit(sandbox.mint("data", "big.bin"))
    assert get_with(sandbox, faults.redirect_to("file:///etc/passwd")).headers["location"] == "file:///etc/passwd"
    looped = get_with(sandbox, faults.redirect_loop()).headers["location"]
    assert urlsplit(looped).path == url.path
    location = get_with(sandbox, faults.redirect_elsewhere(sandbox.elsewhere.origin)).headers["location"]
    assert location.startswith(sandbox.elsewhere.origin)
    assert sandbox.elsewhere.origin != sandbox.store.origin
    assert ranged_get(location, START, STOP).body == right_bytes(sandbox)
    sandbox.assert_token_never_leaked()
    ranged_get(location, 0, 1, {"Authorization": f"Execution-Token {sandbox.token}"})
    with pytest.raises(AssertionError, match="carried a secret"):
        sandbox.assert_token_never_leaked()


# --- objects: an answer that is wrong ---------------------------------------------------------------------------------


def test_ignore_range(sandbox: Sandbox) -> None:
    """200, no Content-Range, the whole object."""
    answer = get_with(sandbox, faults.ignore_range())
    assert (answer.status, answer.headers.get("content-range")) == (200, None)
    assert answer.body == sandbox.expected_bytes("data", "big.bin")


def test_wrong_range_start(sandbox: Sandbox) -> None:
    """A range of the right length that starts elsewhere, and the bytes from there."""
    answer = get_with(sandbox, faults.wrong_range_start(7))
    assert answer.headers["content-range"] == f"bytes {START + 7}-{STOP + 6}/{SIZE}"
    assert answer.body == sandbox.expected_bytes("data", "big.bin", START + 7, STOP + 7)


@pytest.mark.parametrize("extent", [(0, 10), (5, 10), (0, 5)])
def test_wrong_range_start_at_the_edges(sandbox: Sandbox, extent: tuple[int, int]) -> None:
    """Wrong also where the shifted range would leave the object."""
    sandbox.store.faults.add(faults.wrong_range_start(1))
    answer = ranged_get(sandbox.mint("data", "small.txt"), *extent)
    assert answer.status == 206
    assert not answer.headers["content-range"].startswith(f"bytes {extent[0]}-")
    assert len(answer.body) == extent[1] - extent[0]


def test_wrong_range_total(sandbox: Sandbox) -> None:
    """The right bytes, another size."""
    answer = get_with(sandbox, faults.wrong_range_total(5))
    assert answer.headers["content-range"] == f"bytes {START}-{STOP - 1}/{SIZE + 5}"
    assert answer.body == right_bytes(sandbox)


def test_no_content_range(sandbox: Sandbox) -> None:
    """206 that does not say of what."""
    answer = get_with(sandbox, faults.no_content_range())
    assert (answer.status, answer.headers.get("content-range")) == (206, None)


def test_changed_etag_and_content(sandbox: Sandbox) -> None:
    """Another ETag over the same bytes; other bytes under another, or under the same, ETag."""
    tag = ranged_get(sandbox.mint("data", "big.bin"), 0, 1).headers["etag"]
    answer = get_with(sandbox, faults.changed_etag("new"))
    assert (answer.headers["etag"], answer.body) == ('"new"', right_bytes(sandbox))
    answer = get_with(sandbox, faults.changed_content())
    assert answer.headers["etag"] != tag
    assert answer.body == bytes((value + 1) % 251 for value in right_bytes(sandbox))
    answer = get_with(sandbox, faults.changed_content(same_etag=True))
    assert answer.headers["etag"] == tag
    assert answer.body != right_bytes(sandbox)
    sandbox.store.faults.add(faults.changed_content())
    assert ranged_get(sandbox.mint("data", "small.txt"), 2, 5).body == b"345"


def test_etags_that_are_missing_or_weak(sandbox: Sandbox) -> None:
    """No ETag; `W/` in front."""
    assert "etag" not in get_with(sandbox, faults.no_etag()).headers
    assert get_with(sandbox, faults.weak_etag()).headers["etag"].startswith('W/"')


def test_gzip_body(sandbox: Sandbox) -> None:
    """Encoded, and saying so."""
    answer = get_with(sandbox, faults.gzip_body())
    assert (answer.headers["content-encoding"], answer.headers["content-length"]) == ("gzip", str(len(answer.body)))
    assert gzip.decompress(answer.body) == right_bytes(sandbox)


def test_bodies_that_are_too_long(sandbox: Sandbox) -> None:
    """Behind Content-Length; or within a Content-Length that belies Content-Range."""
    sandbox.store.faults.add(faults.extra_bytes(9))
    answer = raw_request(sandbox.mint("data", "small.txt"), until_end=True)
    assert (answer.headers["content-length"], answer.body) == ("10", b"0123456789" + b"\xee" * 9)
    answer = get_with(sandbox, faults.longer_body(9))
    assert (len(answer.body), answer.headers["content-length"]) == (STOP - START + 9, str(STOP - START + 9))
    assert answer.headers["content-range"] == f"bytes {START}-{STOP - 1}/{SIZE}"


def test_bodies_without_a_length(sandbox: Sandbox) -> None:
    """Chunked, chunked and cut, and up to the end of the connection."""
    url = urlsplit(sandbox.mint("data", "big.bin"))
    sandbox.store.faults.add(faults.chunked())
    sandbox.store.faults.add(faults.chunked_cut(100_000))
    connection = http.client.HTTPConnection(url.netloc, timeout=5)
    connection.request("GET", f"{url.path}?{url.query}", headers={"Range": f"bytes={START}-{STOP - 1}"})
    answer = connection.getresponse()
    assert (answer.getheader("Content-Length"), answer.getheader("Transfer-Encoding")) == (None, "chunked")
    assert answer.read() == right_bytes(sandbox)
    connection.request("GET", f"{url.path}?{url.query}", headers={"Range": f"bytes={START}-{STOP - 1}"})
    with pytest.raises(http.client.IncompleteRead) as cut:
        connection.getresponse().read()
    assert len(cut.value.partial) == 100_000
    connection.close()
    plain = get_with(sandbox, faults.no_length())
    assert (plain.headers.get("content-length"), plain.ended) == (None, "closed")
    assert plain.body == right_bytes(sandbox)


def test_expire_after(sandbox: Sandbox) -> None:
    """The transfer breaks and the same URL is refused from then on; a fresh one works."""
    url = sandbox.mint("data", "big.bin")
    sandbox.store.faults.add(faults.expire_after(4000))
    answer = ranged_get(url, START, STOP)
    assert (answer.ended, len(answer.body)) == ("reset", 4000)
    assert ranged_get(url, START, STOP).status == 403
    assert ranged_get(sandbox.mint("data", "big.bin"), START, STOP).body == right_bytes(sandbox)


def test_faults_of_objects_leave_refusals_alone(sandbox: Sandbox) -> None:
    """A wrong ETag on a 403 would be nonsense."""
    url = sandbox.mint("data", "big.bin")
    sandbox.expire_urls()
    sandbox.store.faults.add(faults.ignore_range())
    assert ranged_get(url, 0, 1).status == 403


# --- rules ------------------------------------------------------------------------------------------------------------


def test_a_rule_counts_from_its_first_match_and_as_often_as_it_says(sandbox: Sandbox) -> None:
    """`first` and `count`; None is for ever."""
    url = sandbox.mint("data", "big.bin")
    sandbox.store.faults.add(faults.status(500), first=2, count=2)
    assert [ranged_get(url, 0, 1).status for _ in range(5)] == [206, 500, 500, 206, 206]
    sandbox.store.faults.add(faults.status(503), count=None)
    assert [ranged_get(url, 0, 1).status for _ in range(4)] == [503] * 4
    sandbox.store.faults.clear()
    assert ranged_get(url, 0, 1).status == 206


def test_a_rule_means_a_path_a_byte_or_whatever_it_is_told(sandbox: Sandbox) -> None:
    """Glob over the object key, a byte that the range covers, a predicate."""
    big, small = sandbox.mint("data", "big.bin"), sandbox.mint("data", "small.txt")
    sandbox.store.faults.add(faults.status(500), path="data/*.txt", count=None)
    assert (ranged_get(big, 0, 1).status, ranged_get(small, 0, 1).status) == (206, 500)
    sandbox.store.faults.clear()
    sandbox.store.faults.add(faults.status(500), covers=100, count=None)
    assert [ranged_get(big, *extent).status for extent in ((0, 100), (0, 101), (100, 101), (101, 200))] == [
        *(206, 500, 500, 206)
    ]
    sandbox.store.faults.clear()
    sandbox.store.faults.add(faults.status(500), when=lambda request: "if-match" in request.headers, count=None)
    assert (ranged_get(big, 0, 1).status, ranged_get(big, 0, 1, {"If-Match": "*"}).status) == (206, 500)


def test_of_two_rules_the_first_is_used_alone(sandbox: Sandbox) -> None:
    """The second one's turn comes when the first is spent."""
    url = sandbox.mint("data", "big.bin")
    sandbox.store.faults.add(faults.status(500))
    sandbox.store.faults.add(faults.status(503))
    assert [ranged_get(url, 0, 1).status for _ in range(3)] == [500, 503, 206]


def test_every_fault_can_be_named() -> None:
    """The table for control by JSON holds each function of the module that makes a fault."""
    made = {
        name
        for name, value in vars(faults).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__annotations__", {}).get("return") == "Fault"
    }
    assert made == set(faults.FAULTS)
