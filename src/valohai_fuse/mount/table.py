"""The kernel's mount table, and taking mounts out of it.

Decides nothing about who owns a mount; knows only what the kernel says. Every question about a path is answered from
`/proc/self/mountinfo`, never by touching the path: a stat of a mount whose daemon hangs would hang with it. `answers` is the
one exception, and asks from a thread that is left behind when no answer comes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from typing import Final

FILE_SYSTEM_TYPE: Final = "fuse.valohai-fuse"
_CAP_SYS_ADMIN: Final = 21
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo (proc(5))."""

    mount_id: int
    device: str
    """`major:minor`; the minor number is that of /sys/fs/fuse/connections."""
    mountpoint: str
    file_system_type: str
    source: str

    @property
    def is_ours(self) -> bool:
        """Whether a valohai-fuse made it (any runtime directory, any user)."""
        return self.file_system_type == FILE_SYSTEM_TYPE


def _unescape(field: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)


def parse(text: str) -> list[MountEntry]:
    """The entries of a mountinfo file, in its order: of two on one mount point the later covers the earlier."""
    entries = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        head, tail = before.split(" "), after.split(" ")
        if len(head) >= 6 and len(tail) >= 2:
            entries.append(MountEntry(int(head[0]), head[2], _unescape(head[4]), tail[0], _unescape(tail[1])))
    return entries


def entries() -> list[MountEntry]:
    """All mounts that this process sees."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        return parse(table.read())


def find(mountpoint: str) -> MountEntry | None:
    """The mount that is seen at exactly `mountpoint` (absolute, without symbolic links); None when there is none."""
    return next((entry for entry in reversed(entries()) if entry.mountpoint == mountpoint), None)


def containing(path: str) -> MountEntry | None:
    """The mount that `path` (absolute) lies on."""
    best: MountEntry | None = None
    for entry in entries():
        under = entry.mountpoint in {"/", path} or path.startswith(entry.mountpoint + "/")
        if under and (best is None or len(entry.mountpoint) >= len(best.mountpoint)):
            best = entry
    return best


def resolve(path: str) -> str:
    """`path` absolute and with the symbolic links of its parents resolved, without touching its last component."""
    absolute = os.path.abspath(path)
    parent, name = os.path.split(absolute)
    return os.path.join(os.path.realpath(parent), name) if name else parent


def has_admin_capability() -> bool:
    """Whether this process may call mount(2) and umount(2)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            effective = next(line for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_ADMIN & 1)


def answers(mountpoint: str, timeout_s: float = 2.0) -> bool | None:
    """Whether the file system there answers: True, False (ENOTCONN: its daemon is gone), None (no answer in time).

    Asks statfs, which always reaches the daemon; the attributes that `stat` wants, the kernel has for ever.
    """
    outcome: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            outcome.append(error.errno not in {errno.ENOTCONN, errno.ECONNABORTED})
        else:
            outcome.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return outcome[0] if outcome else None


def unmount(mountpoint: str) -> None:
    """Takes the topmost mount at `mountpoint` away, with umount2(2) where permitted, through fusermount3 otherwise.

    Raises OSError: EBUSY while something is open there, EINVAL when nothing is mounted there, EPERM when neither way works.
    """
    _take_away(mountpoint, lazy=False)


def unmount_lazily(mountpoint: str) -> None:
    """The same at once, whatever is open there; what is open stays usable until it is closed. Raises OSError, never EBUSY."""
    _take_away(mountpoint, lazy=True)


def _take_away(mountpoint: str, *, lazy: bool) -> None:
    if has_admin_capability():
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if libc.umount2(os.fsencode(mountpoint), flags) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), mountpoint)
        return
    if find(mountpoint) is None:
        raise OSError(errno.EINVAL, "nothing is mounted there", mountpoint)
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        raise OSError(errno.EPERM, "neither CAP_SYS_ADMIN nor fusermount3", mountpoint)
    command = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env={"LC_ALL": "C"})
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["fusermount3 failed"])[-1]
        raise OSError(errno.EBUSY if "busy" in reason else errno.EPERM, reason, mountpoint)


def is_there(entry: MountEntry) -> bool:
    """Whether this very mount is still in the table. The number alone does not tell: the kernel gives it away again at once."""
    return entry in entries()
