"""Files that are on the disk already below a mount point (`always` files of a mixed input): found before the mount covers
them, opened through a descriptor of the directory beneath it.

Nothing here follows a symbolic link or crosses into another file system: a mount of ours below is not "on the disk".
"""

from __future__ import annotations

import errno
import logging
import os
import stat

from valohai_fuse.model.tree import LocalFile

log = logging.getLogger(__name__)


class LocalFiles:
    """The regular files below `directory`, by path relative to it; the descriptor stays open until `close`."""

    def __init__(self, directory: str, only: tuple[str, ...] | None = None) -> None:
        """`only`: look into these top directories alone. Raises OSError when `directory` cannot be opened."""
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.files: dict[str, LocalFile] = {}
        device = os.fstat(self._root).st_dev
        for top in only if only is not None else ("",):
            self._scan(top, device)

    def _scan(self, path: str, device: int) -> None:
        pending = [path]
        while pending:
            here = pending.pop()
            try:
                descriptor = os.open(
                    here or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root
                )
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENOTCONN}:
                    log.warning("cannot look into %s below the mount point: %s", here or ".", error.strerror)
                continue
            try:
                if os.fstat(descriptor).st_dev == device:
                    pending.extend(self._entries(here, descriptor))
            finally:
                os.close(descriptor)

    def _entries(self, here: str, descriptor: int) -> list[str]:
        directories: list[str] = []
        with os.scandir(descriptor) as entries:
            for entry in entries:
                path = f"{here}/{entry.name}" if here else entry.name
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # gone since, or the point of a dead mount
                if stat.S_ISDIR(status.st_mode):
                    directories.append(path)
                elif stat.S_ISREG(status.st_mode):
                    self.files[path] = LocalFile(status.st_size, status.st_mtime_ns)
        return directories

    def open(self, path: str) -> int:
        """A descriptor of the file, for reading; the caller closes it. Raises OSError."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)

    def close(self) -> None:
        """Lets go of the directory."""
        os.close(self._root)
