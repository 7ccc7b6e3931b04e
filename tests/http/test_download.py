"""`download` against the sandbox: whole inputs as ordinary files, without FUSE."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounts import run_cli, wait_until
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile, SandboxInput
from valohai_fuse.sandbox.valohai import Sandbox

MIB = 1024 * 1024
BIG = ramp(20 * MIB + 17)


def checked(name: str, content: bytes, algorithm: str = "sha256", digest: str | None = None) -> SandboxFile:
    """A file whose checksum the manifest gives."""
    right = hashlib.new(algorithm, content).hexdigest()
    return SandboxFile(name, content, overrides={"checksums": {algorithm: digest or right}})


@pytest.fixture
def sandbox(own_directories: Path) -> Iterator[Sandbox]:
    inputs = {
        "data": SandboxInput(
            [
                SandboxFile("big.bin", BIG),
                checked("d/ok.txt", b"hello\n"),
                SandboxFile("d/unknown.bin", ramp(100_000), size="null"),
                SandboxFile("empty", b"", size="zero"),
                *(SandboxFile(f"many/{n}", ramp(500 + n)) for n in range(40)),
            ]
        ),
        "other": SandboxInput([SandboxFile("x", b"x", intent="always")]),
        "nothing": SandboxInput([]),
    }
    with Sandbox(inputs, root=own_directories / "valohai") as made:
        yield made


def places(sandbox: Sandbox) -> list[str]:
    return [
        f"--config-dir={sandbox.config_dir}",
        f"--inputs-dir={sandbox.inputs_dir}",
        f"--cache-dir={sandbox.root}/cache",
    ]


def assert_complete(sandbox: Sandbox, where: str | Path, input_name: str = "data") -> None:
    entries = [entry for entry in sandbox.dataset.entries() if entry.input_name == input_name]
    assert entries
    for entry in entries:
        made = Path(where, input_name, entry.file.name)
        assert made.read_bytes() == sandbox.expected_bytes(input_name, entry.file.name)


def test_download_makes_ordinary_files(sandbox: Sandbox, tmp_path: Path) -> None:
    """Every file of the inputs named, unknown sizes and empty ones included; nothing else is left in the directory or cache."""
    to = tmp_path / "to"
    outcome = run_cli("download", *places(sandbox), "data", "nothing", "--to", str(to), "--json")
    assert outcome.returncode == 0, outcome.stderr
    summary = json.loads(outcome.stdout)
    assert (summary["files"], summary["files_done"], summary["files_failed"]) == (44, 44, 0)
    assert summary["bytes"] == summary["bytes_done"] == summary["bytes_fetched"]
    assert sorted(os.listdir(to)) == ["data", "nothing"]
    assert_complete(sandbox, to)
    assert not Path(sandbox.root, "cache").exists()
    again = run_cli("download", *places(sandbox), "data", "--to", str(to), "--json")
    assert json.loads(again.stdout)["bytes_fetched"] == 0
    assert again.returncode == 0


def test_download_goes_to_the_inputs_directory_and_leaves_what_is_there(sandbox: Sandbox) -> None:
    """By default each file is where a mount would show it; a file that Valohai downloaded already is not fetched."""
    outcome = run_cli("download", *places(sandbox), "data", "other")
    assert outcome.returncode == 0, outcome.stderr
    assert_complete(sandbox, sandbox.inputs_dir)
    assert sandbox.store.sent_bytes("other/*") == 0
    assert sorted(os.listdir(sandbox.inputs_dir)) == ["data", "other"]


def test_an_interrupted_download_goes_on(sandbox: Sandbox, tmp_path: Path) -> None:
    """SIGINT: exit code 130, no half file under its name; the next run fetches only what is missing."""
    sandbox.store.faults.add(faults.drip(65536, 0.05), path="data/big.bin", first=3, count=None)
    command = [
        sys.executable,
        "-m",
        "valohai_fuse",
        "download",
        *places(sandbox),
        "data",
        "--to",
        str(tmp_path),
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until("much was sent", lambda: sandbox.store.sent_bytes("data/big.bin") > 17 * MIB)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert json.loads(said)["interrupted"]
    assert not (tmp_path / "data/big.bin").exists()
    sandbox.store.faults.clear()
    again = run_cli("download", *places(sandbox), "data", "--to", str(tmp_path), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["bytes_fetched"] < 8 * MIB
    assert_complete(sandbox, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["data"]


def test_a_killed_download_goes_on(sandbox: Sandbox, tmp_path: Path) -> None:
    """kill -9 at any moment: nothing but complete files under their names, and the next run completes the rest."""
    sandbox.store.faults.add(faults.drip(65536, 0.02), path="data/big.bin", count=None)
    command = [sys.executable, "-m", "valohai_fuse", "download", *places(sandbox), "data", "--to", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until("much was sent", lambda: sandbox.store.sent_bytes("data/big.bin") > 6 * MIB)
        process.kill()
    for made in (tmp_path / "data").rglob("*"):
        if made.is_file():
            name = str(made.relative_to(tmp_path / "data"))
            assert made.read_bytes() == sandbox.expected_bytes("data", name)
    sandbox.store.faults.clear()
    assert run_cli("download", *places(sandbox), "data", "--to", str(tmp_path)).returncode == 0
    assert_complete(sandbox, tmp_path)


def test_what_is_not_what_valohai_knows_is_not_kept(own_directories: Path, tmp_path: Path) -> None:
    """A wrong checksum, a missing object, a file of another size in the way: told by path, exit code 1; the others are there."""
    files = [
        checked("good", b"good" * 1000, "md5"),
        checked("forged", b"evil", "sha1", "0" * 40),
        SandboxFile("gone", b"gone"),
        SandboxFile("taken", b"taken"),
    ]
    with Sandbox({"data": files}, root=own_directories / "valohai") as sandbox:
        sandbox.store.faults.add(faults.status(404), path="data/gone", count=None)
        (tmp_path / "data").mkdir()
        (tmp_path / "data/taken").write_bytes(b"my own")
        outcome = run_cli("download", *places(sandbox), "data", "--to", str(tmp_path), "--json")
        assert outcome.returncode == 1
        failures = {Path(one["path"]).name: one["error"] for one in json.loads(outcome.stdout)["failures"]}
        assert set(failures) == {"forged", "gone", "taken"}
        assert "sha1" in failures["forged"]
        assert "404" in failures["gone"]
        assert "6 bytes" in failures["taken"]
        assert (tmp_path / "data/good").read_bytes() == b"good" * 1000
        assert (tmp_path / "data/taken").read_bytes() == b"my own"
        assert not (tmp_path / "data/forged").exists()


def test_urls_that_expire_on_the_way_are_renewed(own_directories: Path, tmp_path: Path) -> None:
    """URLs that were dead before it began, as when a job starts late."""
    with Sandbox(
        {"data": {"a": ramp(MIB)}}, root=own_directories / "valohai", url_lifetime_s=60, manifest_age_s=600
    ) as made:
        outcome = run_cli("download", *places(made), "data", "--to", str(tmp_path))
        assert outcome.returncode == 0, outcome.stderr
        assert_complete(made, tmp_path)


def test_download_refuses_what_it_cannot_do(sandbox: Sandbox, tmp_path: Path) -> None:
    """No such input, a target that cannot be, a disk that is too small, another download at the same place."""
    unknown = run_cli("download", *places(sandbox), "nope")
    assert unknown.returncode == 2
    assert "inputs that exist: data, nothing, other" in unknown.stderr
    (tmp_path / "file").write_bytes(b"")
    taken = run_cli("download", *places(sandbox), "data", "--to", str(tmp_path / "file"))
    assert taken.returncode == 1
    assert "cannot write to" in taken.stderr
    huge = {"data": {"files": [{"name": "huge", "size": 2**60, "download_intent": "on-demand"}]}}
    Path(sandbox.config_dir, "inputs.json").write_text(json.dumps(huge))
    small = run_cli("download", *places(sandbox), "data", "--to", str(tmp_path / "to"))
    assert small.returncode == 1
    assert "bytes free" in small.stderr
    assert all("Traceback" not in outcome.stderr for outcome in (unknown, taken, small))
