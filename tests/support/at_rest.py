"""A mount that nobody uses holds nothing that it did not hold when it began: what is checked after each test of trouble.

Absolute where it can be: which descriptors, processes, temporary files and tasks a daemon and its workers have when nothing is
under way is a table here, so that a leak shows that happened before anybody looked for the first time.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from support.mounts import POLL_S, MountedSandbox
from support.processes import children, workers
from valohai_fuse.mount.session import TASKS_IDLE
from valohai_fuse.obs.control_client import ask
from valohai_fuse.obs.runtime_dir import MountRecord, RuntimeDir
from valohai_fuse.store.segments import DESCRIPTORS_MAX

GAUGES: Final = ("open_files", "reads_under_way", "requests_under_way", "flights", "flights_ahead")
COUNTS_OF_BUGS: Final = ("requests_overdue", "loop_stalls", "handler_errors")
WORKERS_MAX: Final = min(4, os.cpu_count() or 1)
TASKS_OF_OURS: Final = 12
"""The daemon's own, and those of the connection that asks; what pyfuse3 keeps for requests to come is TASKS_IDLE."""
TASKS_PER_WORKER: Final = 3
SEGMENTS_IN_MEMORY_MAX: Final = 256
IDLE_HTTP_CONNECTIONS_MAX: Final = 32
"""Two clients (API, probes) that keep 16 connections each for a while."""

_SHARES: Final = r".*/cache[^/]*/v1/shares/[^/]+"
_MEMORY: Final = "/memfd:valohai-fuse-segment"
_OF_A_DAEMON: Final = (
    (r"/dev/null", 1),
    (r".*\.log", 3),
    (r"anon_inode:\[eventpoll\]", 1),
    (r"pipe:\[\d+\]", 2),
    (r"/dev/fuse", 1),
    (r"/proc/\d+/task/\d+/schedstat", 1),
    (r".*/cache[^/]*/v1/claims( \(deleted\))?", 1),
    (r".*/cache[^/]*/v1/[0-9a-f]{2}/[0-9a-f]+\.[0-9a-f]+( \(deleted\))?", DESCRIPTORS_MAX),  # kept at hand
    (rf"{_MEMORY}.*", SEGMENTS_IN_MEMORY_MAX),
    (r".*/#\d+ \(deleted\)", 1),  # what the manifest was spooled to
    (r"/memfd:valohai-fuse-inputs.*", 1),  # the same where there is no disk
)
_OF_A_WORKER: Final = (
    (r"/dev/null", 2),
    (r".*\.log", 1),
    (r"anon_inode:\[eventpoll\]", 1),
    (r"anon_inode:\[eventfd\]", 3),
    (r"pipe:\[\d+\]", 2),
    (r"/proc/\d+/task/\d+/schedstat", 1),
    (r"/memfd:ca-bundle.*", 1),
)
_SOCKETS_OF_A_DAEMON: Final = 7
"""Control and the connection that asks, the two wake-ups of trio, signals, the supervisor's."""
_IN_THE_CACHE: Final = re.compile(r"v1(/claims|/shares/[^/]+|/[0-9a-f]{2}/[0-9a-f]+\.[0-9a-f]+|/[^/]*tag|/README.*)?")


def daemons(mounted: MountedSandbox) -> list[MountRecord]:
    """The records of the mounts that a daemon serves now."""
    found = RuntimeDir(mounted.runtime_dir).records()
    return [record for record in found if Path(f"/proc/{record.pid}").exists()]


def problems(mounted: MountedSandbox, *, excused: Collection[str] = (), timeout_s: float = 45.0) -> list[str]:
    """What is there that should not be, one line each, after at most `timeout_s` for it to go away. `excused`: the names of counts
    that the test itself explains."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        left = [line for record in daemons(mounted) for line in _of_daemon(mounted, record, excused)] + _of_files(
            mounted
        )
        if not left or time.monotonic() > deadline_s:
            return left
        time.sleep(5 * POLL_S)  # nothing announces that the last task has ended


def _of_daemon(mounted: MountedSandbox, record: MountRecord, excused: Collection[str]) -> list[str]:
    status = ask(str(record.control_path), "status", timeout_s=20)
    metrics: dict[str, Any] = status["metrics"]
    who = f"{'root' if record.as_root else ','.join(record.inputs)}:"
    left = [f"{who} {name} is {metrics[name]:g}" for name in GAUGES if metrics[name]]
    left += [f"{who} {name} is {metrics[name]:g}" for name in COUNTS_OF_BUGS if metrics[name] and name not in excused]
    pids = workers(record.pid)
    others = [pid for pid in children(record.pid) if pid not in pids]
    left += [f"{who} {len(pids)} workers, and {metrics['workers']:g} by the gauge"] * (metrics["workers"] != len(pids))
    left += [f"{who} {len(pids)} workers are too many"] * (len(pids) > WORKERS_MAX)
    left += [f"{who} a child that is no worker: {pid}" for pid in others]
    left += [f"{who} a dead child that nobody reaps: {pid}" for pid in _zombies(record.pid)]
    tasks_max = TASKS_OF_OURS + TASKS_IDLE + TASKS_PER_WORKER * len(pids)
    left += [f"{who} {metrics['tasks']:g} tasks, {tasks_max} are enough"] * (metrics["tasks"] > tasks_max)
    sockets_max = _SOCKETS_OF_A_DAEMON + len(pids) + IDLE_HTTP_CONNECTIONS_MAX
    below = mounted.sandbox.inputs_dir if record.as_root else record.mountpoint  # the directory that the mount hides
    table = (*_OF_A_DAEMON, (re.escape(below), 1), (_SHARES, len(daemons(mounted))))
    left += _of_descriptors(f"{who} daemon", record.pid, table, sockets_max)
    for pid in pids:
        left += _of_descriptors(f"{who} worker", pid, _OF_A_WORKER, 4 + int(metrics["connections_opened"]))
    return left


def _of_descriptors(who: str, pid: int, table: Collection[tuple[str, int]], sockets_max: int) -> list[str]:
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        kind = next((pattern for pattern, _ in table if re.fullmatch(pattern, target)), target)
        found["sockets" if target.startswith("socket:") else kind] += 1
    allowed = dict(table) | {"sockets": sockets_max}
    return [
        f"{who} has {count} descriptors of {kind}, {allowed.get(kind, 0)} are enough"
        for kind, count in found.items()
        if count > allowed.get(kind, 0)
    ]


def _zombies(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_bytes().rpartition(b") ")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] == b"Z":
            found.append(int(path.parent.name))
    return found


def _of_files(mounted: MountedSandbox) -> list[str]:
    """Files in the cache and the runtime directory that are none of their own."""
    cache, running = Path(mounted.cache_dir), Path(mounted.runtime_dir)
    left = [
        f"in the cache: {path.relative_to(cache)}"
        for path in cache.rglob("*")
        if path.is_file() and not _IN_THE_CACHE.fullmatch(str(path.relative_to(cache)))
    ]
    shares = list(cache.glob("v1/shares/*"))
    served = len(daemons(mounted))
    left += [f"{len(shares)} shares in the cache for {served} daemons"] * (len(shares) > served)
    known = re.compile(r".*\.(json|log|sock|lock)|lock")
    return left + [f"beside the mount: {path.name}" for path in running.iterdir() if not known.fullmatch(path.name)]
