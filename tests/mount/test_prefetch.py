"""`prefetch` on real mounts: through the daemon, in bounds, and Ctrl-C keeps what has landed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.mounts import MountInputs, wait_until
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile

MIB = 1024 * 1024
ALWAYS = None


def test_prefetch_warms_files_and_directories_and_reads_need_no_store(mount_inputs: MountInputs) -> None:
    """After `prefetch PATH...` everything below the paths is read without the network, and nothing else was fetched."""
    files = [SandboxFile(f"d/{n}.bin", ramp(70_000 + n)) for n in range(20)]
    mounted = mount_inputs(
        {
            "data": [*files, SandboxFile("big.bin", ramp(20 * MIB)), SandboxFile("unwanted.bin", ramp(MIB))],
            "more": [SandboxFile("odd.bin", ramp(5000), size="zero")],
        }
    )
    outcome = mounted.cli(
        "prefetch",
        "--json",
        str(mounted.path("data", "d")),
        str(mounted.path("data", "big.bin")),
        str(mounted.path("more")),
    )
    assert outcome.returncode == 0, outcome.stderr
    summary = json.loads(outcome.stdout)
    total = sum(70_000 + n for n in range(20)) + 20 * MIB + 5000
    assert summary["files"] == summary["files_done"] == 22
    assert summary["bytes"] == summary["bytes_done"] == summary["bytes_fetched"] == total
    assert (summary["files_failed"], summary["failures"], summary["interrupted"]) == (0, [], False)
    assert "prefetch: 22 of 22 files" in outcome.stderr
    assert mounted.sent_bytes("data/unwanted.bin") == 0
    sent = mounted.sent_bytes()
    for name in [*(f"d/{n}.bin" for n in range(20)), "big.bin"]:
        assert mounted.path("data", name).read_bytes() == mounted.sandbox.expected_bytes("data", name)
    assert mounted.path("more", "odd.bin").read_bytes() == mounted.sandbox.expected_bytes("more", "odd.bin")
    assert mounted.sent_bytes() == sent


def test_prefetch_from_a_list_and_a_second_time(mount_inputs: MountInputs, tmp_path: Path) -> None:
    """`--from-file LIST`, a path a line; what is cached is not fetched again; a path named twice counts once."""
    names = [f"f {n}.bin" for n in range(300)]
    mounted = mount_inputs({"data": [SandboxFile(name, ramp(1000)) for name in names]})
    listed = tmp_path / "list"
    listed.write_text("\n".join(str(mounted.path("data", name)) for name in [*names, *names]) + "\n\n")
    first = json.loads(mounted.cli("prefetch", "--json", "--from-file", str(listed)).stdout)
    assert (first["files_done"], first["bytes_fetched"]) == (300, 300_000)
    again = json.loads(mounted.cli("prefetch", "--json", str(mounted.path("data"))).stdout)
    assert (again["files_done"], again["bytes_done"], again["bytes_fetched"]) == (300, 300_000, 0)


def test_prefetch_of_what_is_not_there_fetches_nothing(mount_inputs: MountInputs, tmp_path: Path) -> None:
    """A name that the mount does not have, a path outside, nothing at all: usage errors, before the first byte."""
    mounted = mount_inputs({"data": [SandboxFile("a.bin", ramp(1000))], "more": [SandboxFile("b.bin", ramp(1000))]})
    good = str(mounted.path("data", "a.bin"))
    for wrong in (str(mounted.path("more", "nope")), str(tmp_path / "elsewhere")):
        outcome = mounted.cli("prefetch", good, wrong)
        assert outcome.returncode == 2, outcome.stderr
        assert "nope" in outcome.stderr or "not below a mount" in outcome.stderr
    assert mounted.cli("prefetch").returncode == 2
    assert mounted.cli("prefetch", "--from-file", str(tmp_path / "nope")).returncode == 2
    assert mounted.sent_bytes() == 0


def test_prefetch_tells_the_file_that_failed_and_brings_the_others(mount_inputs: MountInputs) -> None:
    """Exit code 1, the file by its path, and everything else is in the cache."""
    files = [SandboxFile(f"{n}.bin", ramp(1000)) for n in range(5)]
    mounted = mount_inputs({"data": files}, expected_warnings=(r"gave up on 3\.bin",))
    mounted.sandbox.store.faults.add(faults.status(404), path="data/3.bin", count=ALWAYS)
    outcome = mounted.cli("prefetch", "--json", str(mounted.path("data")))
    assert outcome.returncode == 1
    summary = json.loads(outcome.stdout)
    assert (summary["files_done"], summary["files_failed"]) == (4, 1)
    assert summary["failures"][0]["path"] == str(mounted.path("data", "3.bin"))
    assert "error: " in outcome.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_prefetch_stops_and_keeps_what_has_landed(mount_inputs: MountInputs, number: int) -> None:
    """Ctrl-C: exit code 130, the landed part is cached, and no request goes on."""
    mounted = mount_inputs({"data": [SandboxFile("big.bin", ramp(256 * MIB))]})
    mounted.sandbox.store.faults.add(faults.drip(65536, 0.02), count=ALWAYS)
    command = [sys.executable, "-m", "valohai_fuse", "prefetch", "--json", *mounted.places, str(mounted.path("data"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until("bytes were sent", lambda: mounted.sent_bytes() > 8 * MIB)
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    summary = json.loads(said)
    assert summary["interrupted"]
    assert 0 < summary["bytes_done"] < 256 * MIB
    info = json.loads(mounted.cli("info", "--json", str(mounted.path("data"))).stdout)[0]
    assert info["cached_bytes"] >= summary["bytes_done"] // 2
    wait_until("no flight goes on", lambda: mounted.status()["mounts"][0]["metrics"]["flights"] == 0)


def test_prefetch_shows_a_bar_on_a_terminal(mount_inputs: MountInputs) -> None:
    """On a terminal stderr shows the files and the bytes as they come."""
    mounted = mount_inputs({"data": [SandboxFile("a.bin", ramp(3 * MIB))]})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "valohai_fuse", "prefetch", *mounted.places, str(mounted.path("data"))]
    try:
        assert subprocess.run(command, stderr=theirs, stdout=theirs, timeout=30, check=False).returncode == 0
        said = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "1/1 files" in said
    assert "3.0/3.0 MiB" in said
