"""Whether this machine lets us mount with FUSE, and if not, precisely why and what to ask the administrator for."""

from __future__ import annotations

import os
import shutil
import stat

from valohai_fuse.errors import FuseUnavailableError
from valohai_fuse.mount import table

DEVICE = "/dev/fuse"
_DEVICE_NUMBER = os.makedev(10, 229)  # Documentation/admin-guide/devices.txt
_ASK_DEVICE = "the container needs the device: docker run --device /dev/fuse --cap-add SYS_ADMIN; Kubernetes: a FUSE device plugin"
_ASK_PRIVILEGE = (
    "grant the container CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN), or install fuse3 and mount as an ordinary user"
)


def check_device() -> None:
    """Raises FuseUnavailableError when /dev/fuse is missing or cannot be opened."""
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            is_fuse = os.fstat(descriptor).st_rdev == _DEVICE_NUMBER
        finally:
            os.close(descriptor)
        if not is_fuse:
            raise FuseUnavailableError(f"{DEVICE} is not the FUSE device (10, 229)", hint=_ASK_DEVICE)
    except FileNotFoundError:
        raise FuseUnavailableError(f"{DEVICE} does not exist", hint=_ASK_DEVICE) from None
    except PermissionError as error:
        who = "this user" if os.geteuid() else "this container"
        raise FuseUnavailableError(f"{DEVICE} may not be opened by {who}: {error.strerror}", hint=_ASK_DEVICE) from None
    except OSError as error:
        hint = "the kernel has no FUSE: load the module on the host (modprobe fuse)"
        raise FuseUnavailableError(f"{DEVICE} cannot be opened: {error.strerror}", hint=hint) from None


def check_privilege() -> str:
    """How a mount would be made: `CAP_SYS_ADMIN`, or the path of fusermount3. Raises FuseUnavailableError."""
    if table.has_admin_capability():
        return "CAP_SYS_ADMIN"
    program = shutil.which("fusermount3")
    if os.geteuid() == 0:
        raise FuseUnavailableError("mounting is not permitted: root without CAP_SYS_ADMIN", hint=_ASK_PRIVILEGE)
    if program is None:
        raise FuseUnavailableError(
            "mounting is not permitted: neither CAP_SYS_ADMIN nor fusermount3",
            hint="install the package fuse3, or mount as root",
        )
    found = os.stat(program)
    if not (found.st_uid == 0 and found.st_mode & stat.S_ISUID):
        raise FuseUnavailableError(f"{program} is not setuid root", hint=f"chown root {program} && chmod u+s {program}")
    return program


def user_allow_other() -> bool:
    """Whether /etc/fuse.conf lets ordinary users mount with allow_other."""
    try:
        with open("/etc/fuse.conf", encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def check(*, allow_other: bool) -> None:
    """Raises FuseUnavailableError when no mount can succeed here."""
    check_device()
    how = check_privilege()
    if allow_other and how != "CAP_SYS_ADMIN" and not user_allow_other():
        raise FuseUnavailableError(
            "--allow-other is not permitted for ordinary users here",
            hint="add user_allow_other to /etc/fuse.conf, or leave it out",
        )
