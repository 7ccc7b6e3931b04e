"""A process that lands blocks until it is killed: `python landing_process.py PATH SIZE INDEX VERSION SEED`.

Prints the number of a block (within the segment) once it has landed, one per line. Blocks come in an order shuffled by SEED,
again and again, or once with a sixth argument.
"""

from __future__ import annotations

import random
import sys

from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES
from valohai_fuse.model.segment import blocks_in, segment_bytes
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store.landing import SegmentWriter

PERIOD = bytes(range(251))
LINE_BYTES = 512
"""Long lines in a small pipe: a writer whose reader does not read is held up after a few blocks."""


def ramp(start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the object: a ramp modulo 251."""
    return (PERIOD * ((stop - start) // 251 + 2))[start % 251 : start % 251 + stop - start]


def main() -> None:
    """See the module's text."""
    path, size, index, version = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    order = random.Random(int(sys.argv[5]))
    start, length = index * SEGMENT_BYTES, segment_bytes(size, index)
    blocks = list(range(blocks_in(length)))
    with SegmentWriter(path, ObjectKey("shared", size), index, version) as writer:
        while True:
            order.shuffle(blocks)
            for block in blocks:
                at = start + block * BLOCK_BYTES
                writer.land(at, ramp(at, min(at + BLOCK_BYTES, start + length)))
                print(f"{block:<{LINE_BYTES - 1}}", flush=True)
            if len(sys.argv) > 6:
                return


if __name__ == "__main__":
    main()
