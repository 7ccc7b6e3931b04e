"""Makes the cache directory and refuses one that other users could tamper with.

The checksums of the format find accidents, not forgery: who can write into the directory can make a reader see other bytes.
So it must be a real directory, ours, and writable by nobody else. Must not know segments.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.model.segment import FORMAT_DIRECTORY
from valohai_fuse.store.calls import DiskCalls

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
"""FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of linux/fs.h, for a `long` of 64 bits."""
_TOP_DIRECTORY = 0x00020000
"""FS_TOPDIR_FL: what is below has nothing to do with one another. ext4 then spreads the directories over its block groups."""
MOUNT_TABLE = "/proc/self/mountinfo"
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
_SERVED_FILE_SYSTEMS = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "ocfs2",
        "smb3",
        "virtiofs",
    }
)
"""Those that hang when a server, or another host, is gone; and everything on FUSE, where a process is the server."""


def prepare(cache_dir: str) -> str:
    """Makes `cache_dir` (0700, parents as needed) and the format's directory in it; returns the latter's path.

    Raises ConfigurationError when the directory is not safe to use, OSError when it cannot be made.
    """
    os.makedirs(os.path.dirname(cache_dir) or ".", exist_ok=True)
    home = os.path.join(cache_dir, FORMAT_DIRECTORY)
    for path in (cache_dir, home):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError:
            if not os.path.lexists(path):  # mkdir says EROFS or EACCES even of a directory that exists
                raise
        else:
            if path == home:
                _spread(home)
        _check(path)
    return home


def _spread(home: str) -> None:
    """Has ext4 give each directory below a block group of its own.

    It does not use an inode again for minutes after it was deleted, but looks at each of those that were deleted in the group
    whenever it makes a file there: where many were, by us or by others, that took 20 times as long as making the file.
    """
    with contextlib.suppress(OSError):  # other file systems do not know the flag, and have no such trouble
        fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, _GET_FLAGS, bytes(struct.calcsize("l"))))
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", flags | _TOP_DIRECTORY))
        finally:
            os.close(fd)


def check_existing(cache_dir: str) -> None:
    """Makes nothing. Raises ConfigurationError when there is no cache, or it is not safe to use."""
    for path in (cache_dir, os.path.join(cache_dir, FORMAT_DIRECTORY)):
        try:
            _check(path)
        except FileNotFoundError:
            raise ConfigurationError(
                f"there is no block cache in {cache_dir}", hint="say where it is with --cache-dir"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{cache_dir}: {error.strerror}") from None


def _check(path: str) -> None:
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise ConfigurationError(
            f"the cache directory is a symbolic link: {path}", hint="name its target with --cache-dir"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"the cache directory is not a directory: {path}", hint="choose another --cache-dir")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"the cache directory belongs to another user (uid {found.st_uid}): {path}",
            hint="whoever owns it could change what you read; choose a --cache-dir of your own",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(
            f"other users may write to the cache directory: {path}", hint=f"chmod go-w {path}, if you trust its content"
        )


def lies_in_memory(path: str) -> bool:
    """Whether `path` is on a file system that has no disk below it, so that reading it never waits."""
    return _file_system(path) in _MEMORY_FILE_SYSTEMS


def may_hang(path: str) -> bool:
    """Whether `path`, or what there is of it, is on a file system that somebody else has to answer for."""
    while not os.path.lexists(path) and path not in {"", "/"}:
        path = os.path.dirname(path)
    kind = _file_system(path or ".")
    return kind in _SERVED_FILE_SYSTEMS or kind.partition(".")[0] in {"fuse", "fuseblk"}


def _file_system(path: str) -> str:
    """The type of the file system that `path` is on, as the mount table has it; "" where that cannot be told."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open(MOUNT_TABLE, encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields, _, rest = line.partition(" - ")
                if fields.split(" ")[2] == wanted:
                    return rest.split(" ", 1)[0]
    except (OSError, IndexError):
        pass
    return ""


class Home:
    """The format's directory of a cache and the fan-out directories in it, each made when it is first wanted."""

    def __init__(self, cache_dir: str, disk: DiskCalls) -> None:
        self.path = os.path.join(cache_dir, FORMAT_DIRECTORY)
        self._cache_dir = cache_dir
        self._disk = disk
        self._is_made = False
        self._fan_out_made: set[str] = set()

    def make(self) -> None:
        """As `prepare`, unless it is made. Raises the same, and OSError when nothing can be written there."""
        if not self._is_made:
            self._disk.call(self._make)
            self._is_made = True

    def make_fan_out(self, path: str) -> None:
        """The directory `path` in it. Raises OSError."""
        if path not in self._fan_out_made:
            with contextlib.suppress(FileExistsError):
                self._disk.call(os.mkdir, path, 0o700)
            self._fan_out_made.add(path)

    def forget(self) -> None:
        """They may have been deleted under us: made again when they are wanted again."""
        self._is_made = False
        self._fan_out_made.clear()

    def _make(self) -> None:
        prepare(self._cache_dir)
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise OSError(errno.EROFS, "not writable")
