"""What a directory that nobody made for us offers to read: `scripts/bench --target DIR`.

Sizes are not checked against a ramp, for the content is not ours; cold is as cold as dropping this machine's page cache makes it.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.dataset import MIB, DataFile
from benchmarks.store import NEAR, REGION, Profile
from benchmarks.workloads import COLD, NAMES_ONLY, Selection, Workload

_SMALL_MAX_BYTES = MIB
_SMALL_COUNT_MAX = 1000


def below(target: Path, *, reads: int) -> Selection:
    """The largest files for what needs large ones, files up to 1 MiB for what needs small ones, all names for `find`."""
    files = []
    count = 0
    for directory, _, names in os.walk(target):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                count += 1
                files.append(DataFile("", str(path.relative_to(target)), path.stat().st_size, None))
    by_size = sorted(files, key=lambda f: (-f.size, f.name))
    large = [f for f in by_size if f.size >= 4096]
    small = sorted((f for f in files if 0 < f.size <= _SMALL_MAX_BYTES), key=lambda f: f.name)[:_SMALL_COUNT_MAX]
    return Selection(
        big=tuple(_rooted(large[:1])),
        quarters=tuple(_rooted(large[:4])),
        half=tuple(_rooted(large[:1])),
        fresh=tuple(_rooted(large[:33])),
        small=tuple(_rooted(small)),
        archive=tuple(_rooted([f for f in large if f.name.endswith(".zip")][:1])),
        table=tuple(_rooted([f for f in large if f.name.endswith(".parquet")][:1])),
        names_path=".",
        name_count=count,
        reads=reads,
    )


def _rooted(files: list[DataFile]) -> list[DataFile]:
    """`DataFile.path` joins input and name; "." as the input leaves the name alone."""
    return [DataFile(".", f.name, f.size, None) for f in files]


def suits(workload: Workload, selection: Selection) -> bool:
    """Whether there is something to read for it."""
    if workload.task["pattern"] in NAMES_ONLY:
        return selection.name_count > 0
    files = workload.files(selection)
    return len(files) > (1 if workload.task.get("primed") else 0)


def title(workload: Workload, selection: Selection) -> str:
    """What is read here, in place of what the bench's own data set would have been."""
    task = workload.task
    if task["pattern"] in NAMES_ONLY:
        return f"{task['pattern']}, {_counted(selection.name_count)}"
    files = workload.files(selection)
    parts = [f"{task['pattern']} in pieces of {task['block_bytes'] // 1024:,} KiB"]
    if step_bytes := task.get("step_bytes"):
        parts.append(f"one of every {step_bytes // 1024:,} KiB")
    if task["threads"] > 1:
        parts.append(f"{task['threads']} threads")
    parts.append(f"{_counted(len(files))} of {sum(f.size for f in files) / MIB:,.1f} MiB in all")
    return ", ".join([*parts, *(["again"] if workload.state != COLD else [])])


def _counted(files: int) -> str:
    return f"{files:,} {'file' if files == 1 else 'files'}"


def representative(workload: Workload) -> Profile:
    """The one profile of a family that is read on a target: there is no store whose distance could differ."""
    return REGION if workload.profile not in {NEAR, REGION} or workload.name == "seq-near" else workload.profile
