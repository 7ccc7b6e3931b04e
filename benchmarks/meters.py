"""What a run cost: CPU and memory of a mount's process tree, requests and bytes that the store sent.

CPU is user + system of every process below the given roots, including children that have ended and been reaped, so workers
that come and go are counted. Kernel threads and the reader are not in it: the reader measures itself. Memory is PSS, summed
over the tree and sampled: shared pages count once.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SAMPLE_EVERY_S = 0.25
_DISK_QUIET_S = 0.25


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    cpu_s: float


def parse_stat(text: str) -> tuple[int, float]:
    """(parent pid, CPU seconds of the process and its reaped children) from /proc/PID/stat."""
    fields = text.rpartition(")")[2].split()  # the command may hold blanks and parentheses
    utime, stime, children_utime, children_stime = (int(field) for field in fields[11:15])
    return int(fields[1]), (utime + stime + children_utime + children_stime) / _TICKS_PER_S


def _processes() -> dict[int, _Stat]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/stat").read_text()
            except OSError:  # gone meanwhile
                continue
            found[int(name)] = _Stat(*parse_stat(text))
    return found


class Tree:
    """The processes below `roots`, the roots included."""

    def __init__(self, roots: Iterable[int]) -> None:
        self.roots = tuple(roots)

    def pids(self) -> list[int]:
        """Those that exist now."""
        return [pid for pid, _ in self._members()]

    def cpu_s(self) -> float:
        """User and system seconds so far, of those that exist and of the children they have reaped."""
        return sum(stat.cpu_s for _, stat in self._members())

    def run_s(self) -> float:
        """The same of the threads that exist now, to the nanosecond: `cpu_s` adds up two rounded figures for each process, which
        differ by ticks of 10 ms when next to nothing runs."""
        return sum(_run_s(pid) for pid in self.pids())

    def pss_bytes(self) -> int:
        """Proportional set size of the tree; RSS where the kernel does not tell PSS."""
        return sum(_pss_bytes(pid) for pid in self.pids())

    def _members(self) -> list[tuple[int, _Stat]]:
        processes = _processes()
        children = defaultdict(list)
        for pid, stat in processes.items():
            children[stat.parent].append(pid)
        members, waiting = [], [pid for pid in self.roots if pid in processes]
        while waiting:
            pid = waiting.pop()
            members.append((pid, processes[pid]))
            waiting += children[pid]
        return members


def _run_s(pid: int) -> float:
    run_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            run_ns += int(path.read_text().split()[0])
    return run_ns / 1e9


def _pss_bytes(pid: int) -> int:
    for name, field in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            text = Path(f"/proc/{pid}/{name}").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Samples a tree's PSS four times a second while the context lasts: each time costs some 10 ms of a processor."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self._tree.pss_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, self._tree.pss_bytes())


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the store answered."""

    requests: int = 0
    connections: int = 0
    """New ones."""
    body_bytes: int = 0
    refused: int = 0
    """Answers with status 400 or above."""


class AccessLog:
    """Reads nginx's log from where it stood when the object was made (see `store.configuration` for its fields)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size if path.exists() else 0

    def traffic(self) -> Traffic:
        """Everything logged since."""
        if not self._path.exists():
            return Traffic()
        with self._path.open("rb") as log:
            log.seek(self._start)
            return count_traffic(log.read().decode().splitlines())


def count_traffic(lines: Iterable[str]) -> Traffic:
    """Sums up lines of the bench's log format."""
    requests = connections = body_bytes = refused = 0
    for line in lines:
        _, _, nth_on_connection, status, sent = line.split(" ", 5)[:5]
        requests += 1
        connections += nth_on_connection == "1"
        body_bytes += int(sent)
        refused += int(status) >= 400
    return Traffic(requests, connections, body_bytes, refused)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed. Raises ValueError on no values."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def drop_page_cache() -> None:
    """Empties the kernel's page cache of what is clean. Raises PermissionError without the privilege."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def wait_disks_quiet(diskstats: Path = Path("/proc/diskstats"), *, within_s: float = 15.0) -> bool:
    """Writes back what is dirty and waits until no disk has begun or ended anything for _DISK_QUIET_S; False when none came.

    What a trial leaves behind (dirty pages, a cache of a GiB that is deleted and whose room is given back to the device) is
    otherwise the next one's burden.
    """
    os.sync()
    give_up_at_s = time.monotonic() + within_s
    before = diskstats.read_text()
    while time.monotonic() < give_up_at_s:
        time.sleep(_DISK_QUIET_S)
        now = diskstats.read_text()
        if now == before:
            return True
        before = now
    return False
