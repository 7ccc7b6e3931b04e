"""A cache on a network file system whose server stops answering: nothing hangs, reads go on, and the cache comes back."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ssh
from support.mounts import MountedSandbox, OtherExecution, read_elsewhere, wait_until
from valohai_fuse.sandbox import Sandbox, ramp

pytestmark = pytest.mark.skipif(not ssh.is_installed(), reason="needs sshfs and sshd")

MIB = 1024 * 1024
SMALL = {f"{n}.bin": ramp(70_000 + n) for n in range(400)}
FILES = {"big.bin": ramp(40 * MIB + 777), "cold.bin": ramp(60 * MIB + 5), **SMALL}
AT_ONCE_S = 20.0
"""Far more than a read takes on a busy machine, far less than anything here waits for when it hangs."""


class Frozen:
    """A mount whose cache is on sshfs, and the process to stop for it to hang."""

    def __init__(self, mounted: MountedSandbox, host: ssh.Host) -> None:
        self.mounted = mounted
        self.host = host
        self._names = iter(random.Random(1).sample(sorted(SMALL), len(SMALL)))  # nothing that could be fetched ahead

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Every call into the cache's file system hangs meanwhile."""
        os.kill(self.host.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.host.pid, signal.SIGCONT)

    def is_right(self, name: str) -> bool:
        """Reads a whole file, in another process, within AT_ONCE_S."""
        found = read_elsewhere(self.mounted.path("data", name), timeout_s=AT_ONCE_S)
        return found == self.mounted.sandbox.expected_bytes("data", name)

    def read_a_new_one(self) -> bool:
        """Reads a file that nobody has read yet."""
        return self.is_right(next(self._names))

    def cached_files(self) -> int:
        """How many segments the cache holds. Hangs while it is frozen."""
        return sum(1 for _ in Path(self.mounted.cache_dir, "v1").glob("??/*"))


@pytest.fixture
def on_sshfs(own_directories: Path) -> Iterator[Frozen]:
    """Mounted, with `big.bin` in the cache."""
    shared = own_directories / "shared"
    shared.mkdir()
    with contextlib.ExitStack() as stack:
        options = stack.enter_context(ssh.server(own_directories / "ssh"))
        host = stack.enter_context(ssh.mounted(options, shared, own_directories / "host"))
        sandbox = stack.enter_context(Sandbox({"data": FILES}, root=own_directories / "valohai"))
        mounted = stack.enter_context(
            OtherExecution(
                sandbox,
                own_directories,
                "e",
                cache_dir=str(host.mountpoint / "cache"),
                expected_warnings=("it does not answer", "did not answer", "the event loop (has stood|stood) still"),
            )
        )
        frozen = Frozen(mounted, host)
        assert frozen.is_right("big.bin")
        assert mounted.unmount().returncode == 0  # and what the kernel has of it is gone
        assert mounted.mount().returncode == 0
        yield frozen


def test_reads_go_on_beside_a_disk_that_hangs(on_sshfs: Frozen) -> None:
    """What was cached is fetched again, what is new is fetched, each right and soon; `status` answers; the log says it once;
    and what is read later is cached again."""
    mounted = on_sshfs.mounted
    with on_sshfs.frozen():
        assert on_sshfs.read_a_new_one()
        began_s = time.monotonic()
        assert on_sshfs.is_right("big.bin")
        assert all(on_sshfs.read_a_new_one() for _ in range(5))
        assert time.monotonic() - began_s < AT_ONCE_S
        wait_until("it is called sick", lambda: on_sshfs.read_a_new_one() and "it does not answer" in mounted.log())
        assert mounted.status()["mounts"][0]["state"] == "mounted"
    cached = on_sshfs.cached_files()

    def cached_again() -> bool:
        assert on_sshfs.read_a_new_one()
        return on_sshfs.cached_files() > cached

    wait_until("something is cached again", cached_again)
    assert mounted.log().count("it does not answer") == 1


def test_a_stream_goes_on_when_the_disk_stops_in_the_middle(on_sshfs: Frozen) -> None:
    """What has landed and waits to be written holds no connection for longer than it takes to see that nothing moves."""
    path = on_sshfs.mounted.path("data", "cold.bin")
    wanted = on_sshfs.mounted.sandbox.expected_bytes("data", "cold.bin")
    assert read_elsewhere(path, 0, 8 * MIB) == wanted[: 8 * MIB]
    with on_sshfs.frozen():
        assert read_elsewhere(path, 8 * MIB, len(wanted), timeout_s=AT_ONCE_S) == wanted[8 * MIB :]
    assert on_sshfs.read_a_new_one()


def test_a_mount_goes_beside_a_disk_that_hangs(on_sshfs: Frozen) -> None:
    """`unmount` comes back, and nothing is left mounted."""
    with on_sshfs.frozen():
        assert on_sshfs.read_a_new_one()
        assert on_sshfs.mounted.unmount().returncode == 0
        assert not os.path.ismount(on_sshfs.mounted.path("data"))
