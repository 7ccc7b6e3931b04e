"""Where a segment of a store would land now: for tests that write there what a worker would write, or break it."""

from __future__ import annotations

from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store.segments import SegmentStore


def segment_path(store: SegmentStore, key: ObjectKey, offset: int) -> str:
    """The file of the segment that holds byte `offset`, its directory made, or memory while the disk takes nothing."""
    place = (key, offset // SEGMENT_BYTES)
    path = store._placement.file_path(place)
    if path is not None:
        return path
    with store._placement._standing_in(place, Extent(offset, offset + 1)) as memory:
        return memory
