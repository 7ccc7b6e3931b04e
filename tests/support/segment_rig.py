"""One small object in a segment store: lands it, reads it, harms its file."""

from __future__ import annotations

import os

import trio

from support.segment_paths import segment_path
from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent
from valohai_fuse.ports import ABSENT, NotHere, ObjectKey
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.segments import SegmentStore

BLOCKS = 6
SIZE = (BLOCKS - 1) * BLOCK_BYTES + 1000
KEY = ObjectKey("datum:x", SIZE)
ALL = Extent(0, SIZE)
PERIOD = bytes(range(251))


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def ramp(extent: Extent) -> bytes:
    first = extent.start % 251
    return (PERIOD * (len(extent) // 251 + 2))[first : first + len(extent)]


def block_extent(block: int, size: int = SIZE) -> Extent:
    return Extent(block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, size))


def land(store: SegmentStore, extent: Extent = ALL, version: str = "v", key: ObjectKey = KEY) -> str:
    """What a worker does; on the disk's refusal also what the engine does then. Returns where it landed."""
    path = segment_path(store, key, extent.start)
    try:
        with SegmentWriter(path, key, extent.start // SEGMENT_BYTES, version) as writer:
            writer.land(extent.start, ramp(extent))
    except OSError as error:
        store.landing_failed(key, extent.start, error.strerror or "")
        return land(store, extent, version, key)
    return path


def read(store: SegmentStore, extent: Extent = ALL, version: str = "v", key: ObjectKey = KEY) -> bytes | NotHere:
    found = trio.run(store.read, key, version, extent)
    return found if isinstance(found, NotHere) else bytes(found)


def assert_never_wrong(store: SegmentStore, size: int = SIZE) -> list[int]:
    """Each block is right or absent, by both ways of reading, twice; returns those that are absent in the end."""
    key = ObjectKey(KEY.stable_id, size)
    absent: list[int] = []
    for _ in range(2):
        absent = []
        for block in range(segment.blocks_in(size)):
            extent = block_extent(block, size)
            now, later = store.read_nowait(key, "v", extent), read(store, extent, key=key)
            for found in (now, later):
                assert isinstance(found, NotHere) or bytes(found) == ramp(extent)
            if isinstance(later, NotHere):
                assert later is ABSENT
                absent.append(block)
    return absent


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: str, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def regrow(path: str, length: int) -> None:
    size = os.path.getsize(path)
    os.truncate(path, length)
    os.truncate(path, size)
