"""A network file system for tests: sshfs to an sshd on loopback, with keys and a port of their own.

This kernel has no NFS. What sshfs shares with it is what matters here: a cache directory whose every call is a round trip,
whose attributes are cached for a while, and on which `flock` and range locks of two mounts know nothing of one another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.mounts import wait_until

SSHD = shutil.which("sshd", path=f"{os.defpath}:/usr/sbin:/sbin")


def is_installed() -> bool:
    """Whether there is what this needs."""
    return SSHD is not None and all(shutil.which(tool) for tool in ("sshfs", "ssh-keygen", "fusermount3"))


@contextlib.contextmanager
def server(root: Path) -> Iterator[list[str]]:
    """An sshd for this user; yields the options that `sshfs` needs to reach it."""
    assert SSHD is not None
    root.mkdir(mode=0o700)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)], check=True)
    shutil.copy(root / "client.pub", root / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (root / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {root}/host\nAuthorizedKeysFile {root}/authorized\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "Subsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where sshd wants to be rid of its rights
    daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", str(root / "config")], stderr=subprocess.DEVNULL)
    try:
        wait_until("sshd listens", lambda: _listens(port))
        yield [
            "-p",
            str(port),
            "-o",
            f"IdentityFile={root}/client,UserKnownHostsFile={root}/known,StrictHostKeyChecking=no,LogLevel=ERROR,cache_timeout=1",
        ]
    finally:
        daemon.terminate()
        daemon.wait(10)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@dataclass(frozen=True)
class Host:
    """Where a host has it, and the process that answers for it there."""

    mountpoint: Path
    pid: int


@contextlib.contextmanager
def mounted(options: list[str], directory: Path, mountpoint: Path) -> Iterator[Host]:
    """`directory`, as a host over there would see it."""
    mountpoint.mkdir()
    client = subprocess.Popen(["sshfs", "-f", *options, f"127.0.0.1:{directory}", str(mountpoint)])
    try:
        wait_until("sshfs is mounted", lambda: os.path.ismount(mountpoint))
        yield Host(mountpoint, client.pid)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], check=False)
        client.wait(10)
