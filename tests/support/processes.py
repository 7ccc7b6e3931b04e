"""Finding the processes of a mount: its daemon, its supervisor, its fetch workers. By the runtime directory and /proc alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from support.mounts import MountedSandbox


def record(mounted: MountedSandbox, input_name: str) -> dict[str, object]:
    """The record of one input's mount. Raises AssertionError when there is none."""
    for path in Path(mounted.runtime_dir).glob("*.json"):
        found: dict[str, object] = json.loads(path.read_bytes())
        if found["inputs"] == [input_name]:
            return found
    raise AssertionError(f"no record of {input_name} in {mounted.runtime_dir}")


def daemon_pid(mounted: MountedSandbox, input_name: str) -> int:
    """The daemon of one input."""
    pid = record(mounted, input_name)["pid"]
    assert isinstance(pid, int)
    return pid


def supervisor_pid(mounted: MountedSandbox, input_name: str) -> int:
    """The supervisor of the command that mounted it."""
    pid = record(mounted, input_name)["supervisor_pid"]
    assert isinstance(pid, int)
    return pid


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, zombies excluded; empty when it is gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_bytes().rpartition(b") ")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != b"Z":
            found.append(int(path.parent.name))
    return sorted(found)


def workers(daemon: int) -> list[int]:
    """The fetch workers of a daemon."""
    return [pid for pid in children(daemon) if b"fetch.worker" in _command(pid)]


def run_queue_wait_s(*pids: int) -> float:
    """How long the main threads of these have been ready to run while others had the processors, since they started: what a busy
    machine adds to whatever they do. 0 where the kernel does not count it."""
    waited_ns = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            waited_ns += int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text(encoding="ascii").split()[1])
    return waited_ns / 1e9


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody reaps has."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] in {b"Z", b"X"}
    except OSError:
        return True
