"""What load tests share: reader processes, and a store that is well again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.mounts import MountedSandbox

PROGRAM = Path(__file__).with_name("reader_process.py")


def start(mode: str, *arguments: object) -> subprocess.Popen[str]:
    """One reader process."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(PROGRAM), mode, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def recover(mounted: MountedSandbox) -> None:
    """The store answers again: no faults, and connections that stalled are cut."""
    mounted.sandbox.store.faults.clear()
    mounted.sandbox.stop_store()
    mounted.sandbox.start_store()


@contextmanager
def crowd(processes: list[subprocess.Popen[str]], mounted: MountedSandbox) -> Iterator[list[subprocess.Popen[str]]]:
    """Takes them all away at the end, however it comes: readers with O_DIRECT can only be killed once the store answers."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        recover(mounted)
        for process in processes:
            process.communicate(timeout=60)


def metrics(mounted: MountedSandbox) -> dict[str, float]:
    """All counters and gauges of the one mount."""
    (mount,) = mounted.status()["mounts"]
    assert mount["state"] == "mounted"
    found: dict[str, float] = mount["metrics"]
    return found


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
