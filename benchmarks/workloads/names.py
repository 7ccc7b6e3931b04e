"""Names, attributes, first bytes, and how long it takes until a mount is there."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.store import NEAR, REGION
from benchmarks.workloads.kinds import KEPT, Target, Workload, big, fresh, task


def _walked(pattern: str, command: str, *, again: float) -> list[Workload]:
    """A walk over all names, and the next one, which is to be `again` times as fast as the best other mount's."""
    first = Workload(
        f"{pattern}-cold",
        f"{command} of 200,000 files, first time",
        "names",
        NEAR,
        lambda _s: (),
        task(pattern),
        "files_s",
        (Target("files_s", 3, "best"),),
        listed=False,
        timeout_s=600,
    )
    targets = (Target("files_s", again, "best"),)
    return [first, replace(first, name=f"{pattern}-warm", title=f"{command} again", targets=targets, state=KEPT)]


def names() -> list[Workload]:
    return [
        Workload(
            "first-byte",
            "open + first 4 KiB of a fresh 1 GiB file, 20 ms, warm connection",
            "fresh",
            REGION,
            fresh,
            task("first", block_bytes=4096, primed=True),
            "p50_ms",
            (Target("p50_ms", 25),),
        ),
        Workload(
            "head",
            "head -c 4096 of a 1 GiB file",
            "big",
            REGION,
            big,
            task("first", block_bytes=4096),
            "fetched_kib",
            (Target("fetched_kib", 1280),),
        ),
        *_walked("find", "find -ls", again=3),
        *_walked("ls", "ls -lR", again=1),
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
