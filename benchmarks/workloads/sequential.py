"""Large files from beginning to end."""

from __future__ import annotations

from benchmarks.store import CAPPED, FAR, NEAR, REGION, TLS
from benchmarks.workloads.kinds import DROPPED, KEPT, Target, Workload, big, quarters, task


def sequential() -> list[Workload]:
    seq = task("forward")
    lean = Target("cpu_s_gib", 0.6, "leanest cache")
    twice = (Target("mb_s", 2.0, "best"), Target("mb_s", 1.5, "rclone"), lean)
    faster = (Target("mb_s", 1.5, "best"),)
    return [
        Workload("seq-near", "1 GiB in order, store 0 ms away", "big", NEAR, big, seq, "mb_s", faster, downloads=True),
        Workload("seq-region", "1 GiB in order, 20 ms", "big", REGION, big, seq, "mb_s", twice, downloads=True),
        Workload("seq-far", "1 GiB in order, 100 ms", "big", FAR, big, seq, "mb_s", faster, downloads=True),
        Workload(
            "seq-capped",
            "1 GiB, 20 ms, 80 MB/s per connection",
            "big",
            CAPPED,
            big,
            seq,
            "mb_s",
            faster,
            downloads=True,
        ),
        Workload("seq-tls", "1 GiB in order, 20 ms, TLS", "big", TLS, big, seq, "mb_s", faster, downloads=True),
        Workload(
            "files-4",
            "four files of 256 MiB at once, 20 ms",
            "quarters",
            REGION,
            quarters,
            task("forward", threads=4),
            "mb_s",
            (*faster, Target("pss_mib", 300)),
            downloads=True,
        ),
        Workload(
            "seq-warm-kept",
            "1 GiB again, page cache kept",
            "big",
            NEAR,
            big,
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
            big,
            seq,
            "mb_s",
            (Target("mb_s", 1.0, "best"), Target("mb_s", 0.7, "plain")),
            state=DROPPED,
        ),
        Workload(
            "files-4-warm",
            "four files of 256 MiB at once, again, page cache dropped",
            "quarters",
            NEAR,
            quarters,
            task("forward", threads=4),
            "mb_s",
            (Target("mb_s", 1.0, "best"),),
            state=DROPPED,
        ),
    ]
