"""The sandbox in a process of its own, as the demo and the measurements use it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from support.raw_http import ranged_get, raw_request
from valohai_fuse.sandbox import ABSENT, RemoteSandbox, SandboxFile, demo_data, ramp
from valohai_fuse.sandbox.content import Rows
from valohai_fuse.sandbox.remote import decode_inputs, encode_inputs


def test_it_is_told_the_same_words(tmp_path: Path) -> None:
    """Expiry, stop and start, faults and counts work across the process border."""
    path = tmp_path / "file"
    path.write_bytes(b"on disk")
    inputs = {"data": [SandboxFile("x", ramp(1000)), SandboxFile("y", b"abc"), SandboxFile("z", path)]}
    with RemoteSandbox(inputs, url_lifetime_s=60) as sandbox:
        assert Path(sandbox.config_dir, "inputs.json").exists()
        assert Path(sandbox.config_dir, "api.json").exists()
        url = sandbox.mint("data", "x")
        assert ranged_get(url, 5, 9).body == sandbox.expected_bytes("data", "x", 5, 9)
        assert raw_request(sandbox.mint("data", "z")).body == b"on disk"
        assert sandbox.statistics()["store"]["sent_bytes"] == 4 + 7
        sandbox.expire_urls()
        assert ranged_get(url, 5, 9).status == 403
        sandbox.fault("store", "status", code=500, rule={"count": 2})
        assert [ranged_get(sandbox.mint("data", "y"), 0, 1).status for _ in range(3)] == [500, 500, 206]
        assert sandbox.requests[-1]["path"] == "data/y"
        sandbox.stop_store()
        with pytest.raises(ConnectionRefusedError):
            ranged_get(url, 0, 1)
        sandbox.start_store()
        sandbox.set("first_byte_delay_s", 0.1)
        started_s = time.monotonic()
        ranged_get(url, 0, 1)
        assert time.monotonic() - started_s >= 0.1
        with pytest.raises(ValueError, match="KeyError"):
            sandbox.mint("data", "nothing")
        root = sandbox.addresses["root"]
    assert not Path(root).exists()


def test_a_kept_one_outlives_its_parent_and_ends_on_sigterm() -> None:
    """After detach it serves on; SIGTERM removes its files."""
    with RemoteSandbox({"data": {"x": b"abc"}}, keep=True) as sandbox:
        url = sandbox.mint("data", "x")
        pid = sandbox.detach()
    try:
        assert raw_request(url).body == b"abc"
        with pytest.raises(ConnectionError):
            sandbox.statistics()
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    assert not Path(sandbox.addresses["root"]).exists()


def test_one_that_is_not_kept_ends_with_its_input() -> None:
    """Whoever started it and dies takes it along."""
    with RemoteSandbox({"data": {"x": b"abc"}}) as sandbox:
        process = sandbox._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
        assert not Path(sandbox.addresses["root"]).exists()


def test_one_that_cannot_start_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """An error, and no process left."""
    sandbox = RemoteSandbox({"data": {"x": b"abc"}}, no_such_option=1)
    with pytest.raises(ConnectionError, match="has ended"):
        sandbox.start()
    assert sandbox._process is None
    assert "no_such_option" in capfd.readouterr().err


def test_inputs_survive_the_way_there_and_back() -> None:
    """Every field, ABSENT included; generated lines are refused."""
    file = SandboxFile("x", b"abc", "always", [{"k": 1}], "null", {"uri": ABSENT, "datum_id": None})
    decoded = decode_inputs({"inputs": encode_inputs({"data": [file]})})
    assert encode_inputs(decoded) == encode_inputs({"data": [file]})
    with pytest.raises(TypeError, match="Rows"):
        encode_inputs({"data": {"x": Rows(b"", lambda _: b"x\n", 2, 5)}})


def test_the_demos_data_is_up_within_two_seconds_and_is_what_it_says() -> None:
    """A CSV of 200 MB with whole lines, pictures, and a file larger than the disk."""
    times_s: list[float] = []
    while not times_s or (min(times_s) >= 2 and len(times_s) < 5):  # the best of a few: the machine may be busy
        started_s = time.monotonic()
        with RemoteSandbox():
            times_s.append(time.monotonic() - started_s)
    assert min(times_s) < 2
    with RemoteSandbox() as sandbox:
        url = sandbox.mint(demo_data.CSV_INPUT, demo_data.CSV_NAME)
        head = ranged_get(url, 0, 1000)
        size = int(head.headers["content-range"].rpartition("/")[2])
        assert 199_000_000 < size < 201_000_000
        lines = head.body.decode().split("\n")[:-1]
        assert lines[0] == "reading,time_of_day,station,temperature_c,humidity_percent"
        assert lines[1].startswith("000000000,00:00:00,station-")
        assert all(line.count(",") == 4 for line in lines)
        assert ranged_get(url, size - 44, size).body.count(b"\n") == 2
        assert ranged_get(url, 500, 600).body == head.body[500:600]
        big = ranged_get(sandbox.mint(demo_data.CHECKPOINT_INPUT, demo_data.CHECKPOINT_NAME), 0, 1)
        assert big.headers["content-range"] == "bytes 0-0/500000000000"
        assert raw_request(sandbox.mint(demo_data.IMAGES_INPUT, "cats/0000.png")).body.startswith(b"\x89PNG")
