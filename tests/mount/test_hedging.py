"""An answer that does not come, seen from a reader: the store is asked once more."""

from __future__ import annotations

import random
import time

from support.mounts import MountInputs
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile

PLACES = 100


def test_one_answer_in_a_hundred_that_stalls_is_not_waited_for(mount_inputs: MountInputs) -> None:
    """A read whose answer never comes takes a fraction of the stall timeout, for a second request brings it; there are no
    others of those."""
    size = PLACES * SEGMENT_BYTES
    offsets = [place * SEGMENT_BYTES + 4096 for place in range(PLACES)]
    random.Random(5).shuffle(offsets)
    mounted = mount_inputs(
        {"data": [SandboxFile("a.bin", ramp(size))]}, options=["--readahead=0", "--stall-timeout=30"]
    )
    mounted.sandbox.store.faults.add(faults.stall_after(0), path="data/a.bin", first=80)
    path = mounted.path("data", "a.bin")
    began_s = time.monotonic()
    with path.open("rb", buffering=0) as file:
        for offset in offsets:
            file.seek(offset)
            assert file.read(4096) == mounted.sandbox.expected_bytes("data", "a.bin", offset, offset + 4096)
    assert time.monotonic() - began_s < 15
    (mount,) = mounted.status()["mounts"]
    counted = mount["metrics"]
    assert counted["fetch_hedges_won"] == 1
    assert counted["fetch_hedges"] <= 5
    assert counted["fetch_retries"] == 0
