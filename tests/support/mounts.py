"""Real mounts for tests: a sandbox, mounted through the command line as a person would, and always taken away again.

Nothing here trusts the code under test to end well. Every command has a time-out; whatever still is mounted at the end is
first cut off (`/sys/fs/fuse/connections/N/abort` wakes readers that hang in the kernel), then detached; processes are
killed by the pids that the runtime directory and /proc name. A test whose mount had to be cleared away like that fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.leftovers import mounts_below
from valohai_fuse.sandbox.valohai import Sandbox

COMMAND_TIMEOUT_S = 30.0
POLL_S = 0.02

GIVEN_UP = (r" engine\.flights: gave up on ", r" engine\.leases: input .*: its URLs could not be renewed: ")
"""What the log may say at WARNING where reads fail or wait because a store or the API does."""

_LOUD = re.compile(r"^\S+Z (WARNING|ERROR|CRITICAL) ")


MountInputs = Callable[..., "MountedSandbox"]
"""The type of the fixture `mount_inputs`."""


def run_cli(
    *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S, cwd: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`valohai-fuse ARGUMENTS` in a process of its own; never raises for its exit code. Raises TimeoutExpired."""
    command = [sys.executable, "-m", "valohai_fuse", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=cwd, stdin=subprocess.DEVNULL
    )


def run_program(command: Sequence[str], *, cwd: str | Path, timeout_s: float = 90.0) -> str:
    """What another program prints, run in `cwd`. Raises AssertionError with its stderr when it fails; TimeoutExpired."""
    outcome = subprocess.run(
        command, cwd=cwd, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )
    said = outcome.stderr.decode(errors="replace")
    assert outcome.returncode == 0, f"{command[0]} in {cwd}: exit code {outcome.returncode}\n{said}"
    return outcome.stdout.decode(errors="surrogateescape")


def wait_until(condition: str, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits until `holds()` is true, for what the kernel or another process does and announces nowhere.

    Raises AssertionError saying `condition` after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(POLL_S)


def read_elsewhere(path: str | Path, start: int = 0, stop: int | None = None, timeout_s: float = 30.0) -> bytes:
    """Bytes [start, stop) of a file, read by another process, so that a read that hangs cannot hang the test.

    Raises OSError with the errno that the reader met; TimeoutError when it did not end in time (it is killed, but a
    process that hangs in the kernel only dies with the mount's connection).
    """
    code = (
        "import os, sys\n"
        "try:\n"
        "    with open(sys.argv[1], 'rb', buffering=0) as file:\n"
        "        file.seek(int(sys.argv[2]))\n"
        "        left = int(sys.argv[3])\n"
        "        while left and (data := file.read(1 << 20 if left < 0 else min(left, 1 << 20))):\n"
        "            sys.stdout.buffer.write(data)\n"
        "            left -= len(data)\n"
        "except OSError as error:\n"
        "    sys.exit(error.errno)\n"
    )
    length = -1 if stop is None else stop - start
    command = [sys.executable, "-I", "-S", "-c", code, str(path), str(start), str(length)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        data, _ = reader.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        reader.kill()
        raise TimeoutError(f"reading {path} did not end within {timeout_s} s") from None
    if reader.returncode:
        raise OSError(reader.returncode, os.strerror(reader.returncode), str(path))
    return data


class MountedSandbox:
    """A sandbox of which every on-demand input is mounted at its place; a context manager.

    `sandbox` is entered already and stays the caller's. `options` go to `mount` behind the location flags, INPUT names
    included. Log lines of level WARNING and above fail the exit unless they match one of `expected_warnings`.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        options: Sequence[str] = (),
        expected_warnings: Sequence[str] = (),
        cache_dir: str | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        self.sandbox = sandbox
        self.cache_dir = cache_dir or os.path.join(sandbox.root, "cache")
        self.runtime_dir = os.path.join(sandbox.root, "run")
        self.expected_warnings = list(expected_warnings)
        self._options = list(options)
        self._timeout_s = timeout_s

    # --- life -----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            outcome = self.mount()
        except BaseException:
            self._clear_away()
            raise
        if outcome.returncode != 0:
            log = self.log()
            self._clear_away()
            raise AssertionError(f"mount: exit code {outcome.returncode}\n{outcome.stderr}\n{log}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            outcome = self.unmount()
            complaint = f"unmount: exit code {outcome.returncode}\n{outcome.stderr}" if outcome.returncode else ""
        except subprocess.TimeoutExpired:
            complaint = f"unmount did not end within {self._timeout_s} s"
        left = self._clear_away()
        if kind is None:
            assert not complaint, f"{complaint}\n{self.log()}"
            assert not left, f"left behind after unmount: {', '.join(left)}\n{self.log()}"
            loud = self.unexpected_log_lines()
            assert not loud, "logged unexpectedly:\n" + "\n".join(loud)

    # --- commands -------------------------------------------------------------------------------------------------------

    @property
    def places(self) -> list[str]:
        """The three location flags and the runtime directory."""
        return [
            f"--config-dir={self.sandbox.config_dir}",
            f"--inputs-dir={self.sandbox.inputs_dir}",
            f"--cache-dir={self.cache_dir}",
            f"--runtime-dir={self.runtime_dir}",
        ]

    def cli(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`valohai-fuse VERB` with this sandbox's places. `mount` and `unmount` included."""
        return run_cli(verb, *self.places, *arguments, timeout_s=self._timeout_s)

    def mount(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Mounts with the options given at construction."""
        return self.cli("mount", *self._options, *arguments)

    def unmount(self) -> subprocess.CompletedProcess[str]:
        """Unmounts everything of this sandbox."""
        return self.cli("unmount")

    def status(self) -> Any:
        """What `status --json` says."""
        outcome = self.cli("status", "--json")
        assert outcome.returncode == 0, outcome.stderr
        return json.loads(outcome.stdout)

    # --- looking --------------------------------------------------------------------------------------------------------

    def path(self, input_name: str, name: str = "") -> Path:
        """Where a file (or the directory) of an input is on the mount."""
        return Path(self.sandbox.inputs_dir, input_name, name)

    def sent_bytes(self, pattern: str = "*") -> int:
        """Body bytes that the store sent for objects whose `input/name` matches the glob."""
        return self.sandbox.store.sent_bytes(pattern)

    def log(self) -> str:
        """All logs of this sandbox's mounts."""
        with contextlib.suppress(OSError):
            files = sorted(Path(self.runtime_dir).glob("*.log*"))
            return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        return ""

    def unexpected_log_lines(self) -> list[str]:
        """Lines of level WARNING and above that no expression announced."""
        return [
            line
            for line in self.log().splitlines()
            if _LOUD.match(line) and not any(re.search(regex, line) for regex in self.expected_warnings)
        ]

    def daemon_pids(self) -> list[int]:
        """Processes of this sandbox's mounts: supervisors and daemons."""
        found = set()
        for file in Path(self.runtime_dir).glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(file.read_bytes())
                found |= {record.get("pid"), record.get("supervisor_pid")}
        return sorted(pid for pid in found if isinstance(pid, int) and _is_ours(pid))

    # --- the end --------------------------------------------------------------------------------------------------------

    def _clear_away(self) -> list[str]:
        """Takes away by force what is still there, and names it."""
        pids = [pid for pid in self.daemon_pids() if not _ends_within(pid, 5.0)]
        left = [f"process {pid}" for pid in pids]
        for mountpoint in mounts_below((self.sandbox.root,)):
            left.append(f"mount {mountpoint}")
            abort_connection(mountpoint)
            subprocess.run(["umount", "--lazy", mountpoint], check=False, timeout=10, capture_output=True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _ends_within(pid, 5.0)
        return left


def abort_connection(mountpoint: str) -> None:
    """Cuts the FUSE connection behind a mount point: every read that waits on it fails at once. Never raises."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape") == mountpoint:
            minor = fields[2].partition(":")[2]
            with contextlib.suppress(OSError):
                Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1", encoding="ascii")


def _is_ours(pid: int) -> bool:
    try:
        return b"valohai_fuse" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _ends_within(pid: int, timeout_s: float) -> bool:
    """Waits for any process, not only a child, through a descriptor of it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(descriptor)


class OtherExecution(MountedSandbox):
    """The same inputs, mounted a second time elsewhere, as another execution on the host has them."""

    def __init__(
        self, sandbox: Sandbox, home: Path, name: str, *, cache_dir: str, expected_warnings: tuple[str, ...] = ()
    ) -> None:
        super().__init__(sandbox, cache_dir=cache_dir, expected_warnings=expected_warnings)
        self.inputs_dir = os.path.join(home, name)
        self.runtime_dir = os.path.join(home, f"{name}.run")
        os.mkdir(self.inputs_dir)

    @property
    def places(self) -> list[str]:
        """With an inputs directory of its own."""
        return [*super().places, f"--inputs-dir={self.inputs_dir}"]

    def path(self, input_name: str, name: str = "") -> Path:
        """Below that."""
        return Path(self.inputs_dir, input_name, name)
