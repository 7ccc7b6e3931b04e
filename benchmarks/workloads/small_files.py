"""Many small files, whole."""

from __future__ import annotations

from typing import Any

from benchmarks.store import NEAR, REGION
from benchmarks.workloads.kinds import DROPPED, Target, Workload, small, task


def small_files() -> list[Workload]:
    def whole(threads: int) -> dict[str, Any]:
        return task("whole", threads=threads)

    shuffled = {"shuffle": True}
    ceiling = 0.95 * 8 / 0.020
    return [
        Workload(
            "small-order-1",
            "files of 100 KiB in name order, 20 ms, 1 reader",
            "small",
            REGION,
            small,
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
            small,
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
            small,
            whole(1) | shuffled,
            "files_s",
            (Target("files_s", 1, "best"),),
        ),
        Workload(
            "small-shuffled-8",
            "shuffled, 8 readers",
            "small",
            REGION,
            small,
            whole(8) | shuffled,
            "files_s",
            (Target("files_s", ceiling), Target("files_s", 1, "best")),
        ),
        Workload(
            "small-warm-8",
            "again, page cache dropped, 8 readers",
            "small",
            REGION,
            small,
            whole(8) | shuffled,
            "files_s",
            (Target("files_s", 1, "best"),),
            state=DROPPED,
        ),
        *(
            Workload(
                name,
                f"{title}, again, page cache dropped",
                "small",
                NEAR,
                small,
                read,
                "files_s",
                (Target("files_s", 1, "best"),),
                state=DROPPED,
            )
            for name, title, read in (
                ("small-order-warm-1", "files of 100 KiB in name order, 1 reader", whole(1)),
                ("small-order-warm-8", "the same, 8 readers", whole(8)),
                ("small-shuffled-warm-1", "shuffled, 1 reader", whole(1) | shuffled),
            )
        ),
    ]
