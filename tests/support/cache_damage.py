"""What can happen to cache files outside of our hands: rot in each region of the format, and the loss of power."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.store.evictor import scan
from valohai_fuse.store.upkeep import survey

REGIONS: dict[str, tuple[int, int]] = {
    "magic": (0, 8),
    "fields": (8, 40),
    "checksum": (40, 48),
    "texts": (48, 120),
    "padding": (1200, 3072),
    "table": (3072, 4096),
    "first block": (4096, 4096 + BLOCK_BYTES),
    "other blocks": (4096 + BLOCK_BYTES, 1 << 62),
}
"""Half-open byte ranges of a cache file (docs/cache-format.md)."""
KINDS = ("flip", "zero", "truncate")


def paths(cache_dir: str) -> list[Path]:
    """All segment files."""
    return [Path(cache_dir, segment.FORMAT_DIRECTORY, found.name) for found in sorted(scan(cache_dir))]


def partial_files(cache_dir: str) -> int:
    """Files that somebody had begun and not finished: no header yet, or not all blocks of their segment."""
    return sum(
        held.header is None
        or held.blocks < segment.blocks_in(segment.segment_bytes(held.header.size, held.header.segment_index))
        for held in survey(cache_dir)
    )


def torn_bytes(cache_dir: str) -> int:
    """The most that one of the files holds beyond what its table says: bytes whose entries were still to be written."""
    return max(
        (held.file.bytes_on_disk - held.content_bytes - 3 * segment.PAGE_BYTES for held in survey(cache_dir)), default=0
    )


def damage(path: Path, region: str, kind: str, chance: random.Random) -> bool:
    """Does that to a file; False where it has no such region."""
    start, stop = REGIONS[region]
    size = path.stat().st_size
    stop = min(stop, size)
    if start >= stop:
        return False
    at = chance.randrange(start, stop)
    if kind == "truncate":
        os.truncate(path, at)
        return True
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1 if kind == "flip" else min(stop - at, 3 * BLOCK_BYTES))
        new = bytes([old[0] ^ (1 << chance.randrange(8))]) if kind == "flip" else bytes(len(old))
        file.seek(at)
        file.write(new)
    return True


def lose_power(cache_dir: str, chance: random.Random) -> None:
    """Each file loses some of what was never synced: its end, some of its pages, its first page, or itself."""
    losses: tuple[Callable[[Path, random.Random], None], ...] = (
        _lose_nothing,
        _lose_end,
        _lose_pages,
        _lose_head,
        _lose_all,
    )
    for path in paths(cache_dir):
        chance.choice(losses)(path, chance)


def _lose_nothing(path: Path, chance: random.Random) -> None:
    """This one was written back in time."""


def _lose_end(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size + 1))


def _lose_pages(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        for page in range(0, path.stat().st_size, 4096):
            if chance.random() < 0.2:
                file.seek(page)
                file.write(bytes(min(4096, path.stat().st_size - page)))


def _lose_head(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        file.write(bytes(min(4096, path.stat().st_size)))


def _lose_all(path: Path, chance: random.Random) -> None:
    path.unlink()
