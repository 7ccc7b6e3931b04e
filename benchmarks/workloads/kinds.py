"""What a workload is: an input, a profile, a task for `reader`, the state the cache is in, the metric that stands for it and the
targets that the project set itself. Targets marked "best" compare with the best *mount* of another project in the same run;
plain downloads are shown beside them but are no file system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.dataset import MIB, DataFile
from benchmarks.store import Profile

NAMES_ONLY = frozenset({"find", "ls"})
"""Patterns that read names and attributes, no bytes."""
NEEDS_PYARROW = frozenset({"parquet"})

COLD = "cold"
KEPT = "kept"
DROPPED = "dropped"

UNITS: Mapping[str, tuple[str, bool]] = {
    "mb_s": ("MB/s", True),
    "files_s": ("files/s", True),
    "reads_s": ("reads/s", True),
    "elapsed_s": ("s in all", False),
    "ready_s": ("s until it answers", False),
    "p50_ms": ("ms median", False),
    "p99_ms": ("ms p99", False),
    "fetched_kib": ("KiB fetched", False),
    "fetched_per_read_kib": ("KiB fetched per read", False),
    "amplification": ("bytes fetched per byte read", False),
    "cpu_s_gib": ("CPU s/GiB", False),
    "pss_mib": ("MiB", False),
    "bytes_per_file": ("bytes of memory per file", False),
    "idle_cpu_s": ("CPU s in the idle time", False),
}
"""Metric -> (unit, whether more is better)."""


OWN = "own "


@dataclass(frozen=True, slots=True)
class Target:
    """`metric` at least (or at most, where less is better) `value`, in its unit or times that of `versus`."""

    metric: str
    value: float
    versus: str | None = None
    """None: absolute. "best": the best other mount. "leanest cache": the least of the others that cache. "own W": ours on the
    workload W. Else a peer."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The files that workloads read: of the bench's own data set, or whatever was found below --target."""

    big: tuple[DataFile, ...]
    quarters: tuple[DataFile, ...]
    half: tuple[DataFile, ...]
    fresh: tuple[DataFile, ...]
    small: tuple[DataFile, ...]
    archive: tuple[DataFile, ...]
    table: tuple[DataFile, ...]
    names_path: str
    name_count: int
    reads: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the report. `files` picks from the selection, `task` is what the reader is told beside them."""

    name: str
    title: str
    input_name: str
    profile: Profile
    files: Callable[[Selection], tuple[DataFile, ...]]
    task: Mapping[str, Any]
    metric: str
    targets: tuple[Target, ...] = ()
    state: str = COLD
    downloads: bool = False
    """Whether fetching the files whole first does the same job."""
    listed: bool = True
    """Whether names and sizes are asked for before the clock starts, as a program that was given a listing would."""
    timeout_s: float = 300.0


def task(pattern: str, **more: Any) -> dict[str, Any]:
    return {"pattern": pattern, "threads": 1, "batch": 1, "block_bytes": MIB, "count": 0, "seed": 1, **more}


def big(selection: Selection) -> tuple[DataFile, ...]:
    return selection.big


def half(selection: Selection) -> tuple[DataFile, ...]:
    return selection.half


def quarters(selection: Selection) -> tuple[DataFile, ...]:
    return selection.quarters


def small(selection: Selection) -> tuple[DataFile, ...]:
    return selection.small


def fresh(selection: Selection) -> tuple[DataFile, ...]:
    return selection.fresh
