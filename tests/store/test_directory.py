"""Which cache directories are used and which are refused: `store.directory`."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.store import directory
from valohai_fuse.store.segments import SegmentStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def test_it_is_made_for_the_owner_alone(tmp_path: Path) -> None:
    cache = tmp_path / "a" / "b"
    assert directory.prepare(str(cache)) == str(cache / "v1")
    assert [p.stat().st_mode & 0o777 for p in (cache, cache / "v1")] == [0o700, 0o700]
    assert directory.prepare(str(cache)) == str(cache / "v1")


def test_ext4_spreads_what_is_below(tmp_path: Path) -> None:
    """The flag is ext4's; a directory that somebody else has made keeps what it has."""
    made, found = tmp_path / "made", tmp_path / "found"
    (found / "v1").mkdir(parents=True, mode=0o700)
    if directory._file_system(str(tmp_path)) != "ext4":
        directory.prepare(str(made))
        pytest.skip("the temporary directory is not on ext4; on other file systems nothing happens, as just now")
    for cache in (made, found):
        directory.prepare(str(cache))
    assert [is_top_directory(cache / "v1") for cache in (made, found)] == [True, False]


def is_top_directory(path: Path) -> bool:
    """As `lsattr -d` shows it by a T."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(fd, directory._GET_FLAGS, bytes(8)))
    finally:
        os.close(fd)
    return bool(flags & 0x20000)


def test_a_file_system_without_flags_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert os.path.isdir(directory.prepare(str(tmp_path / "cache")))


@pytest.mark.parametrize("below", ["", "v1"])
def test_a_link_is_refused(tmp_path: Path, below: str) -> None:
    real, cache = tmp_path / "real", tmp_path / "cache"
    real.mkdir()
    link = cache / below
    link.parent.mkdir(exist_ok=True, mode=0o700)
    os.symlink(real, link)
    with pytest.raises(ConfigurationError, match="symbolic link"):
        SegmentStore(str(cache))
    assert list(real.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
@pytest.mark.parametrize("below", ["", "v1"])
def test_one_that_others_may_write_to_is_refused(tmp_path: Path, mode: int, below: str) -> None:
    cache = tmp_path / "cache"
    (cache / "v1").mkdir(parents=True, mode=0o700)
    (cache / below).chmod(mode)
    with pytest.raises(ConfigurationError, match="other users may write") as refusal:
        SegmentStore(str(cache))
    assert refusal.value.hint is not None
    assert "chmod" in refusal.value.hint


def test_one_that_others_may_only_list_is_fine(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o755)
    SegmentStore(str(cache)).close()


@needs_root
def test_one_of_another_user_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    os.chown(cache, 12345, 12345)
    with pytest.raises(ConfigurationError, match="another user \\(uid 12345\\)"):
        SegmentStore(str(cache))


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(b"")
    with pytest.raises(ConfigurationError, match="not a directory"):
        SegmentStore(str(cache))


def test_what_lies_in_memory(tmp_path: Path) -> None:
    assert not directory.lies_in_memory("/proc/self")
    assert not directory.lies_in_memory(str(tmp_path / "no such"))


@pytest.mark.parametrize(
    ("kind", "hangs"),
    [("ext4", False), ("tmpfs", False), ("overlay", False), ("nfs4", True), ("fuse.sshfs", True), ("fuse", True)],
)
def test_what_a_server_answers_for_may_hang(
    kind: str, hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mount table; also for a directory that is still to be made."""
    device = os.stat(tmp_path).st_dev
    table = tmp_path / "mountinfo"
    table.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime master:1 - {kind} source rw\n")
    monkeypatch.setattr(directory, "MOUNT_TABLE", str(table))
    assert directory.may_hang(str(tmp_path)) is hangs
    assert directory.may_hang(str(tmp_path / "not" / "yet")) is hangs
