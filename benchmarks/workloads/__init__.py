"""What is read, how far away the store is, and which number is promised for it: one row of the report each, one module a family."""

from __future__ import annotations

from benchmarks.dataset import Dataset
from benchmarks.workloads.kinds import (
    COLD,
    DROPPED,
    KEPT,
    NAMES_ONLY,
    NEEDS_PYARROW,
    OWN,
    UNITS,
    Selection,
    Target,
    Workload,
)
from benchmarks.workloads.names import names
from benchmarks.workloads.scattered import scattered, scattered_again
from benchmarks.workloads.sequential import sequential
from benchmarks.workloads.small_files import small_files

__all__ = [
    "COLD",
    "DROPPED",
    "KEPT",
    "NAMES_ONLY",
    "NEEDS_PYARROW",
    "OWN",
    "UNITS",
    "WORKLOADS",
    "Selection",
    "Target",
    "Workload",
    "select",
]

WORKLOADS: tuple[Workload, ...] = (*sequential(), *scattered(), *scattered_again(), *small_files(), *names())


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
