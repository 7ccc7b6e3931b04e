"""A mount that fails says why, in libfuse's own words, and as the error that the reason stands for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from valohai_fuse.errors import FuseUnavailableError, MountFailedError, ValohaiFuseError
from valohai_fuse.mount.session import mount_error

LAST = "fuse_session_mount failed"


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        ("fusermount3: mount failed: Operation not permitted", FuseUnavailableError, "Operation not permitted"),
        ("fuse: mount failed: Permission denied", FuseUnavailableError, "mount failed: Permission denied"),
        ("fuse: device not found, try 'modprobe fuse' first", FuseUnavailableError, "device not found"),
        ("fuse: failed to open /dev/fuse: Permission denied", FuseUnavailableError, "/dev/fuse"),
        ("fuse: failed to exec fusermount3: No such file or directory", FuseUnavailableError, "exec fusermount3"),
        ("fuse: failed to access mountpoint /m: Permission denied", MountFailedError, "Permission denied"),
        ("fusermount3: user has no write access to mountpoint /m", MountFailedError, "no write access"),
        ("fuse: unknown option(s): `-o nope'", MountFailedError, "unknown option"),
    ],
)
def test_the_reason_is_libfuses_own(said: str, kind: type[ValohaiFuseError], reason: str) -> None:
    """Not permitted on this machine is FuseUnavailableError (exit code 4), a mount point that will not do is not."""
    error = mount_error("/m", [said, LAST])
    assert type(error) is kind
    assert reason in error.message
    assert LAST not in error.message
    assert error.hint


def test_without_a_word_pyfuse3s_own_stands() -> None:
    error = mount_error("/m", [LAST])
    assert (type(error), error.message) == (MountFailedError, f"/m: {LAST}")


def test_a_real_failure_is_heard_and_stderr_is_given_back(tmp_path: Path) -> None:
    """libfuse says it on the descriptor, below Python; afterwards stderr is what it was."""
    code = (
        "import sys, pyfuse3\n"
        "from valohai_fuse.errors import ValohaiFuseError\n"
        "from valohai_fuse.mount.session import Session\n"
        "try:\n"
        "    Session(pyfuse3.Operations(), sys.argv[1]).mount(source='x', allow_other=False)\n"
        "except ValohaiFuseError as error:\n"
        "    print(type(error).__name__, error.message)\n"
        "print('still here', file=sys.stderr)\n"
    )
    place = tmp_path / "nowhere"
    source = str(Path(__file__).resolve().parents[2] / "src")
    outcome = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}", str(place)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=os.fspath(tmp_path),
    )
    assert outcome.stdout.startswith("MountFailedError ")
    assert "No such file or directory" in outcome.stdout or "/dev/fuse" in outcome.stdout
    assert outcome.stderr == "still here\n"
