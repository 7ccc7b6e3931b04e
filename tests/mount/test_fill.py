"""Background fill on real mounts: reads at random, and after a while the file needs no store any more."""

from __future__ import annotations

import os
import random

import pytest

from support.mounts import MountedSandbox, MountInputs, wait_until
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import Ramp, ramp

MIB = 1024 * 1024
SIZE = 24 * MIB + 12345
ALWAYS = None


def read_at_random(mounted: MountedSandbox, count: int) -> int:
    """An open descriptor after so many reads of 4 KiB anywhere, which the kernel was asked not to extend."""
    fd = os.open(mounted.path("data", "a.bin"), os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    expected, dice = mounted.sandbox.expected_bytes("data", "a.bin"), random.Random(1)
    for _ in range(count):
        offset = dice.randrange(SIZE - 4096)
        assert os.pread(fd, 4096, offset) == expected[offset : offset + 4096]
    return fd


def figures(mounted: MountedSandbox) -> tuple[int, int]:
    """Bytes cached, and bytes filled."""
    (mount,) = mounted.status()["mounts"]
    return mount["cached_bytes"], int(mount["metrics"]["filled_bytes"])


@pytest.mark.timeout(60)
def test_a_file_that_is_read_at_random_is_completed_while_the_line_is_idle(mount_inputs: MountInputs) -> None:
    """Each byte is fetched once, `status` counts what was filled, and with the store gone all of the file can be read."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE)}})
    mounted.sandbox.store.faults.add(faults.delay(0.01), count=ALWAYS)
    fd = read_at_random(mounted, 130)
    try:
        wait_until("the file is complete", lambda: mounted.sent_bytes() >= SIZE, timeout_s=30)
        wait_until("all of it has landed", lambda: figures(mounted)[0] == SIZE)
        assert figures(mounted)[1] > SIZE / 4
        assert mounted.sent_bytes() == SIZE
        mounted.sandbox.stop_store()
        expected = mounted.sandbox.expected_bytes("data", "a.bin")
        assert b"".join(os.pread(fd, MIB, at) for at in range(0, SIZE, MIB)) == expected
    finally:
        os.close(fd)


@pytest.mark.timeout(60)
def test_background_fill_can_be_turned_off(mount_inputs: MountInputs) -> None:
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE)}}, options=("--background-fill=0",))
    mounted.sandbox.store.faults.add(faults.delay(0.01), count=ALWAYS)
    os.close(read_at_random(mounted, 130))
    cached_bytes, filled_bytes = figures(mounted)
    assert filled_bytes == 0
    assert mounted.sent_bytes() == cached_bytes < 0.7 * SIZE


@pytest.mark.timeout(60)
@pytest.mark.parametrize("option", ["4G", "0"])
def test_a_directory_whose_files_are_opened_in_no_order_is_completed(mount_inputs: MountInputs, option: str) -> None:
    """A shuffled epoch: many files are there when they are opened, none comes twice, every byte is right. Turned off, none is."""
    files = {f"{number:03}.jpg": Ramp(20_000, number) for number in range(200)}
    mounted = mount_inputs({"data": files}, options=(f"--background-fill={option}",))
    mounted.sandbox.store.faults.add(faults.delay(0.01), count=ALWAYS)
    for name in random.Random(2).sample(list(files), len(files)):
        assert mounted.path("data", name).read_bytes() == mounted.sandbox.expected_bytes("data", name)
    assert mounted.sent_bytes() == 200 * 20_000
    (mount,) = mounted.status()["mounts"]
    foreseen = mount["metrics"]["hit_bytes"] / (200 * 20_000)
    assert (foreseen > 0.3) == (option != "0"), foreseen


@pytest.mark.timeout(60)
def test_a_record_read_through_a_buffered_file_costs_256_kib_at_the_most(mount_inputs: MountInputs) -> None:
    """Python's files, and C's, read as much at a time as `st_blksize` says, however little they are asked for."""
    size = 512 * MIB  # where next to nothing lies beside anything that was read before
    mounted = mount_inputs({"data": {"a.bin": ramp(size)}}, options=("--background-fill=0",))
    dice, count = random.Random(3), 40
    with mounted.path("data", "a.bin").open("rb") as file:
        for _ in range(count):
            offset = dice.randrange(size - 1000)
            file.seek(offset)
            assert file.read(1000) == mounted.sandbox.expected_bytes("data", "a.bin", offset, offset + 1000)
    assert mounted.sent_bytes() <= count * 256 * 1024
