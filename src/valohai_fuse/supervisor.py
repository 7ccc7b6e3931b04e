"""One light process over the daemons of one `mount`: starts them, reports how it went, reaps them, tidies up.

It loads no trio, httpx or pyfuse3. The daemons do not depend on it: when it is killed they go on, and `unmount` does without it.
All or nothing at the start: when one daemon fails, everything that this command mounted is unmounted. After that each
mount is on its own: a daemon that crashes leaves its dead mount (ENOTCONN) and its record for `status` to tell.

`python -m valohai_fuse.supervisor PLAN_FD REPORT_FD LIFELINE_FD`: PLAN_FD holds a `Plan` as JSON; one line of JSON, the reports in
the order of the plan, goes to REPORT_FD; when LIFELINE_FD (-1: none) reaches its end, whoever started us is gone, and everything is
unmounted as upon SIGTERM.

Single-threaded; state changes only in `Supervisor._turn`, which handles whatever the selector says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import IO, Final

import msgspec

from valohai_fuse import settings as environment
from valohai_fuse.errors import MountFailedError
from valohai_fuse.handshake import MountSpec, Report, failed
from valohai_fuse.mount import table
from valohai_fuse.obs.logs import LineFormatter
from valohai_fuse.obs.redaction import redact
from valohai_fuse.obs.runtime_dir import MountRecord, RuntimeDir, mount_id, process_start

STOP_SLACK_S: Final = 10.0
"""A daemon that is not gone this long after its grace period is killed."""
REPORT_SLACK_S: Final = 2.0
"""A daemon times its own mount; we wait a little longer so that its own, better message arrives."""

Start = Callable[[Sequence[Report]], None]


class PlannedMount(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon to start."""

    spec: MountSpec
    made_directories: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one `mount` is to bring up."""

    runtime_dir: str
    mount_timeout_s: float
    grace_period_s: float
    mounts: tuple[PlannedMount, ...]


def child_command(module: str, *arguments: object) -> list[str]:
    """Python running a module of this package, whatever the current directory holds."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def child_environment() -> dict[str, str]:
    """For supervisor and daemons."""
    return environment.child_environment() | environment.search_path_for_children()


def in_memory(content: bytes) -> int:
    """A descriptor that reads `content` and then ends: a pipe's interface without its 64 KiB limit."""
    descriptor = os.memfd_create("valohai-fuse")
    with open(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class _Daemon:
    """One started daemon."""

    def __init__(
        self, planned: PlannedMount, process: subprocess.Popen[bytes], report_fd: int, record: MountRecord
    ) -> None:
        self.planned = planned
        self.process = process
        self.report_fd: int | None = report_fd
        self.received = bytearray()
        self.record = record
        self.report: Report | None = None
        # Set by `_ended` alone. `process.returncode` may be there earlier: `Popen.terminate` reaps a process that is dead already.
        self.is_gone = False

    @property
    def mountpoint(self) -> str:
        return self.planned.spec.mountpoint


class Supervisor:
    """Runs a plan to its end. `on_start` gets the reports once; `on_stop` is called when stopping begins."""

    def __init__(
        self,
        plan: Plan,
        *,
        on_start: Start,
        on_stop: Callable[[], None] = lambda: None,
        lifeline: int = -1,
        daemon_command: Sequence[str] | None = None,
    ) -> None:
        self._plan = plan
        self._daemon_command = list(daemon_command or child_command("valohai_fuse.daemon"))
        self._on_start = on_start
        self._on_stop = on_stop
        self._runtime = RuntimeDir(plan.runtime_dir)
        self._daemons: list[_Daemon] = []
        self._selector = selectors.DefaultSelector()
        self._lifeline = lifeline
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stops_wanted = 0
        self._stops_begun = 0
        self._kill_at_s = float("inf")

    def run(self) -> int:
        """Starts, reports, waits until all daemons are gone. 0 when each mount ended as it was asked to, else 1."""
        self._listen()
        try:
            started = self._start_all()
            self._on_start(
                [daemon.report or Report(error="MountFailedError", message="not started") for daemon in self._daemons]
            )
            if not started:
                return 1
            while not all(daemon.is_gone for daemon in self._daemons):
                self._turn()
            return int(any(daemon.process.returncode for daemon in self._daemons))
        finally:
            self._selector.close()

    # --- signals ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        def want_stop(_number: int, _frame: FrameType | None) -> None:
            self._stops_wanted += 1

        def only_wake(_number: int, _frame: FrameType | None) -> None:
            pass

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, want_stop)
        signal.signal(signal.SIGCHLD, only_wake)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._drain)
        if self._lifeline >= 0:
            self._selector.register(self._lifeline, selectors.EVENT_READ, self._lifeline_ended)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)

    def _lifeline_ended(self) -> None:
        self._selector.unregister(self._lifeline)
        self._stops_wanted += 1

    # --- the start ----------------------------------------------------------------------------------------------------

    def _start_all(self) -> bool:
        """True when every mount answers; else everything is unmounted again and each report says how it went."""
        for planned in self._plan.mounts:
            if self._stops_wanted:
                break
            self._daemons.append(self._start(planned))
        deadline_s = time.monotonic() + self._plan.mount_timeout_s + REPORT_SLACK_S
        while any(d.report is None for d in self._daemons) and not any(
            d.report and d.report.error for d in self._daemons
        ):
            if time.monotonic() >= deadline_s:
                for daemon in self._daemons:
                    daemon.report = daemon.report or self._overdue(daemon)
                break
            if self._stops_wanted:
                break
            self._turn(deadline_s)
        complete = len(self._daemons) == len(self._plan.mounts)
        if complete and not self._stops_wanted and all(d.report and not d.report.error for d in self._daemons):
            return True
        if not any(d.report and d.report.error for d in self._daemons) and self._daemons:
            self._daemons[0].report = Report(error="MountFailedError", message="interrupted")
        for daemon in self._daemons:
            # Taken back for another's failure: no error of its own, for the error told first must be the cause.
            daemon.report = daemon.report or Report(message="taken back")
        self._give_up()
        return False

    def _overdue(self, daemon: _Daemon) -> Report:
        return failed(
            MountFailedError(
                f"{daemon.mountpoint}: no answer within {self._plan.mount_timeout_s:g} s",
                hint=f"see {daemon.record.log_path}; --mount-timeout sets the limit",
            )
        )

    def _start(self, planned: PlannedMount) -> _Daemon:
        spec = planned.spec
        spec_fd = in_memory(msgspec.json.encode(spec))
        report_r, report_w = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(report_r, False)
        log_path = str(spec.settings["log_file"])
        with contextlib.ExitStack() as ours:
            ours.callback(os.close, spec_fd)
            ours.callback(os.close, report_w)
            stderr: int | IO[bytes] = 2
            if not spec.log_to_stderr and not spec.echo_level:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
                    stderr = ours.enter_context(open(os.open(log_path, flags, 0o600), "wb"))
                except OSError:
                    stderr = subprocess.DEVNULL  # the daemon says in its log that it cannot write one, nobody hears it
            process = subprocess.Popen(
                [*self._daemon_command, str(spec_fd), str(report_w)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(spec_fd, report_w),
                start_new_session=True,  # a Ctrl-C is for us and for the user's command, not for those that serve its files
                env=child_environment(),
                cwd="/",
            )
        record = MountRecord(
            id=mount_id(spec.mountpoint),
            mountpoint=spec.mountpoint,
            inputs=spec.inputs,
            as_root=spec.as_root,
            pid=process.pid,
            process_start=process_start(process.pid) or 0,
            supervisor_pid=os.getpid(),
            started_at_s=time.time(),
            control_path=spec.control_path,
            log_path="" if spec.log_to_stderr else log_path,
            config_dir=str(spec.settings["config_dir"]),
            inputs_dir=str(spec.settings["inputs_dir"]),
            grace_period=self._plan.grace_period_s,
            made_directories=planned.made_directories,
        )
        with self._runtime.lock():
            self._runtime.write(record)
        daemon = _Daemon(planned, process, report_r, record)
        self._selector.register(report_r, selectors.EVENT_READ, lambda: self._read_report(daemon))
        return daemon

    def _read_report(self, daemon: _Daemon) -> None:
        """Takes what the pipe holds now; the report is complete with its line, or when the daemon is gone."""
        fd = daemon.report_fd
        if fd is None:
            return
        try:
            while chunk := os.read(fd, 65536):
                daemon.received += chunk
        except BlockingIOError:
            if not daemon.received.endswith(b"\n") and not daemon.is_gone:
                return
        self._selector.unregister(fd)
        os.close(fd)
        daemon.report_fd = None
        try:
            report = msgspec.json.decode(daemon.received, type=Report)
        except msgspec.MsgspecError:
            said = _last_words(daemon.record.log_path)
            message = f"{daemon.mountpoint}: the daemon ended before its mount answered" + (
                f" ({said})" if said else ""
            )
            report = failed(MountFailedError(message, hint=self._log_hint(daemon)))
        daemon.report = daemon.report or report

    def _log_hint(self, daemon: _Daemon) -> str | None:
        return f"see {daemon.record.log_path}" if daemon.record.log_path else None

    def _give_up(self) -> None:
        """Ends every daemon of this start, those that answer included."""
        self._stops_wanted += 1
        while not all(daemon.is_gone for daemon in self._daemons):
            self._turn()
        for daemon in self._daemons:
            if table.find(daemon.mountpoint) is not None and table.answers(daemon.mountpoint) is False:
                with contextlib.suppress(OSError):
                    table.unmount_lazily(daemon.mountpoint)
            self._runtime.forget(daemon.record)

    # --- while it runs ------------------------------------------------------------------------------------------------

    def _turn(self, until_s: float = float("inf")) -> None:
        """Sleeps until something happens (or until `until_s`), then handles it."""
        if self._stops_wanted > self._stops_begun:
            self._begin_stop()
        wait_s = min(until_s, self._kill_at_s) - time.monotonic()
        for key, _events in self._selector.select(None if wait_s == float("inf") else max(0.0, wait_s)):
            key.data()
        for daemon in self._daemons:
            if not daemon.is_gone and daemon.process.poll() is not None:
                self._ended(daemon)
        if time.monotonic() >= self._kill_at_s:
            self._kill_at_s = float("inf")
            self._kill_all()

    def _begin_stop(self) -> None:
        """SIGTERM for the first request to stop; whoever asks again gets it at once."""
        again = self._stops_begun > 0
        self._stops_begun = self._stops_wanted
        if again:
            self._kill_at_s = time.monotonic()
            return
        self._on_stop()
        self._kill_at_s = time.monotonic() + self._plan.grace_period_s + STOP_SLACK_S
        for daemon in self._daemons:
            if not daemon.is_gone:
                daemon.process.terminate()

    def _kill_all(self) -> None:
        for daemon in self._daemons:
            if not daemon.is_gone:
                self._note(daemon, logging.ERROR, "the daemon did not end in time; killed")
                daemon.process.kill()
                daemon.process.wait()
                self._ended(daemon)

    def _ended(self, daemon: _Daemon) -> None:
        daemon.is_gone = True
        if daemon.report_fd is not None:
            self._read_report(daemon)
        status = daemon.process.returncode
        entry = table.find(daemon.mountpoint)
        still_mounted = entry is not None and entry.is_ours and table.answers(daemon.mountpoint) is False
        if still_mounted and self._stops_begun:
            with contextlib.suppress(OSError):
                table.unmount_lazily(daemon.mountpoint)
                still_mounted = False
        if status != 0 and daemon.report is not None and not daemon.report.error:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            tail = (
                "; its mount is dead until `valohai-fuse mount` mends it or `unmount` removes it"
                if still_mounted
                else ""
            )
            self._note(daemon, logging.ERROR, f"the daemon (pid {daemon.process.pid}) ended unexpectedly: {how}{tail}")
        if not still_mounted:
            self._runtime.forget(daemon.record)

    def _note(self, daemon: _Daemon, level: int, message: str) -> None:
        """One line in the log of a mount, in the log's own format."""
        line = LineFormatter(",".join(daemon.record.inputs)).format(
            logging.LogRecord("valohai_fuse.supervisor", level, __file__, 0, message, (), None)
        )
        with contextlib.suppress(OSError):
            spec = daemon.planned.spec
            if spec.log_to_stderr or spec.echo_level:
                os.write(2, line.encode() + b"\n")
            if spec.log_to_stderr:
                return
            with open(daemon.record.log_path, "a", encoding="utf-8") as log:
                log.write(line + "\n")


def _last_words(log_path: str) -> str:
    """The last line of a log, which is the exception where a traceback ends it; empty when there is none."""
    try:
        with open(log_path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
            lines = log.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return redact(lines[-1])[:300] if lines else ""


def main(argv: Sequence[str]) -> int:
    """The process in the background; arguments as in the module's docstring."""
    plan_fd, report_fd, lifeline_fd = map(int, argv)
    os.chdir("/")
    with open(plan_fd, "rb") as file:
        plan = msgspec.json.decode(file.read(), type=Plan)

    def tell(reports: Sequence[Report]) -> None:
        with contextlib.suppress(OSError), open(report_fd, "wb") as pipe:  # nobody reads any more: go on all the same
            pipe.write(msgspec.json.encode(reports))

    return Supervisor(plan, on_start=tell, lifeline=lifeline_fd).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
