"""nginx as the store: it serves ranges on signed URLs and refuses them after expiry, and a Sandbox can hand them out."""

from __future__ import annotations

import json
import ssl
import time
import urllib.request
from pathlib import Path

import pytest

from support.nginx import Nginx
from support.raw_http import ranged_get, raw_request
from valohai_fuse.sandbox import Sandbox, ramp
from valohai_fuse.sandbox.content import read_all
from valohai_fuse.sandbox.dataset import Dataset

if (_missing := Nginx.missing()) is not None:
    pytest.skip(f"needs {_missing}", allow_module_level=True)

SIZE = 1_000_000
NAME = "dir/a b+c (ä)%41.bin"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    Dataset({"data": {NAME: ramp(SIZE), "empty": b""}}).materialise(str(tmp_path))
    return tmp_path


def test_ranges_come_from_a_signed_url(directory: Path) -> None:
    """206 with Content-Range and ETag; 416 behind the end; HEAD refused; the record counts."""
    with Nginx(directory) as nginx:
        url = nginx.url_for(f"data/{NAME}", 60)
        answer = ranged_get(url, 1000, 2000)
        assert (answer.status, answer.headers["content-range"]) == (206, f"bytes 1000-1999/{SIZE}")
        assert answer.headers["etag"]
        assert answer.body == read_all(ramp(SIZE), 1000, 2000)
        assert ranged_get(url, SIZE, SIZE + 1).status == 416
        assert raw_request(url, method="HEAD").status == 403
        assert raw_request(nginx.url_for("data/nothing", 60)).status == 404
        first = nginx.requests()[0]
        assert (first.path, first.status, first.sent_bytes, first.range) == (
            *(f"data/{NAME}", 206, 1000, "bytes=1000-1999"),
        )


def test_it_refuses_once_the_url_has_expired(directory: Path) -> None:
    """The same URL, first served, then 403; a tampered or unsigned one never."""
    with Nginx(directory) as nginx:
        assert ranged_get(nginx.url_for("data/empty", -5), 0, 1).status == 403
        url = nginx.url_for(f"data/{NAME}", 2)
        assert ranged_get(url, 0, 1).status == 206
        deadline_s = time.monotonic() + 10
        while (answer := ranged_get(url, 0, 1)).status == 206:
            assert time.monotonic() < deadline_s
        assert (answer.status, answer.body) == (403, b"expired\n")
        fresh = nginx.url_for(f"data/{NAME}", 60)
        assert ranged_get(fresh, 0, 1).status == 206
        assert ranged_get(fresh.replace("expires=1", "expires=2"), 0, 1).status == 403
        assert ranged_get(fresh.partition("?")[0], 0, 1).status == 403


def test_a_sandbox_hands_out_its_urls(tmp_path: Path) -> None:
    """Manifest and API both; the token stays with the API."""
    inputs = {"data": {NAME: ramp(SIZE)}}
    Dataset(inputs).materialise(str(tmp_path))
    with Nginx(tmp_path) as nginx, Sandbox(inputs, url_for=nginx.url_for, url_lifetime_s=60) as sandbox:
        manifest = json.loads(Path(sandbox.config_dir, "inputs.json").read_text())
        said = json.loads(Path(sandbox.config_dir, "api.json").read_text())["input_request"]
        renewed = json.loads(raw_request(said["url"], said["headers"], method="POST").body)
        for url in (manifest["data"]["files"][0]["storage_uri"], renewed[0]["files"][0]["url"]):
            assert url.startswith(nginx.origin)
            assert ranged_get(url, 5, 300).body == sandbox.expected_bytes("data", NAME, 5, 300)
        assert not any(request.authorization for request in nginx.requests())


def test_it_stops_and_comes_back_on_the_same_port(directory: Path) -> None:
    """Refused in between; the old URLs still work afterwards."""
    with Nginx(directory) as nginx:
        url = nginx.url_for(f"data/{NAME}", 60)
        nginx.stop()
        with pytest.raises(ConnectionRefusedError):
            raw_request(url)
        nginx.start()
        assert ranged_get(url, 0, 1).status == 206
        root = nginx._root
    assert not Path(root).exists()


@pytest.mark.skipif(Nginx.missing_for_delays() is not None, reason="needs nginx's Lua module")
def test_it_can_be_20_ms_away(directory: Path) -> None:
    """The delay comes before each response; a new connection pays its own on top."""
    with Nginx(directory, first_byte_delay_ms=50, connect_delay_ms=100) as nginx:
        started_s = time.monotonic()
        assert ranged_get(nginx.url_for(f"data/{NAME}", 60), 0, 1, {"Connection": "close"}).status == 206
        assert time.monotonic() - started_s >= 0.15


def test_its_rate_can_be_capped(directory: Path) -> None:
    """So many bytes a second for each response."""
    with Nginx(directory, rate_bytes_per_s=500_000) as nginx:
        started_s = time.monotonic()
        assert len(raw_request(nginx.url_for(f"data/{NAME}", 60)).body) == SIZE
        assert time.monotonic() - started_s >= 0.9


def test_tls_is_verified(directory: Path) -> None:
    """With its own authority only."""
    with Nginx(directory, tls=True) as nginx:
        context = ssl.create_default_context(cafile=nginx.ca_file)
        with urllib.request.urlopen(nginx.url_for(f"data/{NAME}", 60), context=context, timeout=5) as answer:
            assert answer.read() == read_all(ramp(SIZE))


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """nginx's own words in the error."""
    nginx = Nginx(tmp_path / 'a"b')  # a quote within a quoted path is no configuration that nginx takes
    with pytest.raises(RuntimeError, match="nginx did not start"), nginx:
        pass
    assert nginx._process is None
    assert not Path(nginx._root).exists()
