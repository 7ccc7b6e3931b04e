"""What a test may leave behind on the machine: nothing.

`Snapshot.take()` before, `left_since(snapshot)` after. Processes are recognised as ours by being children, or by a
variable of their environment that every process started during the session inherits, daemons of daemons included; so a
neighbour's test run on the same machine does not count. Mounts are ours when they lie below one of our directories.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.02
_LISTEN = "0A"

_TOLERATED_TARGETS = (
    "/dev/null",
    "/dev/urandom",
    "/dev/random",
    "/proc",
    "/dev/pts",
    "/dev/tty",
    "anon_inode:[eventfd]",
)
"""Opened once and kept by libraries; harmless. An eventfd alone is the wake-up of an event loop that a still waiting
thread of trio's refers to; a leaked loop shows by its epoll descriptor."""


@dataclass(frozen=True, slots=True)
class Ours:
    """How to tell what belongs to this test session."""

    variable: bytes
    """`NAME=value` in the environment of every process started by the session."""
    directories: tuple[str, ...]
    """Where the session may mount."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the machine, as far as a test can change it by mistake."""

    pids: frozenset[int]
    descriptors: frozenset[str]
    mounts: frozenset[str]

    @classmethod
    def take(cls, ours: Ours) -> Snapshot:
        """What is there now."""
        return cls(frozenset(_pids()), frozenset(_descriptors()), frozenset(mounts_below(ours.directories)))


def left_since(before: Snapshot, ours: Ours, patience_s: float = 3.0) -> list[str]:
    """What was not there before, one line each. Waits for what is on its way out, `patience_s` at the most."""
    deadline = time.monotonic() + patience_s
    while left := _difference(before, ours):
        gc.collect()
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)  # nothing in the kernel announces all of these at once
    return left


def mounts_below(directories: tuple[str, ...]) -> list[str]:
    """Mount points at or below any of `directories`, deepest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mountpoint = line.split(" ")[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        if any(mountpoint == top or mountpoint.startswith(top + "/") for top in directories):
            found.append(mountpoint)
    return sorted(found, key=len, reverse=True)


def _difference(before: Snapshot, ours: Ours) -> list[str]:
    new_pids = [pid for pid in _pids() if pid not in before.pids]
    processes = [f"process {pid}: {_command(pid)}" for pid in new_pids if _is_ours(pid, ours, before.pids)]
    new = [target for target in _descriptors() if target not in before.descriptors]
    accepted = _accepted_by(before.descriptors) if new else frozenset()
    descriptors = [f"open descriptor: {target}" for target in new if target not in accepted]
    mounts = [
        f"mount: {mountpoint}" for mountpoint in mounts_below(ours.directories) if mountpoint not in before.mounts
    ]
    return [*mounts, *processes, *descriptors]


def _accepted_by(descriptors: frozenset[str]) -> frozenset[str]:
    """Connections to a server of this process that was listening before: that server's business."""
    rows = [
        (fields[1].rpartition(":")[2], fields[3], f"socket:[{fields[9]}]")
        for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6")
        for fields in map(str.split, Path(table).read_text(encoding="ascii").splitlines()[1:])
    ]
    ports = {port for port, state, socket in rows if state == _LISTEN and socket in descriptors}
    return frozenset(socket for port, _, socket in rows if port in ports)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_ours(pid: int, ours: Ours, before: frozenset[int]) -> bool:
    """Whether a new process is a leftover of ours; the child of a daemon that was there before is the daemon's business."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        is_marked = ours.variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False  # it has gone, or belongs to somebody else
    return parent == os.getpid() or (is_marked and (parent == 1 or parent not in before))


def _command(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            or "a zombie"
        )
    except OSError:
        return "gone by now"


def _descriptors() -> list[str]:
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of this very listing
        if not target.startswith(_TOLERATED_TARGETS):
            targets.append(target)
    return targets
