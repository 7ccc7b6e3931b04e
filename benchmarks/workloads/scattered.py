"""Large files here and there: at random, in jumps, out of mappings and containers; and the same again from the disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.dataset import MIB
from benchmarks.store import NEAR, REGION
from benchmarks.workloads.kinds import DROPPED, OWN, Target, Workload, big, half, task

_NO_WORSE = Target("elapsed_s", 1.0, "best")


def scattered() -> list[Workload]:
    return [*_at_random(), *_in_jumps(), *_mapped(), *_containers()]


def _random(block_bytes: int, threads: int) -> dict[str, Any]:
    return task("random", block_bytes=block_bytes, threads=threads, count=-1)  # -1: as many as the selection says


def _at_random() -> list[Workload]:
    exact = Target("fetched_per_read_kib", 256)
    once = Target("fetched_kib", 512 * 1024)
    return [
        Workload(
            "random-first-1",
            "the first 200 random reads of 4 KiB of 1 GiB, 20 ms, 1 thread",
            "big",
            REGION,
            big,
            _random(4096, 1) | {"count": 200},
            "p50_ms",
            (Target("p50_ms", 25), Target("p99_ms", 60), exact),
        ),
        Workload(
            "records",
            "100 records of 1,000 bytes of 1 GiB, seek and read of a Python file, 20 ms",
            "big",
            REGION,
            big,
            task("records", block_bytes=1000, count=100),
            "p50_ms",
            (Target("p50_ms", 25), exact),
        ),
        Workload(
            "random-4k-1",
            "2,000 random reads of 4 KiB over 512 MiB, 20 ms, 1 thread",
            "half",
            REGION,
            half,
            _random(4096, 1),
            "elapsed_s",
            (_NO_WORSE, once),
        ),
        Workload(
            "random-4k-8",
            "the same with 8 threads",
            "half",
            REGION,
            half,
            _random(4096, 8),
            "reads_s",
            (Target("reads_s", 7 / 0.025), once, _NO_WORSE),
        ),
        Workload(
            "random-128k-1",
            "random 128 KiB, 1 thread",
            "half",
            REGION,
            half,
            _random(131072, 1),
            "p50_ms",
            (_NO_WORSE,),
        ),
        Workload(
            "random-128k-8",
            "random 128 KiB, 8 threads",
            "half",
            REGION,
            half,
            _random(131072, 8),
            "reads_s",
            (_NO_WORSE,),
        ),
    ]


def _in_jumps() -> list[Workload]:
    return [
        Workload(
            "stride",
            "128 KiB of every 4 MiB, 20 ms",
            "big",
            REGION,
            big,
            task("forward", block_bytes=131072, step_bytes=4 * MIB),
            "elapsed_s",
            (_NO_WORSE,),
        ),
        Workload(
            "backward",
            "512 MiB from end to start, 20 ms",
            "half",
            REGION,
            half,
            task("backward"),
            "mb_s",
            (Target("mb_s", 1, "best"),),
        ),
        Workload(
            "skip-17m",
            "read 1 MiB, jump 17 MiB, 20 ms",
            "big",
            REGION,
            big,
            task("forward", step_bytes=17 * MIB),
            "mb_s",
            (Target("mb_s", 3.0, "best"),),
        ),
    ]


def _mapped() -> list[Workload]:
    return [
        Workload(
            "mmap-seq",
            "1 GiB mapped, in order, 20 ms",
            "big",
            REGION,
            big,
            task("mmap-forward"),
            "mb_s",
            (Target("mb_s", 1, "best"), Target("mb_s", 0.8, f"{OWN}seq-region")),
        ),
        Workload(
            "mmap-random",
            "mapped, random 4 KiB, 20 ms",
            "half",
            REGION,
            half,
            task("mmap-random", block_bytes=4096, count=-1),
            "p50_ms",
            (_NO_WORSE,),
        ),
    ]


def _containers() -> list[Workload]:
    return [
        Workload(
            "zip-random",
            "all members of a zip, shuffled, 20 ms",
            "archive",
            REGION,
            lambda s: s.archive,
            task("zip"),
            "files_s",
            (Target("files_s", 1, "best"),),
        ),
        Workload(
            "parquet-column",
            "one of 16 columns of a parquet file of 512 MiB, 32 row groups, 20 ms",
            "table",
            REGION,
            lambda s: s.table,
            task("parquet"),
            "elapsed_s",
            (_NO_WORSE, Target("amplification", 4)),
        ),
    ]


def scattered_again() -> list[Workload]:
    """What lies in the caches, read again from the disk: the scattered workloads in another state."""
    names = {
        "random-4k-1": "random-warm-1",
        "random-4k-8": "random-warm-8",
        "random-128k-1": "random-128k-warm-1",
        "random-128k-8": "random-128k-warm-8",
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
        for cold in scattered()
        if cold.name in names
    ]
