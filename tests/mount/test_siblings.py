"""Files that several workers open, each in an order of its own, seen from outside."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from support.mounts import MountInputs
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile

WORKERS = 4
FILES = 40
FILE_BYTES = 4096


def test_each_worker_of_a_data_loader_is_followed(mount_inputs: MountInputs) -> None:
    """Four of them, each with a part of the directory: most of it is fetched before it is opened. Nothing else would do that:
    what completes a directory is switched off."""
    names = [f"{number:03}.bin" for number in range(WORKERS * FILES)]
    files = [SandboxFile(name, ramp(FILE_BYTES + number)) for number, name in enumerate(names)]
    mounted = mount_inputs({"data": files}, options=["--background-fill=0"])
    mounted.sandbox.store.faults.add(faults.delay(0.02), count=None)
    begin = threading.Barrier(WORKERS)

    def work(worker: int) -> None:
        begin.wait()
        for name in names[worker * FILES : (worker + 1) * FILES]:
            assert mounted.path("data", name).read_bytes() == mounted.sandbox.expected_bytes("data", name)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(WORKERS)))
    (mount,) = mounted.status()["mounts"]
    counted = mount["metrics"]
    assert counted["ahead_bytes"] > 0.8 * len(names) * FILE_BYTES
    assert counted["read_bytes"] == sum(FILE_BYTES + number for number in range(len(names)))
