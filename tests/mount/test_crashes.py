"""What dies, and who notices: workers, the daemon, the supervisor, `run` itself; and ends that were asked for while files are busy.

A reader gets its bytes or an error, and never hangs; the mount is whole, or dead and visible, or gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

import pytest

from support.mounts import MountedSandbox, MountInputs, run_cli, wait_until
from support.processes import children, daemon_pid, is_gone, supervisor_pid, workers
from valohai_fuse.mount import table
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile
from valohai_fuse.sandbox.valohai import Sandbox

MIB = 1024 * 1024
LOST_WORKER = r"a fetch worker \(pid \d+\) died"
KILLED_DAEMON = "ended unexpectedly: killed by signal 9"
DEAD = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}

READER = """
import hashlib, os, sys
try:
    with open(sys.argv[1], "rb", buffering=0) as file:
        print("open", flush=True)
        total, digest = 0, hashlib.sha256()
        while piece := file.read(1 << 20):
            total += len(piece)
            digest.update(piece)
        print(total, digest.hexdigest(), flush=True)
except OSError as error:
    print("errno", error.errno, flush=True)
"""


class Reader:
    """`cat` of one file in another process, that says its digest or its errno."""

    def __init__(self, path: str | Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", READER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._out: IO[str] = self._process.stdout

    def wait_open(self) -> None:
        """Until the file is open."""
        assert self._out.readline() == "open\n"

    def said(self, timeout_s: float = 30) -> list[str]:
        """The words of the last line. Raises TimeoutExpired when it hangs."""
        out, _ = self._process.communicate(timeout=timeout_s)
        return out.splitlines()[-1].split()

    def errno(self, timeout_s: float = 30) -> int:
        """The errno that ended it."""
        words = self.said(timeout_s)
        assert words[0] == "errno", words
        return int(words[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)


def whole(sandbox: Sandbox, name: str, input_name: str = "data") -> list[str]:
    data = sandbox.expected_bytes(input_name, name)
    return [str(len(data)), hashlib.sha256(data).hexdigest()]


def reads_under_way(mounted: MountedSandbox) -> float:
    (mount,) = mounted.status()["mounts"]
    return float(mount["metrics"]["reads_under_way"])


# --- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced_and_the_reader_notices_nothing(mount_inputs: MountInputs) -> None:
    """Every worker is killed again and again while a stream is read: right bytes, no error, and `status` counts the lost."""
    mounted = mount_inputs({"data": {"a.bin": ramp(24 * MIB)}}, expected_warnings=(LOST_WORKER,))
    mounted.sandbox.store.faults.add(faults.drip(256 * 1024, 0.05), count=None)
    daemon = daemon_pid(mounted, "data")
    with Reader(mounted.path("data", "a.bin")) as reader:
        reader.wait_open()
        for _ in range(4):
            wait_until("there is a worker", lambda: bool(workers(daemon)))
            sent = mounted.sent_bytes()
            wait_until("it fetches", lambda before=sent: mounted.sent_bytes() > before)  # type: ignore[misc]  # a default binds it
            for pid in workers(daemon):
                os.kill(pid, signal.SIGKILL)
        mounted.sandbox.store.faults.clear()
        assert reader.said() == whole(mounted.sandbox, "a.bin")
    (mount,) = mounted.status()["mounts"]
    assert mount["errors"] == 0
    assert mount["metrics"]["workers_lost"] >= 4
    assert mount["metrics"]["workers"] == len(workers(daemon))


def test_a_worker_is_there_before_the_first_read(mount_inputs: MountInputs) -> None:
    """A mount starts one as soon as it answers. Where there are many, most of which may never be read, whoever looks at names
    will read soon: it starts then."""
    names = ["data", "b", "c", "d", "e"]
    mounted = mount_inputs({name: {"a.bin": ramp(2 * MIB)} for name in names})
    daemon = daemon_pid(mounted, "data")
    assert not workers(daemon)
    assert os.listdir(mounted.path("data")) == ["a.bin"]
    wait_until("a worker runs", lambda: len(workers(daemon)) == 1)
    assert not any(workers(daemon_pid(mounted, name)) for name in names[1:])
    assert mounted.unmount().returncode == 0
    assert mounted.mount("data").returncode == 0
    wait_until("a worker runs, unasked", lambda: len(workers(daemon_pid(mounted, "data"))) == 1)
    with Reader(mounted.path("data", "a.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "a.bin")


def test_a_worker_without_memory_is_replaced_and_the_reader_notices_nothing(mount_inputs: MountInputs) -> None:
    """A worker that can allocate nothing any more (RLIMIT_AS) ends, and another takes its orders."""
    mounted = mount_inputs(
        {"data": {"a.bin": ramp(2 * MIB), "b.bin": ramp(40 * MIB)}},
        options=("--workers=1", "--read-timeout=20"),
        expected_warnings=(LOST_WORKER,),
    )
    daemon = daemon_pid(mounted, "data")
    with Reader(mounted.path("data", "a.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "a.bin")
    (starved,) = workers(daemon)
    resource.prlimit(starved, resource.RLIMIT_AS, (1, 1))
    with Reader(mounted.path("data", "b.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "b.bin")
    assert starved not in workers(daemon), "the limit was none"
    (mount,) = mounted.status()["mounts"]
    assert mount["errors"] == 0


@pytest.mark.parametrize("spare_bytes", [64 * 1024, 4 * MIB])
def test_a_worker_that_runs_short_of_memory_in_mid_stream(mount_inputs: MountInputs, spare_bytes: int) -> None:
    """Little more may be allocated than there is: some transfers of it fail or it ends, and the reader gets every byte."""
    mounted = mount_inputs(
        {"data": {"a.bin": ramp(MIB), "b.bin": ramp(40 * MIB)}},
        options=("--workers=1", "--read-timeout=20"),
        expected_warnings=(LOST_WORKER,),
    )
    with Reader(mounted.path("data", "a.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "a.bin")
    (short,) = workers(daemon_pid(mounted, "data"))
    _limit_memory(short, spare_bytes)
    with Reader(mounted.path("data", "b.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "b.bin")
    (mount,) = mounted.status()["mounts"]
    assert mount["metrics"]["fetch_retries"] >= 1, "the limit was none"
    assert mount["errors"] == 0
    assert mount["metrics"]["loop_stalls"] == 0


def _limit_memory(pid: int, spare_bytes: int) -> None:
    """What a process may map from now on: what it has, and so much more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


# --- the daemon -------------------------------------------------------------------------------------------------------


def test_readers_of_a_daemon_that_is_killed_get_an_error_at_once(mount_inputs: MountInputs) -> None:
    """Reads that wait when the daemon dies end with an error and never hang; the mount stays dead and visible, `status`
    says so, `mount` mends it, and what was read is still in the cache."""
    mounted = mount_inputs({"data": {"a.bin": ramp(8 * MIB), "b.bin": ramp(MIB)}}, expected_warnings=(KILLED_DAEMON,))
    with Reader(mounted.path("data", "b.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "b.bin")
    mounted.sandbox.store.faults.add(faults.stall_after(0), count=None)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(Reader(mounted.path("data", "a.bin"))) for _ in range(4)]
        for reader in readers:
            reader.wait_open()
        wait_until("they wait", lambda: reads_under_way(mounted) >= 1)
        daemon = daemon_pid(mounted, "data")
        left = workers(daemon)
        os.kill(daemon, signal.SIGKILL)
        assert {reader.errno(timeout_s=10) for reader in readers} <= DEAD
    wait_until("its workers have gone with it", lambda: all(map(is_gone, left)))
    entry = table.find(str(mounted.path("data")))
    assert entry is not None
    assert entry.is_ours, "an input that suddenly looks empty is worse than an error"
    with pytest.raises(OSError, match="not connected"):
        os.listdir(mounted.path("data"))
    status = mounted.cli("status", "--json")
    assert (status.returncode, json.loads(status.stdout)["mounts"][0]["state"]) == (1, "dead")
    mounted.sandbox.stop_store()
    mended = mounted.mount()
    assert mended.returncode == 0, mended.stderr
    with Reader(mounted.path("data", "b.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "b.bin")
    mounted.sandbox.store.faults.clear()
    mounted.sandbox.start_store()
    with Reader(mounted.path("data", "a.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "a.bin")


def test_a_daemon_that_dies_while_it_writes_leaves_a_cache_that_tells_the_truth(mount_inputs: MountInputs) -> None:
    """kill -9 in the middle of landing, several times: after each the bytes are right."""
    mounted = mount_inputs({"data": {"a.bin": ramp(20 * MIB)}}, expected_warnings=(KILLED_DAEMON, LOST_WORKER))
    # Else all of it may have landed before the first is killed, and nothing is left to be sent to the second.
    mounted.sandbox.store.faults.add(faults.drip(64 * 1024, 0.02), count=None)
    for _ in range(3):
        daemon = daemon_pid(mounted, "data")
        before = mounted.sent_bytes()
        with Reader(mounted.path("data", "a.bin")) as reader:
            reader.wait_open()
            wait_until("bytes are landing", lambda start=before: mounted.sent_bytes() > start + 64 * 1024)  # type: ignore[misc]
            for pid in [daemon, *workers(daemon)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            words = reader.said()
        assert (words[0] == "errno" and int(words[1]) in DEAD) or words == whole(mounted.sandbox, "a.bin")
        wait_until("it is dead", lambda: table.answers(str(mounted.path("data"))) is False)
        assert mounted.mount().returncode == 0
        if words[0] != "errno":
            break
    with Reader(mounted.path("data", "a.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "a.bin")


# --- the supervisor ---------------------------------------------------------------------------------------------------


def test_nobody_notices_that_the_supervisor_is_killed(mount_inputs: MountInputs) -> None:
    """The daemon goes on in the middle of a read, `status` and `unmount` do without; a daemon that dies then is told as well."""
    mounted = mount_inputs({"data": {"a.bin": ramp(16 * MIB)}})
    mounted.sandbox.store.faults.add(faults.drip(256 * 1024, 0.02), count=None)
    with Reader(mounted.path("data", "a.bin")) as reader:
        reader.wait_open()
        os.kill(supervisor_pid(mounted, "data"), signal.SIGKILL)
        assert reader.said() == whole(mounted.sandbox, "a.bin")
    assert mounted.status()["mounts"][0]["state"] == "mounted"
    os.kill(daemon_pid(mounted, "data"), signal.SIGKILL)
    wait_until("it is dead", lambda: table.answers(str(mounted.path("data"))) is False)
    assert json.loads(mounted.cli("status", "--json").stdout)["mounts"][0]["state"] == "dead"
    assert mounted.mount().returncode == 0
    with Reader(mounted.path("data", "a.bin")) as reader:
        assert reader.said() == whole(mounted.sandbox, "a.bin")


# --- ends that were asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["daemon", "supervisor"])
def test_a_signal_unmounts_within_the_grace_period_also_when_files_are_busy(
    mount_inputs: MountInputs, number: signal.Signals, whom: str
) -> None:
    """SIGTERM and SIGINT unmount; with busy files lazily after the grace period, said so in the log; readers get an error."""
    mounted = mount_inputs(
        {"data": {"a.bin": ramp(8 * MIB)}},
        options=("--grace-period=1",),
        expected_warnings=("is busy .* detached lazily",),
    )
    mounted.sandbox.store.faults.add(faults.stall_after(0), count=None)
    daemon = daemon_pid(mounted, "data")
    with Reader(mounted.path("data", "a.bin")) as reader:
        reader.wait_open()
        wait_until("it waits", lambda: reads_under_way(mounted) >= 1)
        os.kill(daemon if whom == "daemon" else supervisor_pid(mounted, "data"), number)
        assert reader.errno(timeout_s=10) in DEAD
    wait_until("the daemon has gone", lambda: is_gone(daemon), timeout_s=5)
    assert table.find(str(mounted.path("data"))) is None
    assert re.search("is busy .* detached lazily", mounted.log())
    wait_until("the record has gone", lambda: not list(Path(mounted.runtime_dir).glob("*.json")), timeout_s=5)


def test_a_signal_waits_for_a_reader_that_ends_in_time(mount_inputs: MountInputs) -> None:
    """Within the grace period reads go on being answered: a reader that ends in time gets every byte, and nothing is detached."""
    mounted = mount_inputs({"data": {"a.bin": ramp(8 * MIB)}}, options=("--grace-period=20",))
    mounted.sandbox.store.faults.add(faults.drip(256 * 1024, 0.05), count=None)
    daemon = daemon_pid(mounted, "data")
    with Reader(mounted.path("data", "a.bin")) as reader:
        reader.wait_open()
        os.kill(daemon, signal.SIGTERM)
        assert reader.said() == whole(mounted.sandbox, "a.bin")
    wait_until("the daemon has gone", lambda: is_gone(daemon), timeout_s=5)
    assert table.find(str(mounted.path("data"))) is None


def everybody(*tops: int) -> list[int]:
    """These processes and all that they have started."""
    found = list(tops)
    for pid in found:
        found += [child for child in children(pid) if child not in found]
    return found


def test_a_shutdown_of_the_host_lets_a_reader_end_that_can(mount_inputs: MountInputs) -> None:
    """SIGTERM to supervisor, daemon and workers at once, as a host that shuts down does: the stream that is under way is read to
    its end, then all is unmounted, and nothing is left."""
    mounted = mount_inputs(
        {"data": {"a.bin": ramp(8 * MIB)}}, options=("--grace-period=20",), expected_warnings=(LOST_WORKER,)
    )
    mounted.sandbox.store.faults.add(faults.drip(256 * 1024, 0.05), count=None)
    with Reader(mounted.path("data", "a.bin")) as reader:
        reader.wait_open()
        wait_until("it is in the middle", lambda: mounted.sent_bytes() > 512 * 1024)
        pids = everybody(supervisor_pid(mounted, "data"))
        assert len(pids) >= 3
        _terminate(pids)
        assert reader.said() == whole(mounted.sandbox, "a.bin")
    wait_until("all have gone", lambda: all(map(is_gone, pids)), timeout_s=10)
    assert table.find(str(mounted.path("data"))) is None
    assert not list(Path(mounted.runtime_dir).glob("*.json"))


def test_a_shutdown_of_the_host_is_not_held_up(mount_inputs: MountInputs) -> None:
    """The same with a store that does not answer: all are gone soon after the grace period, and the reader has its error."""
    mounted = mount_inputs(
        {"data": {"a.bin": ramp(8 * MIB)}},
        options=("--grace-period=1",),
        expected_warnings=(LOST_WORKER, "is busy .* detached lazily"),
    )
    mounted.sandbox.store.faults.add(faults.stall_after(0), count=None)
    with Reader(mounted.path("data", "a.bin")) as reader:
        reader.wait_open()
        wait_until("it waits", lambda: reads_under_way(mounted) >= 1)
        pids = everybody(supervisor_pid(mounted, "data"))
        _terminate(pids)
        assert reader.errno(timeout_s=10) in DEAD
    wait_until("all have gone", lambda: all(map(is_gone, pids)), timeout_s=10)
    assert table.find(str(mounted.path("data"))) is None
    assert not list(Path(mounted.runtime_dir).glob("*.json"))


def _terminate(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


# --- run -- CMD -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sandbox(own_directories: Path) -> Iterator[Sandbox]:
    with Sandbox({"data": [SandboxFile("a.bin", ramp(4 * MIB))]}, root=own_directories / "valohai") as made:
        yield made


class Run:
    """`valohai-fuse run -- python -c ...` whose command says `up` and then waits for a line from us."""

    def __init__(self, sandbox: Sandbox, then: str, *options: str) -> None:
        code = f"import sys\nprint('up', flush=True)\nsys.stdin.readline()\npath = {sandbox.inputs_dir!r} + '/data/a.bin'\n{then}"
        places = MountedSandbox(sandbox).places
        self.mountpoint = f"{sandbox.inputs_dir}/data"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "valohai_fuse", "run", *places, *options, "--", sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._runtime = Path(sandbox.root, "run")
        self._sandbox = sandbox

    def wait_up(self) -> tuple[int, int]:
        """Until the command runs; the pids of daemon and supervisor."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"
        (path,) = self._runtime.glob("*.json")
        found = json.loads(path.read_bytes())
        return found["pid"], found["supervisor_pid"]

    def finish(self, timeout_s: float = 30) -> tuple[int, str, str]:
        """Lets the command go on; status, stdout and stderr of `run`."""
        out, said = self.process.communicate("go\n", timeout=timeout_s)
        return self.process.returncode, out, said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        run_cli("unmount", *MountedSandbox(self._sandbox).places)


READ_AND_EXIT_7 = "data = open(path, 'rb').read()\nprint(len(data), flush=True)\nsys.exit(7)"


def test_run_keeps_the_status_when_a_worker_is_killed(sandbox: Sandbox) -> None:
    """CMD reads on, exits with its own status, and nothing stays mounted."""
    with Run(sandbox, f"open(path, 'rb').read(1)\n{READ_AND_EXIT_7}") as run:
        daemon, _ = run.wait_up()
        sandbox.store.faults.add(faults.drip(128 * 1024, 0.05), count=None)
        killer = threading.Thread(target=_kill_a_worker, args=(daemon,))
        killer.start()
        status, out, said = run.finish()
        killer.join()
        assert (status, out) == (7, f"{4 * MIB}\n"), said
        assert table.find(run.mountpoint) is None


def test_run_notices_nothing_of_a_worker_without_memory(sandbox: Sandbox) -> None:
    """CMD reads on when the worker can allocate nothing any more, and exits with its own status."""
    with Run(sandbox, f"open(path, 'rb').read(1)\n{READ_AND_EXIT_7}", "--workers=1") as run:
        daemon, _ = run.wait_up()
        sandbox.store.faults.add(faults.drip(128 * 1024, 0.05), count=None)
        starver = threading.Thread(target=_starve_a_worker, args=(daemon,))
        starver.start()
        status, out, said = run.finish()
        starver.join()
        assert (status, out) == (7, f"{4 * MIB}\n"), said
        assert table.find(run.mountpoint) is None


def _starve_a_worker(daemon: int) -> None:
    wait_until("there is a worker", lambda: bool(workers(daemon)))
    _limit_memory(workers(daemon)[0], 0)


def test_a_shutdown_of_the_host_ends_run_and_all_that_it_started(sandbox: Sandbox) -> None:
    """SIGTERM to `run`, CMD, supervisor, daemon and workers at once, while CMD reads: `run` says how CMD ended, and nothing is left
    mounted or running."""
    then = "print(len(open(path, 'rb').read(100)), flush=True)\nopen(path, 'rb').read()\nsys.stdin.read()"
    with Run(sandbox, then, "--grace-period=1") as run:
        run.wait_up()
        assert run.process.stdin is not None
        assert run.process.stdout is not None
        run.process.stdin.write("go\n")
        run.process.stdin.flush()
        assert run.process.stdout.readline() == "100\n"
        pids = everybody(run.process.pid)
        assert len(pids) >= 5
        _terminate(pids)
        assert run.process.wait(20) == 128 + signal.SIGTERM
        wait_until("all have gone", lambda: all(map(is_gone, pids)), timeout_s=10)
        assert table.find(run.mountpoint) is None


def _kill_a_worker(daemon: int) -> None:
    wait_until("there is a worker", lambda: bool(workers(daemon)))
    os.kill(workers(daemon)[0], signal.SIGKILL)


def test_run_keeps_the_status_when_the_daemon_is_killed(sandbox: Sandbox) -> None:
    """CMD gets an error, exits with its own status, `run` says that a mount died, and the dead mount is taken away."""
    then = (
        "try:\n    open(path, 'rb').read()\nexcept OSError as error:\n    print(error.errno, flush=True)\nsys.exit(7)"
    )
    with Run(sandbox, then) as run:
        daemon, _ = run.wait_up()
        os.kill(daemon, signal.SIGKILL)
        wait_until("it is dead", lambda: table.answers(run.mountpoint) is False)
        status, out, said = run.finish()
        assert status == 7, said
        assert int(out) in DEAD
        assert "killed by signal 9" in said
        assert "did not end as it should" in said
        assert table.find(run.mountpoint) is None


def test_run_keeps_the_status_when_the_supervisor_is_killed(sandbox: Sandbox) -> None:
    """CMD reads on; `run` unmounts without the supervisor."""
    with Run(sandbox, READ_AND_EXIT_7) as run:
        daemon, supervisor = run.wait_up()
        os.kill(supervisor, signal.SIGKILL)
        status, out, said = run.finish()
        assert (status, out) == (7, f"{4 * MIB}\n"), said
        assert table.find(run.mountpoint) is None
        assert is_gone(daemon)


def test_a_run_that_is_killed_leaves_no_mount(sandbox: Sandbox) -> None:
    """SIGKILL of `run`: the supervisor notices and unmounts, although CMD still runs."""
    with Run(sandbox, READ_AND_EXIT_7) as run:
        daemon, supervisor = run.wait_up()
        (command,) = (pid for pid in children(run.process.pid) if pid != supervisor)
        run.process.kill()
        wait_until("all is gone", lambda: is_gone(daemon) and is_gone(supervisor), 20)
        assert table.find(run.mountpoint) is None
        os.kill(command, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_passes_the_signal_on_and_unmounts_what_cmd_left_busy(sandbox: Sandbox, number: signal.Signals) -> None:
    """CMD ends by the signal that `run` got; what a child of CMD still has open is detached after the grace period."""
    then = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    held = open(path, 'rb'); held.read(1)\n"
        "    os.close(0); os.close(1); os.close(2)\n"
        "    time.sleep(15)\n"
        "    os._exit(0)\n"
        "signal.pause()\n"
    )
    with Run(
        sandbox, f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n{then}", "--grace-period=1"
    ) as run:
        daemon, _ = run.wait_up()
        assert run.process.stdin is not None
        run.process.stdin.write("go\n")
        run.process.stdin.flush()
        wait_until("the file is held", lambda: _holds(run.mountpoint) != [])
        (holder,) = _holds(run.mountpoint)
        run.process.send_signal(number)
        assert run.process.wait(20) == 128 + number
        assert table.find(run.mountpoint) is None
        assert is_gone(daemon)
        os.kill(holder, signal.SIGKILL)


def _holds(mountpoint: str) -> list[int]:
    """Processes that have something below `mountpoint` open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(mountpoint + "/"):
                found.add(int(link.parts[2]))
    return sorted(found)
