"""`run` besides mounting: what it says between the command's own lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.mounts import MountedSandbox, MountInputs, run_cli
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import InputSpec
from valohai_fuse.sandbox.valohai import Sandbox

INFO_LINE = re.compile(r"Z INFO ")


def test_run_keeps_its_log_out_of_the_commands_output(own_directories: Path) -> None:
    """stderr has warnings only, with INFO in the mount's log file; `--log-level` says otherwise; so does its variable."""
    with Sandbox({"data": {"a.bin": ramp(100_000)}}, root=own_directories / "valohai") as sandbox:
        mounted = MountedSandbox(sandbox)
        quiet = mounted.cli("run", "--", "wc", "-c", str(mounted.path("data", "a.bin")))
        assert quiet.returncode == 0
        assert not INFO_LINE.search(quiet.stderr)
        assert INFO_LINE.search(mounted.log())
        loud = mounted.cli("run", "--log-level=INFO", "--", "true")
        assert INFO_LINE.search(loud.stderr)


@pytest.mark.usefixtures("own_directories")
def test_the_variable_counts_as_asking_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """VALOHAI_FUSE_LOG_LEVEL is as good as the flag; with --log-file only warnings are echoed."""
    monkeypatch.setenv("VALOHAI_FUSE_LOG_LEVEL", "INFO")
    with Sandbox({"data": {"a.bin": ramp(1000)}}) as sandbox:
        mounted = MountedSandbox(sandbox)
        assert INFO_LINE.search(mounted.cli("run", "--", "true").stderr)
        file = Path(sandbox.root, "own.log")
        assert not INFO_LINE.search(mounted.cli("run", f"--log-file={file}", "--", "true").stderr)
        assert INFO_LINE.search(file.read_text())


def test_run_shows_what_went_wrong_with_a_read(own_directories: Path) -> None:
    """A read that fails is told on stderr by a WARNING that names the file, and in the log file."""
    with Sandbox({"data": {"a.bin": ramp(100_000)}}, root=own_directories / "valohai") as sandbox:
        sandbox.store.faults.add(faults.status(404), count=None)
        mounted = MountedSandbox(sandbox)
        outcome = run_cli("run", *mounted.places, "--", "cat", str(mounted.path("data", "a.bin")))
        assert outcome.returncode == 1
        assert re.search(r"WARNING data .*gave up on a\.bin", outcome.stderr)
        assert re.search(r"WARNING data .*gave up on a\.bin", mounted.log())
        assert os.listdir(sandbox.inputs_dir) == []


def without_fuse(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as root without CAP_SYS_ADMIN, as in a container that was not granted it."""
    setpriv = ["setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin"]
    return subprocess.run(
        [*setpriv, *command], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


def run_without_fuse(mounted: MountedSandbox, *arguments: str) -> subprocess.CompletedProcess[str]:
    return without_fuse(sys.executable, "-m", "valohai_fuse", "run", *mounted.places, *arguments)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a capability away, which takes root")
def test_run_downloads_where_fuse_is_not_permitted(own_directories: Path) -> None:
    """`--fallback download`: the same paths hold the same bytes, then CMD runs and its status is kept; without it exit 4."""
    inputs: dict[str, InputSpec] = {"data": {"d/a.bin": ramp(100_000), "b.txt": b"hello\n"}, "more": {"c.txt": b"c"}}
    with Sandbox(inputs, root=own_directories / "valohai") as sandbox:
        mounted = MountedSandbox(sandbox)
        refused = run_without_fuse(mounted, "--", "true")
        assert refused.returncode == 4
        assert os.listdir(sandbox.inputs_dir) == []
        command = ["sh", "-c", "cat $VH_INPUTS_DIR/data/b.txt; exit 7"]
        outcome = run_without_fuse(mounted, "--fallback", "download", "--input", "data", "--", *command)
        assert (outcome.returncode, outcome.stdout) == (7, "hello\n"), outcome.stderr
        assert "downloading instead" in outcome.stderr
        assert mounted.path("data", "d/a.bin").read_bytes() == sandbox.expected_bytes("data", "d/a.bin")
        assert os.listdir(sandbox.inputs_dir) == ["data"]
        root = own_directories / "elsewhere"
        outcome = run_without_fuse(mounted, "--fallback=download", f"--root={root}", "--", "cat", f"{root}/more/c.txt")
        assert (outcome.returncode, outcome.stdout) == (0, "c")
        # A thread that the download left would be given the signals that `run` waits for: a quick CMD was waited for for ever.
        count = ["sh", "-c", "ls /proc/$PPID/task | wc -l"]
        outcome = run_without_fuse(mounted, "--fallback=download", f"--root={root}", "--", *count)
        assert (outcome.returncode, outcome.stdout.strip()) == (0, "1")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a capability away, which takes root")
def test_run_does_not_run_on_half_of_the_data(own_directories: Path) -> None:
    """When a file cannot be downloaded, CMD is not run."""
    with Sandbox({"data": {"a": b"a", "b": b"b"}}, root=own_directories / "valohai") as sandbox:
        sandbox.store.faults.add(faults.status(404), path="data/a", count=None)
        outcome = run_without_fuse(MountedSandbox(sandbox), "--fallback", "download", "--", "echo", "ran")
        assert (outcome.returncode, outcome.stdout) == (1, "")
        assert "the command was not run" in outcome.stderr


def test_run_with_a_fallback_mounts_where_it_can(own_directories: Path) -> None:
    with Sandbox({"data": {"a": b"a", "b": b"b"}}, root=own_directories / "valohai") as sandbox:
        mounted = MountedSandbox(sandbox)
        outcome = mounted.cli("run", "--fallback", "download", "--", "cat", str(mounted.path("data", "a")))
        assert (outcome.returncode, outcome.stdout) == (0, "a")
        assert mounted.sent_bytes("data/b") == 0
        assert os.listdir(sandbox.inputs_dir) == []


def test_download_onto_a_mount_is_refused(mount_inputs: MountInputs) -> None:
    """What is mounted looks complete already: downloading there would do nothing, so it is said instead."""
    mounted = mount_inputs({"data": {"a": b"a"}})
    outcome = mounted.cli("download", "data")
    assert outcome.returncode == 2
    assert "is mounted" in outcome.stderr
