"""What is mounted, by whom: one small record per mount in the runtime directory, next to its socket and its log.

The records are hints for people and for `unmount`, `status` and `info`; the truth is the kernel's mount table and /proc, and
every reader here compares. The directory is 0700 and must belong to us: whoever could put a record there could make us unmount
or connect to something. Changes of records happen under `lock` (flock), so that a supervisor that tidies up and a command that
mounts anew never meet.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from valohai_fuse.errors import ConfigurationError

ID_READABLE_CHARACTERS = 40


class MountRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One mount as its supervisor wrote it down."""

    id: str
    mountpoint: str
    inputs: tuple[str, ...]
    as_root: bool
    pid: int
    process_start: int
    """Start time of `pid` in clock ticks since boot: tells it from a later process of the same number."""
    supervisor_pid: int
    started_at_s: float
    control_path: str
    log_path: str
    config_dir: str
    inputs_dir: str
    grace_period: float
    made_directories: tuple[str, ...] = ()
    """Directories that were made for this mount, outermost first; removed with it where they are empty."""


@dataclass(frozen=True, slots=True)
class RuntimeDir:
    """The directory at `path`; `ensure` before anything is written."""

    path: str

    def ensure(self) -> None:
        """Makes it (0700). Raises ConfigurationError when it cannot be made or is not ours alone."""
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            found = os.lstat(self.path)
        except OSError as error:
            raise ConfigurationError(
                f"cannot make the runtime directory {self.path}: {error.strerror}",
                hint="name another with --runtime-dir",
            ) from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigurationError(
                f"the runtime directory {self.path} belongs to somebody else", hint="name another with --runtime-dir"
            )
        if found.st_mode & 0o077:
            os.chmod(self.path, 0o700)

    def is_trusted(self) -> bool:
        """Whether it is there, a directory, and ours."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()

    def file(self, mount_id: str, suffix: str) -> str:
        """The path of the record (`json`), socket (`sock`) or log (`log`) of a mount."""
        return os.path.join(self.path, f"{mount_id}.{suffix}")

    def records(self) -> list[MountRecord]:
        """All readable records, by mount point; none when the directory is not there or not ours."""
        if not self.is_trusted():
            return []
        found = []
        for name in os.listdir(self.path):
            if name.endswith(".json"):
                with (
                    contextlib.suppress(OSError, msgspec.MsgspecError),
                    open(os.path.join(self.path, name), "rb") as file,
                ):
                    found.append(msgspec.json.decode(file.read(), type=MountRecord))
        return sorted(found, key=lambda record: record.mountpoint)

    def write(self, record: MountRecord) -> None:
        """Replaces the record of its mount; whole or not at all."""
        target = self.file(record.id, "json")
        descriptor = os.open(
            target + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(record))
        os.rename(target + ".new", target)

    def forget(self, record: MountRecord) -> None:
        """Tidies up after a mount that is gone: its made directories where empty, its socket, its record. Never raises.

        Does nothing when the record has been replaced by that of a later mount, or was tidied up already.
        """
        with contextlib.suppress(OSError, ConfigurationError), self.lock():
            if record not in self.records():
                return
            for directory in reversed(record.made_directories):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
            for path in (record.control_path, self.file(record.id, "json")):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Guards the records; waits for whoever has it (they hold it for milliseconds)."""
        with self._locked("lock"):
            yield

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Lets one command at a time look at mount points and mount there; waits for the one before, until its mounts answer.

        Makes the directory. Raises as `ensure` does.
        """
        self.ensure()
        with self._locked("starting.lock"):
            yield

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(os.path.join(self.path, name), flags, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                raise ConfigurationError(
                    f"the runtime directory {self.path} cannot be locked: {error.strerror}",
                    hint="name one on a local file system with --runtime-dir",
                ) from None
            yield
        finally:
            os.close(descriptor)


def mount_id(mountpoint: str) -> str:
    """A file name for a mount point: its last component, and a hash that tells it from all others."""
    readable = re.sub(r"[^A-Za-z0-9.\-]+", "-", os.path.basename(mountpoint)).strip("-.")[:ID_READABLE_CHARACTERS]
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:8]
    return f"{readable or 'mount'}-{digest}"


def process_start(pid: int) -> int | None:
    """When `pid` started (clock ticks since boot); None when there is no such process, or only its zombie is left."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


def is_running(record: MountRecord) -> bool:
    """Whether the daemon of `record` still runs."""
    return process_start(record.pid) == record.process_start
