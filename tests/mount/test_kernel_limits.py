"""What is set in the kernel for a mount, read back from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.mounts import MountInputs
from support.processes import daemon_pid, workers
from valohai_fuse.descriptors import DESCRIPTORS_EXPECTED
from valohai_fuse.mount import kernel


def test_the_kernel_lets_a_thousand_reads_of_a_mount_wait(mount_inputs: MountInputs) -> None:
    """max_background and its congestion threshold are raised from 12 and 9, also where fusectl is mounted nowhere."""
    if os.geteuid() != 0:
        pytest.skip("only root reads these")
    mounted = mount_inputs({"data": {"a.txt": b"hello"}})
    control = kernel._fusectl()
    try:
        connection = os.minor(mounted.path("data").stat().st_dev)
        found = {}
        for name in ("max_background", "congestion_threshold"):
            descriptor = os.open(f"{connection}/{name}", os.O_RDONLY, dir_fd=control)
            found[name] = int(os.read(descriptor, 100))
            os.close(descriptor)
    finally:
        os.close(control)
    assert found == {"max_background": kernel.MAX_BACKGROUND, "congestion_threshold": kernel.MAX_BACKGROUND * 3 // 4}


def test_daemon_and_worker_have_room_for_their_descriptors(mount_inputs: MountInputs) -> None:
    """From the start: making it later, with several threads, is a stall of a hundredth of a second in the middle of a read."""
    mounted = mount_inputs({"data": {"a.txt": b"hello"}})
    assert mounted.path("data", "a.txt").read_bytes() == b"hello"
    daemon = daemon_pid(mounted, "data")
    for pid in (daemon, *workers(daemon)):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        assert int(status.split("FDSize:")[1].split()[0]) >= DESCRIPTORS_EXPECTED
    assert workers(daemon)


def test_limits_of_a_connection_that_is_not_there_are_no_error() -> None:
    """Where the kernel refuses, the mount goes on with what there is."""
    assert kernel._set_limits(2**20 - 1) is False
