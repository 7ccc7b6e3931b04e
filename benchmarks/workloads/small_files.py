"""Many small files, whole."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.store import NEAR, REGION
from benchmarks.workloads.kinds import DROPPED, Target, Workload, small, task

CEILING_FILES_S = 0.95 * 8 / 0.020
"""Of eight readers in no order: a round trip for each file."""
BATCH_FILES = 32

NOT_BEHIND = (Target("files_s", 1, "best"),)


def small_files() -> list[Workload]:
    cold = _cold()
    again = {
        "small-order-1": "small-order-warm-1",
        "small-order-8": "small-order-warm-8",
        "small-batches-8": "small-batches-warm-8",
        "small-shuffled-1": "small-shuffled-warm-1",
        "small-shuffled-8": "small-warm-8",
    }
    return [*cold, *(_again(workload, again[workload.name]) for workload in cold)]


def _again(cold: Workload, name: str) -> Workload:
    """What lies in the caches, read again from the disk."""
    return replace(
        cold,
        name=name,
        title=f"{cold.title.removesuffix(', 20 ms')}, again, page cache dropped",
        profile=NEAR,
        targets=NOT_BEHIND,
        state=DROPPED,
        downloads=False,
    )


def _cold() -> list[Workload]:
    order = Workload(
        "small-order-1",
        "files of 100 KiB in name order, 1 reader, 20 ms",
        "small",
        REGION,
        small,
        task("whole"),
        "files_s",
        (Target("files_s", 15, "best"),),
        downloads=True,
    )
    shuffled = replace(order, targets=NOT_BEHIND, downloads=False)
    return [
        order,
        replace(
            order,
            name="small-order-8",
            title="files of 100 KiB in name order, 8 readers, 20 ms",
            task=task("whole", threads=8),
            targets=NOT_BEHIND,
        ),
        replace(
            shuffled,
            name="small-batches-8",
            title=f"files of 100 KiB in batches of {BATCH_FILES}, 8 readers take them in turn, 20 ms",
            task=task("whole", threads=8, batch=BATCH_FILES),
        ),
        replace(
            shuffled,
            name="small-shuffled-1",
            title="files of 100 KiB shuffled, 1 reader, 20 ms",
            task=task("whole", shuffle=True),
        ),
        replace(
            shuffled,
            name="small-shuffled-8",
            title="files of 100 KiB shuffled, 8 readers, 20 ms",
            task=task("whole", threads=8, shuffle=True),
            targets=(Target("files_s", CEILING_FILES_S), *NOT_BEHIND),
        ),
    ]
