"""Readers that jump by the same distance each time: every 17th MiB, one column of a row-major array, from the end backwards.

Each new place where a reader begins is compared with the last two. Three jumps alike make a stride; then the next places are
planned before they are asked for, three times as many as it has come to so far, each as long as the pieces before it. Two jumps
alike are worth a try with TRIED_PIECES, which also opens the connections that the stride will want. One jump that differs ends
it. Random offsets hardly ever jump by the same distance twice in a row.

The first jump of all, from the beginning of the file over what a large piece there left out, is worth a try with one piece: once
in the life of a handle, a round trip for a piece.

Pure; knows nothing of blocks, caches or sequential readers.
"""

from __future__ import annotations

from valohai_fuse.model.extents import Extent

JUMPS_ALIKE_MIN = 2
"""Repetitions of the first jump before it is believed."""

TRIED_PIECES = 4
"""Planned upon the first repetition, when three places are or were read."""

PLANNED_PER_PLACE = 3
"""Once it is believed: what a stride that ends has fetched in vain, at the most."""

FIRST_PIECE_BYTES_MIN = 256 * 1024
"""Who reads less at the beginning has read a header, and jumps to what that says."""

PIECES_MAX = 64
PIECE_BYTES_MAX = 8 * 1024 * 1024


class Stride:
    """The jumps of one handle. `size` in bytes."""

    __slots__ = ("_alike", "_jump", "_piece_bytes", "_planned", "_size", "_start")

    def __init__(self, size: int) -> None:
        self._size = size
        self._start = -1
        self._jump = 0
        self._alike = 0
        self._planned = 0  # pieces ahead of `_start` that are planned
        self._piece_bytes = 0

    @property
    def believed(self) -> bool:
        """Whether the last jumps were alike: the reader will stop where the pieces before it stopped."""
        return self._alike >= JUMPS_ALIKE_MIN

    @property
    def piece_bytes(self) -> int:
        """How much was read at a place, at the most, since the stride began."""
        return self._piece_bytes

    def on_jump(self, start: int, last_piece_bytes: int, budget_bytes: int) -> list[Extent]:
        """A read begins at a new place; `last_piece_bytes` were read at the one before it.

        The pieces to plan now, in the order in which they will be read, `budget_bytes` of them at the most.
        """
        before, self._start = self._start, start
        if before < 0:
            return []
        jump = start - before
        if jump != self._jump:
            is_first = not self._jump and before == 0
            self._jump, self._alike, self._planned, self._piece_bytes = jump, 0, 0, 0
            if not is_first or not FIRST_PIECE_BYTES_MIN <= last_piece_bytes <= min(
                jump, budget_bytes, PIECE_BYTES_MAX
            ):
                return []
            return self._pieces(1, last_piece_bytes)  # of which some may have been the kernel's own readahead
        self._alike += 1
        self._planned = max(0, self._planned - 1)
        self._piece_bytes = min(max(self._piece_bytes, last_piece_bytes), PIECE_BYTES_MAX)
        if not self._piece_bytes or abs(jump) < self._piece_bytes:
            return []
        places = self._alike + 2
        wanted = PLANNED_PER_PLACE * places if self.believed else TRIED_PIECES
        wanted = min(PIECES_MAX, wanted, budget_bytes // self._piece_bytes)
        return self._pieces(wanted, self._piece_bytes)

    def _pieces(self, upto: int, piece_bytes: int) -> list[Extent]:
        """What is not planned yet of so many pieces ahead."""
        pieces = []
        for nth in range(self._planned + 1, upto + 1):
            at = self._start + nth * self._jump
            if not 0 <= at < self._size:
                break
            pieces.append(Extent(at, min(at + piece_bytes, self._size)))
        self._planned = max(self._planned, upto)
        return pieces
