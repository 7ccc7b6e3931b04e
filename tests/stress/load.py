"""What load tests share: reader processes, and whether a mount is back where it began."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.mounts import MountedSandbox, wait_until
from support.processes import daemon_pid, workers

PROGRAM = Path(__file__).with_name("reader_process.py")
GAUGES_AT_REST = ("open_files", "reads_under_way", "requests_under_way", "flights")
CACHED_SEGMENT = re.compile(r"/cache/|/memfd:valohai-fuse-segment")
"""Kept at hand, or in memory where the disk lets readers down; bounded by the store."""


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


@dataclass(frozen=True)
class AtRest:
    """A mount that nobody uses: what it holds then."""

    tasks: float
    descriptors: int
    workers_max: int

    @classmethod
    def of(cls, mounted: MountedSandbox) -> AtRest:
        """Taken after a first read, so that everything that starts with it has started."""
        daemon = daemon_pid(mounted, "data")
        return cls(metrics(mounted)["tasks"], len(_descriptors(daemon)), os.cpu_count() or 1)

    def assert_back(self, mounted: MountedSandbox, timeout_s: float = 30) -> None:
        """Gauges, tasks, descriptors, temporary files and workers are where they were; nothing overdue, no stall."""
        daemon = daemon_pid(mounted, "data")
        deadline_s = time.monotonic() + timeout_s
        while True:
            now = metrics(mounted)
            busy = {name: now[name] for name in GAUGES_AT_REST if now[name]}
            if not busy or time.monotonic() > deadline_s:
                break
        assert not busy
        # A task per request that came at once is kept by pyfuse3, `session.TASKS_IDLE` of them; workers have three each.
        spare = 8 + 3 * self.workers_max + 8
        wait_until("the tasks have gone", lambda: metrics(mounted)["tasks"] <= self.tasks + spare)
        allowed = self.descriptors + 2 * self.workers_max + 4
        # Segments in memory are not counted: they stay for later readers, as many as their bound allows.
        with contextlib.suppress(AssertionError):
            wait_until("the descriptors have gone", lambda: len(_descriptors(daemon)) <= allowed)
        assert len(_descriptors(daemon)) <= allowed, _descriptors(daemon)
        assert len(workers(daemon)) <= min(4, self.workers_max)
        left = [path.name for path in Path(mounted.cache_dir).rglob("*") if re.search(r"\.(tmp|new|part)", path.name)]
        assert not left
        assert now["requests_overdue"] == 0
        assert now["handler_errors"] == 0
        assert not [line for line in mounted.log().splitlines() if "Traceback" in line]


def _descriptors(pid: int) -> list[str]:
    """What a process has open, without the segments that it keeps at hand."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if not CACHED_SEGMENT.search(target):
            found.append(target)
    return found
