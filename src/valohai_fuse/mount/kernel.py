"""Tuning of this mount in the kernel, where it lets us; everything works without, slower.

Measured: requests of 1 MiB instead of 128 KiB halve the daemon's CPU per GiB (beyond 1 MiB no gain); `max_background` = 12
caps the buffered and the O_DIRECT reads of the whole mount: the thirteenth waits for one of twelve to be answered, whatever
it is for. The window is set in /sys. The limits are set in fusectl, of which we make an instance that is mounted nowhere
(fsopen(2), fsmount(2)): containers seldom have it at /sys/fs/fuse/connections, and their /sys is read-only.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Final

log = logging.getLogger(__name__)

MAX_BACKGROUND: Final = 1024
"""Readahead requests that the kernel may have under way at once; our own limit is the fetcher's."""

_SYS_FSOPEN: Final = 430  # the same on all architectures (syscall.tbl), as all calls since 5.2
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6


def tune(mountpoint: str, *, readahead_bytes: int) -> bool:
    """Sets the readahead window and the background limits of the mount. False where the kernel refuses the window."""
    device = os.stat(mountpoint).st_dev
    tuned = _set_window(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", readahead_bytes // 1024)
    if not _set_limits(os.minor(device)):
        log.info("no more than 12 reads of this mount are under way at once: the kernel's limit could not be raised")
    return tuned


def _set_window(path: str, kib: int) -> bool:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(kib))
    except OSError as error:
        log.info("the kernel's %s stays as it is: %s", path, error.strerror)
        return False
    return True


def _set_limits(connection: int) -> bool:
    try:
        control = _fusectl()
    except OSError as error:
        log.info("no access to fusectl: %s", error.strerror)
        return False
    try:
        for name, value in (("max_background", MAX_BACKGROUND), ("congestion_threshold", MAX_BACKGROUND * 3 // 4)):
            file = os.open(f"{connection}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
            try:
                os.write(file, str(value).encode())
            finally:
                os.close(file)
    except OSError as error:
        log.info("the kernel's limits stay as they are: %s", error.strerror)
        return False
    finally:
        os.close(control)
    return True


def _fusectl() -> int:
    """The directory of all FUSE connections, as a descriptor. Raises OSError: EPERM without CAP_SYS_ADMIN."""
    context = _call(_SYS_FSOPEN, b"fusectl", _CLOEXEC)
    try:
        _call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_SYS_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
