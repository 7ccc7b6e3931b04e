"""The POST over real HTTP: what is sent, what is repeated, what is refused, and that the token stays where it belongs."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import trio

from support.scripted_http import Request, ScriptedHttp, response
from valohai_fuse.errors import AccessRefusedError, ConfigurationError, StoreUnavailableError, ValohaiFuseError
from valohai_fuse.ports import FileRef, Renewal
from valohai_fuse.sources.api_file import ApiRequest
from valohai_fuse.sources.valohai_api import ValohaiApi

TOKEN = "vhx-S3CR3T-token"
BODY = (Path(__file__).parents[1] / "samples" / "response.json").read_bytes()
INPUT_ID = "5c83f6fb-1cb2-4fc3-bda6-2cbd7461f16f"
FILE = FileRef("large_dataset", INPUT_ID, "dogs/000201.jpg", None, None, None, 0)


def api_of(url: str, **rest: Any) -> ValohaiApi:
    """An api that backs off in milliseconds."""
    headers = rest.pop("headers", (("Authorization", f"Execution-Token {TOKEN}"),))
    method = rest.pop("method", "POST")
    rest = {"delay_base_s": 0.01, "budget_s": 2.0} | rest
    return ValohaiApi(ApiRequest(method, url, headers), clock=time.time, **rest)


def renew(server: ScriptedHttp, file: FileRef = FILE, **rest: Any) -> Renewal:
    """One renewal."""

    async def main() -> Renewal:
        async with api_of(f"{server.url}/request-input-data/?execution=e-1", **rest) as api:
            return await api.renew(file)

    return trio.run(main)


def failure(answerer: Callable[[Request], bytes | None], **rest: Any) -> tuple[ValohaiFuseError, Sequence[Request]]:
    """The error that these answers end in, and what was asked until then."""
    with ScriptedHttp(answerer) as server:
        with pytest.raises(ValohaiFuseError) as caught:
            renew(server, **rest)
        text = caught.value.message + str(caught.value.hint) + repr(caught.value.__cause__)
        assert "S3CR3T" not in text
        assert "execution=" not in text
        return caught.value, server.requests


def in_turn(*answers: bytes | None) -> Callable[[Request], bytes | None]:
    """Each answer once, the last one for ever."""
    left = list(answers)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize("parameter", ["input", "inputs"])
def test_what_is_sent(parameter: str) -> None:
    """A POST without a body, `execution=` kept, the input named, the token as it is in api.json."""
    with ScriptedHttp(lambda request: response(200, BODY)) as server:
        renewal = renew(server, parameter=parameter)
    url = renewal.url_for(FILE)
    assert url is not None
    assert url.startswith("https://acme-data.s3")
    assert abs(renewal.minted_at_s - time.time()) < 20
    (request,) = server.requests
    assert request.method == "POST"
    assert request.target == f"/request-input-data/?execution=e-1&{parameter}={INPUT_ID}".encode()
    assert request.headers["authorization"] == f"Execution-Token {TOKEN}"
    assert request.headers["content-length"] == "0"


def test_without_an_input_id_everything_is_asked_for() -> None:
    """The filter is never relied on."""
    with ScriptedHttp(lambda request: response(200, BODY)) as server:
        renewal = renew(server, FileRef("labels", None, "train/labels-ä.csv", None, None, None, 0), method="PUT")
    assert renewal.url_for(FILE) is not None
    assert server.requests[0].target == b"/request-input-data/?execution=e-1"
    assert server.requests[0].method == "PUT"


@pytest.mark.parametrize(
    "first",
    [
        None,
        response(500, "<html>"),
        response(502, "<html>"),
        response(503, "", ("Retry-After", "0")),
        response(429, '{"detail": "slow down"}'),
        response(200, BODY[:100], length=len(BODY)),
        b'HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\n[{"na',
    ],
)  # fmt: skip
def test_what_is_repeated(first: bytes | None) -> None:
    """Lost connections, half answers, 429 and 5xx."""
    with ScriptedHttp(in_turn(first, first, response(200, BODY))) as server:
        assert renew(server).url_for(FILE) is not None
    assert len(server.requests) == 3


def test_retry_after_is_honoured() -> None:
    """Also on a single 429."""
    began_s = time.monotonic()
    with ScriptedHttp(in_turn(response(429, "", ("Retry-After", "1")), response(200, BODY))) as server:
        renew(server, budget_s=5.0)
    assert time.monotonic() - began_s >= 1


def test_the_budget_ends_it() -> None:
    """A lasting 503 is an error that says how often was asked; a Retry-After beyond the budget is not waited for."""
    error, requests = failure(lambda request: response(503, '{"error": "maintenance"}'), budget_s=0.3)
    assert isinstance(error, StoreUnavailableError)
    assert "maintenance" in error.message
    assert f"{len(requests)} times" in error.message
    assert len(requests) >= 3
    error, requests = failure(lambda request: response(503, "", ("Retry-After", "3600")))
    assert len(requests) == 1


def test_nobody_listens() -> None:
    """Refused connections are repeated within the budget, then say so."""
    with ScriptedHttp(lambda request: None) as server:
        url = server.url

    async def main() -> None:
        async with api_of(f"{url}/x?execution=e-1", budget_s=0.2) as api:
            await api.renew(FILE)

    with pytest.raises(StoreUnavailableError, match=r"cannot connect.*times"):
        trio.run(main)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_dead_token_is_final(status: int) -> None:
    """One question, Valohai's own words, and never the token, also when Valohai quotes it."""
    body = json.dumps({"detail": f"Token {TOKEN} of Execution-Token {TOKEN} expired, see https://v/x?t=S3CR3T"})
    error, requests = failure(lambda request: response(status, body))
    assert isinstance(error, AccessRefusedError)
    assert f"HTTP {status}" in error.message
    assert "Token *** of *** expired, see https://v/x" in error.message
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"detail": "no"}', ": no"),
        ('{"error": "no"}', ": no"),
        ('{"non_field_errors": ["no", "never"]}', ": no; never"),
        ('{"message": "no", "code": "x"}', ": no"),
        ('["no"]', ": no"),
        ("<html>no</html>", "HTTP 403"),
        ('{"detail": {"a": 1}}', "HTTP 403"),
        ("", "HTTP 403"),
        ('{"detail": "a\\r\\n\\u001b[31mb"}', ": a [31mb"),
    ],
)
def test_valohais_words(body: str, words: str) -> None:
    """In each of the forms of its house style, made printable."""
    error, _ = failure(lambda request: response(403, body))
    assert error.message.endswith(words)


@pytest.mark.parametrize(
    "body", ["<html>S3CR3T</html>", "", '{"detail": "S3CR3T"}', '[{"files": [{"filename": "S3CR3T"']
)
def test_not_an_answer(body: str) -> None:
    """A 200 that is not the JSON asked for is an error at once."""
    error, requests = failure(lambda request: response(200, body, ("Content-Type", "application/json")))
    assert isinstance(error, StoreUnavailableError)
    assert len(requests) == 1


def test_redirects_are_not_followed() -> None:
    """The token is for Valohai alone."""
    with ScriptedHttp(lambda request: response(200, BODY)) as other:
        location = f"{other.url}/elsewhere?sig=S3CR3T"
        for status in (301, 302, 303, 307, 308):
            error, requests = failure(lambda request, status=status: response(status, "", ("Location", location)))  # type: ignore[misc] # binds the loop variable
            assert isinstance(error, StoreUnavailableError)
            assert "/elsewhere" in error.message
            assert len(requests) == 1
    assert other.requests == []


def test_a_header_that_http_refuses_is_not_quoted() -> None:
    """The library's own message would show it."""
    error, requests = failure(
        lambda request: response(200, BODY), headers=(("Authorization", "S3CR3T\n x"),), budget_s=0.0
    )
    assert "characters that HTTP does not permit" in error.message
    assert requests == []


def test_logs_hold_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """Even at DEBUG, where httpx and httpcore would tell URLs and headers."""
    with caplog.at_level(logging.DEBUG):
        with ScriptedHttp(in_turn(response(500), response(200, BODY))) as server:
            renew(server)
        failure(lambda request: response(401, "no"))
    assert "S3CR3T" not in caplog.text
    assert "execution=" not in caplog.text
    assert "X-Amz" not in caplog.text


def test_compressed_answers() -> None:
    """100 MB of URLs compress well."""
    with ScriptedHttp(lambda request: response(200, gzip.compress(BODY), ("Content-Encoding", "gzip"))) as server:
        assert renew(server).url_for(FILE) is not None
        assert "gzip" in server.requests[0].headers["accept-encoding"]
    packed = gzip.compress(b'{"detail": "no"}')
    error, _ = failure(lambda request: response(403, packed, ("Content-Encoding", "gzip")))
    assert error.message.endswith(": no")
    bomb = gzip.compress(b"[" + b" " * 50_000_000)
    error, _ = failure(lambda request: response(200, bomb, ("Content-Encoding", "gzip")))
    assert "byte 50000001 of 50000001" in error.message
    error, _ = failure(lambda request: response(200, BODY, ("Content-Encoding", "br")))
    assert "not asked for" in error.message
    error, _ = failure(lambda request: response(200, b"no gzip", ("Content-Encoding", "gzip")), budget_s=0.0)
    assert "compression" in error.message


def test_a_long_error_page_is_not_read_to_its_end() -> None:
    """Four KiB are enough to know what Valohai says; a body without end does not hold anyone."""
    page = response(403, "x" * 100_000, length=10**9)
    error, _ = failure(lambda request: page)
    assert isinstance(error, AccessRefusedError)


def test_cancelled_in_the_middle_of_a_body() -> None:
    """Leaves nothing behind that would have to be collected."""
    half = response(200, BODY, length=10**9).replace(b"Connection: close", b"X: y")

    async def main() -> None:
        async with api_of(f"{server.url}/x") as api:
            with trio.move_on_after(0.1) as scope:
                await api.renew(FILE)
            assert scope.cancelled_caught

    with ScriptedHttp(lambda request: half) as server:
        trio.run(main)


def _large_answer(files: int) -> bytes:
    url = "https://h/k?X-Amz-Signature=" + "b" * 500
    entries = [
        {"filename": f"{n}", "url": f"{url}{n}", "input_id": "i", "original_uri": f"datum://{n}"} for n in range(files)
    ]
    return json.dumps([{"name": "d", "files": entries}]).encode()


def test_a_large_answer_goes_to_disk(tmp_path: Path) -> None:
    """As a file without a name, in the directory given; the URLs stay at hand."""
    raw = response(200, _large_answer(5000))
    with ScriptedHttp(lambda request: raw) as server:
        renewal = renew(server, spool_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    for n in (0, 2500, 4999):
        assert (
            renewal.url_for(FileRef("d", "i", f"{n}", None, None, None, n))
            == f"https://h/k?X-Amz-Signature={'b' * 500}{n}"
        )


@pytest.mark.parametrize("works_for", [0, 1, 2])
def test_a_full_disk_does_not_matter(works_for: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The answer is then kept in memory, also when the disk fills up in its middle."""
    real, writes = tempfile.TemporaryFile, []

    class FullDisk:
        def __init__(self, **rest: Any) -> None:
            if works_for == 0:
                raise OSError(errno.ENOSPC, "full")
            self._file: BinaryIO = real(**rest)

        def write(self, data: memoryview) -> int:
            writes.append(len(data))
            if len(writes) > works_for:
                self._file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "full")
            return self._file.write(data)

        def fileno(self) -> int:
            return self._file.fileno()

        def close(self) -> None:
            self._file.close()

    monkeypatch.setattr(tempfile, "TemporaryFile", FullDisk)
    raw = response(200, _large_answer(6000))
    with ScriptedHttp(lambda request: raw) as server:
        renewal = renew(server, spool_dir=str(tmp_path))
    assert len(writes) == (works_for + 1 if works_for else 0)
    for n in range(0, 6000, 7):
        assert (
            renewal.url_for(FileRef("d", "i", f"{n}", None, None, None, n))
            == f"https://h/k?X-Amz-Signature={'b' * 500}{n}"
        )


def test_what_no_disk_takes_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a disk for it, a large answer is refused long before it is as large as one on disk may be."""
    monkeypatch.setattr("valohai_fuse.sources.valohai_api.ANSWER_MEMORY_BYTES_MAX", 2 << 20)
    raw = response(200, _large_answer(6000))
    with ScriptedHttp(lambda request: raw) as server:
        with pytest.raises(StoreUnavailableError, match="no disk takes it"):
            renew(server, spool_dir="/proc/nowhere")
        assert len(raw) > 2 << 20


def test_old_answers_are_given_back(tmp_path: Path) -> None:
    """No descriptor is left once a renewal is replaced."""
    raw = response(200, _large_answer(3000))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        async with api_of(f"{server.url}/x", spool_dir=str(tmp_path)) as api:
            for _ in range(40):
                await api.renew(FILE)

    with ScriptedHttp(lambda request: raw) as server:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
        try:
            trio.run(main)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.connections == 1


def test_cancelled_renewals_do_not_use_up_the_pool() -> None:
    """httpx loses a slot for each request that is cancelled while it connects; the next one works all the same."""

    async def main() -> None:
        async with api_of(f"{server.url}/x?execution=e-1") as api:
            for turn in range(60):
                with trio.move_on_after(0.0002 * (turn % 10)):
                    await api.renew(FILE)
            with trio.fail_after(5):
                assert (await api.renew(FILE)).url_for(FILE) is not None

    with ScriptedHttp(lambda request: response(200, BODY)) as server:
        trio.run(main)


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    """Names the file."""
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigurationError, match=r"ca\.pem"):
        api_of("https://h/x", ca_file=str(tmp_path / "ca.pem"))
