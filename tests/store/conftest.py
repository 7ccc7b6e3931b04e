"""A store in a directory of the test's own, with a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.segment_rig import Clock
from valohai_fuse.store.segments import SegmentStore


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def store(cache: str, clock: Clock) -> Iterator[SegmentStore]:
    store = SegmentStore(cache, monotonic=clock)
    yield store
    store.close()
