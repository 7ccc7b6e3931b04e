"""The daemon watches itself: what its watchdog sees stands in the log and in `status`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from support.mounts import MountInputs, read_elsewhere, wait_until
from support.processes import daemon_pid
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp

MIB = 1024 * 1024


def test_sigusr1_writes_what_everybody_waits_for_into_the_log(mount_inputs: MountInputs) -> None:
    """SIGUSR1 dumps the stacks of all threads and tasks and the state, and disturbs no read; no URL's query is in it."""
    mounted = mount_inputs({"data": {"a.bin": ramp(MIB)}}, expected_warnings=(r"obs\.watchdog: ",))
    mounted.sandbox.store.faults.add(faults.stall_after(1000), count=None)
    got: list[bytes] = []
    path = mounted.path("data", "a.bin")
    reader = threading.Thread(target=lambda: got.append(read_elsewhere(path)))
    reader.start()
    try:
        wait_until("it waits", lambda: mounted.status()["mounts"][0]["metrics"]["requests_under_way"] > 0)
        for _ in range(2):
            os.kill(daemon_pid(mounted, "data"), signal.SIGUSR1)
        wait_until("the dump is complete", lambda: "state: {" in mounted.log())
        log = mounted.log()
        assert re.search(r"thread MainThread: .*daemon\.py:\d+ main", log)
        assert re.search(r"flights\.py:\d+ _attempt ", log), "where the fetch waits"
        assert re.search(r'state: \{.*"requests_under_way": [1-9]', log)
        assert "X-Amz" not in log
    finally:
        mounted.sandbox.store.faults.clear()
        mounted.sandbox.stop_store()
        mounted.sandbox.start_store()
        reader.join(30)
    assert got == [mounted.sandbox.expected_bytes("data", "a.bin")]


def test_status_tells_what_a_stopped_daemon_missed(mount_inputs: MountInputs) -> None:
    """A daemon that stood still (here: SIGSTOP in the middle of its work) says so in its log, and `status` warns of it."""
    mounted = mount_inputs(
        {"data": {"a.bin": ramp(MIB)}}, expected_warnings=("the event loop (has stood|stood) still for",)
    )
    daemon = daemon_pid(mounted, "data")
    busy = subprocess.Popen([sys.executable, "-I", "-S", "-c", BUSY_READER, str(mounted.path("data", "a.bin"))])

    def stalls() -> float:
        os.kill(daemon, signal.SIGSTOP)
        threading.Event().wait(0.4)
        os.kill(daemon, signal.SIGCONT)
        return float(mounted.status()["mounts"][0]["metrics"]["loop_stalls"])

    try:
        wait_until("it was stopped in the middle of a pass", lambda: stalls() > 0, timeout_s=40)
    finally:
        busy.kill()
        busy.wait(10)
    said = mounted.cli("status")
    assert re.search(
        r"warning: .*it stood still \d+ times, for \d+\.\d s at the longest; its log says where", said.stderr
    )
    assert "stood still for" in mounted.log()


BUSY_READER = """
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
while True:
    os.pread(file, 4096, 0)
"""


def test_status_counts_what_the_cache_and_the_store_do(mount_inputs: MountInputs) -> None:
    """Memory of a stream, the time to the first byte and blocks that failed their check stand in `status`, not zeros."""
    mounted = mount_inputs({"data": {"a.bin": ramp(9 * MIB)}}, expected_warnings=("failed its check",))
    path = mounted.path("data", "a.bin")
    assert path.read_bytes() == mounted.sandbox.expected_bytes("data", "a.bin")
    (mount,) = mounted.status()["mounts"]
    assert mount["metrics"]["fetch_first_byte_seconds"] > 0
    assert mount["metrics"]["hot_bytes"] > 0
    assert mount["metrics"]["blocks_corrupt"] == 0
    assert mounted.unmount().returncode == 0
    for segment in Path(mounted.cache_dir, "v1").glob("??/*"):
        with segment.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(bytes(byte ^ 1 for byte in file.read(5)))
    assert mounted.mount().returncode == 0
    assert read_elsewhere(path) == mounted.sandbox.expected_bytes("data", "a.bin")
    assert mounted.status()["mounts"][0]["metrics"]["blocks_corrupt"] > 0
