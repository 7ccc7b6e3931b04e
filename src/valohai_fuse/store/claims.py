"""Says to other processes which blocks are being fetched, so that they wait for them instead of fetching them as well.

A claim is a range lock on the file `claims`: each segment has 128 bytes of it, one per block, at a place that its name
hashes to; two segments that meet there only wait for one another in vain. The kernel drops the claims of a process that
dies. They are advice: where the file system has no such locks everybody claims everything, and some blocks come twice.

Locks of open file descriptions, not of processes: the evictor looks with a description of its own and sees ours as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
from typing import Final

from valohai_fuse.model.extents import SEGMENT_BLOCKS
from valohai_fuse.model.segment import FORMAT_DIRECTORY

CLAIMS_FILE: Final = "claims"
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock where off_t has 64 bits: type, whence, start, length, pid."""


class Claims:
    """The claims on one cache directory, through one open file description. One thread uses it at a time."""

    def __init__(self, cache_dir: str) -> None:
        """Touches nothing yet."""
        self._path = os.path.join(cache_dir, FORMAT_DIRECTORY, CLAIMS_FILE)
        self._fd = -1

    def close(self) -> None:
        """Lets go of everything."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def claim(self, segment_name: str, start: int, stop: int) -> bool:
        """Claims blocks [start, stop) of a segment; False: somebody else has claimed some of them."""
        return self._lock(fcntl.F_WRLCK, segment_name, start, stop)

    def release(self, segment_name: str, start: int, stop: int) -> None:
        """Gives them back."""
        self._lock(fcntl.F_UNLCK, segment_name, start, stop)

    def is_claimed(self, segment_name: str) -> bool:
        """Whether any process, also this one through another description, has claimed a block of the segment."""
        if not self._open():
            return False
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _place(segment_name), SEGMENT_BLOCKS, 0)
        try:
            answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
        except OSError:
            return False
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def _open(self) -> bool:
        if self._fd < 0:
            with contextlib.suppress(OSError):
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        return self._fd >= 0

    def _lock(self, kind: int, segment_name: str, start: int, stop: int) -> bool:
        if not self._open():
            return True
        first = _place(segment_name) + start
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, first, stop - start, 0))
        except OSError as error:
            return error.errno not in {errno.EAGAIN, errno.EACCES}
        return True


def _place(segment_name: str) -> int:
    digest = hashlib.blake2b(segment_name.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 9) * SEGMENT_BLOCKS
