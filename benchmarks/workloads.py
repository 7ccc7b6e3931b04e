"""What is read, how far away the store is, and which number is promised for it.

A workload is data: an input, a profile, a task for `reader`, the state the cache is in, the metric that stands for it and
the targets that the project set itself. Targets marked "best" compare with the best *mount* of another project in the same
run; plain downloads are shown beside them but are no file system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.dataset import MIB, DataFile, Dataset
from benchmarks.store import CAPPED, FAR, NEAR, REGION, TLS, Profile

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


def _task(pattern: str, **more: Any) -> dict[str, Any]:
    return {"pattern": pattern, "threads": 1, "block_bytes": MIB, "count": 0, "seed": 1, **more}


def _big(selection: Selection) -> tuple[DataFile, ...]:
    return selection.big


def _half(selection: Selection) -> tuple[DataFile, ...]:
    return selection.half


def _quarters(selection: Selection) -> tuple[DataFile, ...]:
    return selection.quarters


def _small(selection: Selection) -> tuple[DataFile, ...]:
    return selection.small


def _fresh(selection: Selection) -> tuple[DataFile, ...]:
    return selection.fresh


def _sequential() -> list[Workload]:
    seq = _task("forward")
    lean = Target("cpu_s_gib", 0.6, "leanest cache")
    twice = (Target("mb_s", 2.0, "best"), Target("mb_s", 1.5, "rclone"), lean)
    faster = (Target("mb_s", 1.5, "best"),)
    return [
        Workload("seq-near", "1 GiB in order, store 0 ms away", "big", NEAR, _big, seq, "mb_s", faster, downloads=True),
        Workload("seq-region", "1 GiB in order, 20 ms", "big", REGION, _big, seq, "mb_s", twice, downloads=True),
        Workload("seq-far", "1 GiB in order, 100 ms", "big", FAR, _big, seq, "mb_s", faster, downloads=True),
        Workload(
            "seq-capped",
            "1 GiB, 20 ms, 80 MB/s per connection",
            "big",
            CAPPED,
            _big,
            seq,
            "mb_s",
            faster,
            downloads=True,
        ),
        Workload("seq-tls", "1 GiB in order, 20 ms, TLS", "big", TLS, _big, seq, "mb_s", faster, downloads=True),
        Workload(
            "files-4",
            "four files of 256 MiB at once, 20 ms",
            "quarters",
            REGION,
            _quarters,
            _task("forward", threads=4),
            "mb_s",
            (*faster, Target("pss_mib", 300)),
            downloads=True,
        ),
        Workload(
            "seq-warm-kept",
            "1 GiB again, page cache kept",
            "big",
            NEAR,
            _big,
            seq,
            "mb_s",
            (Target("mb_s", 0.9, "plain"),),
            state=KEPT,
        ),
        Workload(
            "seq-warm-dropped",
            "1 GiB again, page cache dropped",
            "big",
            NEAR,
            _big,
            seq,
            "mb_s",
            (Target("mb_s", 1.0, "best"), Target("mb_s", 0.7, "plain")),
            state=DROPPED,
        ),
    ]


def _scattered() -> list[Workload]:
    def random(block_bytes: int, threads: int) -> dict[str, Any]:
        return _task("random", block_bytes=block_bytes, threads=threads, count=-1)  # -1: as many as the selection says

    no_worse = Target("elapsed_s", 1.0, "best")
    exact = Target("fetched_per_read_kib", 256)
    once = Target("fetched_kib", 512 * 1024)
    return [
        Workload(
            "random-first-1",
            "the first 200 random reads of 4 KiB of 1 GiB, 20 ms, 1 thread",
            "big",
            REGION,
            _big,
            random(4096, 1) | {"count": 200},
            "p50_ms",
            (Target("p50_ms", 25), Target("p99_ms", 60), exact),
        ),
        Workload(
            "records",
            "100 records of 1,000 bytes of 1 GiB, seek and read of a Python file, 20 ms",
            "big",
            REGION,
            _big,
            _task("records", block_bytes=1000, count=100),
            "p50_ms",
            (Target("p50_ms", 25), exact),
        ),
        Workload(
            "random-4k-1",
            "2,000 random reads of 4 KiB over 512 MiB, 20 ms, 1 thread",
            "half",
            REGION,
            _half,
            random(4096, 1),
            "elapsed_s",
            (no_worse, once),
        ),
        Workload(
            "random-4k-8",
            "the same with 8 threads",
            "half",
            REGION,
            _half,
            random(4096, 8),
            "reads_s",
            (Target("reads_s", 7 / 0.025), once, no_worse),
        ),
        Workload(
            "random-128k-1", "random 128 KiB, 1 thread", "half", REGION, _half, random(131072, 1), "p50_ms", (no_worse,)
        ),
        Workload(
            "random-128k-8",
            "random 128 KiB, 8 threads",
            "half",
            REGION,
            _half,
            random(131072, 8),
            "reads_s",
            (no_worse,),
        ),
        Workload(
            "stride",
            "128 KiB of every 4 MiB, 20 ms",
            "big",
            REGION,
            _big,
            _task("forward", block_bytes=131072, step_bytes=4 * MIB),
            "elapsed_s",
            (no_worse,),
        ),
        Workload(
            "backward",
            "512 MiB from end to start, 20 ms",
            "half",
            REGION,
            _half,
            _task("backward"),
            "mb_s",
            (Target("mb_s", 1, "best"),),
        ),
        Workload(
            "skip-17m",
            "read 1 MiB, jump 17 MiB, 20 ms",
            "big",
            REGION,
            _big,
            _task("forward", step_bytes=17 * MIB),
            "mb_s",
            (Target("mb_s", 3.0, "best"),),
        ),
        Workload(
            "mmap-seq",
            "1 GiB mapped, in order, 20 ms",
            "big",
            REGION,
            _big,
            _task("mmap-forward"),
            "mb_s",
            (Target("mb_s", 1, "best"), Target("mb_s", 0.8, f"{OWN}seq-region")),
        ),
        Workload(
            "mmap-random",
            "mapped, random 4 KiB, 20 ms",
            "half",
            REGION,
            _half,
            _task("mmap-random", block_bytes=4096, count=-1),
            "p50_ms",
            (no_worse,),
        ),
        Workload(
            "zip-random",
            "all members of a zip, shuffled, 20 ms",
            "archive",
            REGION,
            lambda s: s.archive,
            _task("zip"),
            "files_s",
            (Target("files_s", 1, "best"),),
        ),
        Workload(
            "parquet-column",
            "one of 16 columns of a parquet file of 512 MiB, 32 row groups, 20 ms",
            "table",
            REGION,
            lambda s: s.table,
            _task("parquet"),
            "elapsed_s",
            (no_worse, Target("amplification", 4)),
        ),
    ]


def _scattered_again() -> list[Workload]:
    """What lies in the caches, read again from the disk: the scattered workloads in another state."""
    names = {
        "random-4k-1": "random-warm-1",
        "random-4k-8": "random-warm-8",
        "stride": "stride-warm",
        "backward": "backward-warm",
        "skip-17m": "skip-warm",
        "mmap-seq": "mmap-seq-warm",
        "mmap-random": "mmap-random-warm",
        "zip-random": "zip-warm",
        "parquet-column": "parquet-warm",
    }
    return [
        replace(
            cold,
            name=names[cold.name],
            title=f"{cold.title.removesuffix(', 20 ms').replace(', 20 ms,', ',')}, again, page cache dropped",
            profile=NEAR,
            metric="elapsed_s",
            targets=(Target("elapsed_s", 1.0, "best"),),
            state=DROPPED,
        )
        for cold in _scattered()
        if cold.name in names
    ]


def _small_files() -> list[Workload]:
    def whole(threads: int) -> dict[str, Any]:
        return _task("whole", threads=threads)

    shuffled = {"shuffle": True}
    ceiling = 0.95 * 8 / 0.020
    return [
        Workload(
            "small-order-1",
            "files of 100 KiB in name order, 20 ms, 1 reader",
            "small",
            REGION,
            _small,
            whole(1),
            "files_s",
            (Target("files_s", 15, "best"),),
            downloads=True,
        ),
        Workload(
            "small-order-8",
            "the same, 8 readers",
            "small",
            REGION,
            _small,
            whole(8),
            "files_s",
            (Target("files_s", 1, "best"),),
            downloads=True,
        ),
        Workload(
            "small-shuffled-1",
            "shuffled, 1 reader",
            "small",
            REGION,
            _small,
            whole(1) | shuffled,
            "files_s",
            (Target("files_s", 1, "best"),),
        ),
        Workload(
            "small-shuffled-8",
            "shuffled, 8 readers",
            "small",
            REGION,
            _small,
            whole(8) | shuffled,
            "files_s",
            (Target("files_s", ceiling), Target("files_s", 1, "best")),
        ),
        Workload(
            "small-warm-8",
            "again, page cache dropped, 8 readers",
            "small",
            REGION,
            _small,
            whole(8) | shuffled,
            "files_s",
            (Target("files_s", 1, "best"),),
            state=DROPPED,
        ),
    ]


def _names() -> list[Workload]:
    return [
        Workload(
            "first-byte",
            "open + first 4 KiB of a fresh 1 GiB file, 20 ms, warm connection",
            "fresh",
            REGION,
            _fresh,
            _task("first", block_bytes=4096, primed=True),
            "p50_ms",
            (Target("p50_ms", 25),),
        ),
        Workload(
            "head",
            "head -c 4096 of a 1 GiB file",
            "big",
            REGION,
            _big,
            _task("first", block_bytes=4096),
            "fetched_kib",
            (Target("fetched_kib", 1280),),
        ),
        Workload(
            "find-cold",
            "find -ls of 200,000 files, first time",
            "names",
            NEAR,
            lambda _s: (),
            _task("find"),
            "files_s",
            (Target("files_s", 3, "best"),),
            listed=False,
            timeout_s=600,
        ),
        Workload(
            "find-warm",
            "find -ls again",
            "names",
            NEAR,
            lambda _s: (),
            _task("find"),
            "files_s",
            (Target("files_s", 3, "best"),),
            state=KEPT,
            listed=False,
            timeout_s=600,
        ),
        Workload(
            "ls-cold",
            "ls -lR of 200,000 files, first time",
            "names",
            NEAR,
            lambda _s: (),
            _task("ls"),
            "files_s",
            (Target("files_s", 3, "best"),),
            listed=False,
            timeout_s=600,
        ),
        Workload(
            "ls-warm",
            "ls -lR again",
            "names",
            NEAR,
            lambda _s: (),
            _task("ls"),
            "files_s",
            (Target("files_s", 1, "best"),),
            state=KEPT,
            listed=False,
            timeout_s=600,
        ),
        # "idle CPU 0" is read as a thousandth of a processor at the most: a look every five seconds costs 1 to 3 ms.
        Workload(
            "mount-10k",
            "mount of 10,000 files, until it answers",
            "",
            NEAR,
            lambda _s: (),
            {"pattern": "mount", "files": 10_000, "idle_s": 5},
            "ready_s",
            (Target("ready_s", 1), Target("idle_cpu_s", 0.005)),
        ),
        Workload(
            "mount-100k",
            "mount of 100,000 files (70 MB of JSON)",
            "",
            NEAR,
            lambda _s: (),
            {"pattern": "mount", "files": 100_000, "idle_s": 5},
            "ready_s",
            (Target("ready_s", 2), Target("bytes_per_file", 700), Target("idle_cpu_s", 0.005)),
        ),
    ]


WORKLOADS: tuple[Workload, ...] = (*_sequential(), *_scattered(), *_scattered_again(), *_small_files(), *_names())


def select(dataset: Dataset, reads: int) -> Selection:
    """The bench's own files."""
    inputs = dataset.inputs()
    return Selection(
        big=inputs["big"],
        quarters=inputs["quarters"],
        half=inputs["half"],
        fresh=inputs["fresh"],
        small=inputs["small"],
        archive=inputs["archive"],
        table=inputs["table"],
        names_path="names",
        name_count=len(inputs["names"]),
        reads=reads,
    )
