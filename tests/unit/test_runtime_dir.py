"""Where the records of mounts lie: on a file system without locks, or gone."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.obs.runtime_dir import MountRecord, RuntimeDir

RECORD = MountRecord(
    id="data-1",
    mountpoint="/valohai/inputs/data",
    inputs=("data",),
    as_root=False,
    pid=1,
    process_start=0,
    supervisor_pid=1,
    started_at_s=0,
    control_path="/nowhere/data-1.sock",
    log_path="/nowhere/data-1.log",
    config_dir="/valohai/config",
    inputs_dir="/valohai/inputs",
    grace_period=1,
)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_named(tmp_path: Path) -> None:
    """NFS without its lock daemon, as an administrator meets it: which directory, why, and what to do."""
    with pytest.raises(ConfigurationError) as caught, RuntimeDir(str(tmp_path)).starting():
        pytest.fail("two commands could mount at once")
    assert caught.value.message == f"the runtime directory {tmp_path} cannot be locked: No locks available"
    assert caught.value.hint == "name one on a local file system with --runtime-dir"


@pytest.mark.usefixtures("without_locks")
def test_forgetting_without_locks_leaves_the_record(tmp_path: Path) -> None:
    runtime = RuntimeDir(str(tmp_path))
    runtime.write(RECORD)
    runtime.forget(RECORD)
    assert runtime.records() == [RECORD]


def test_forgetting_what_is_gone_with_its_directory_is_nothing(tmp_path: Path) -> None:
    RuntimeDir(str(tmp_path / "gone")).forget(RECORD)
