"""`run` besides mounting: what it says between the command's own lines."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from support.mounts import MountedSandbox, run_cli
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
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
