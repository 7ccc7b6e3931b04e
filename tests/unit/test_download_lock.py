"""One download at a time into a directory, and what is said where that cannot be had."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from valohai_fuse import downloading
from valohai_fuse.errors import ValohaiFuseError


def test_a_second_download_into_the_same_directory_is_refused(tmp_path: Path) -> None:
    partial_dir = str(tmp_path / ".partial")
    descriptor = downloading._lock(partial_dir)
    with pytest.raises(ValohaiFuseError) as caught:
        downloading._lock(partial_dir)
    assert caught.value.message == f"another download is writing to {tmp_path}"
    os.close(descriptor)
    os.close(downloading._lock(partial_dir))


def test_a_file_system_without_locks_is_not_taken_for_another_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValohaiFuseError) as caught:
        downloading._lock(str(tmp_path / ".partial"))
    assert caught.value.message == f"{tmp_path} cannot be locked: No locks available"
