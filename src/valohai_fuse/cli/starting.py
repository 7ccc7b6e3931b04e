"""From inputs to running mounts: choose, make the mount points, start a supervisor, hear how it went. Shared by `mount`, `run`
and `demo`.

All or nothing: whatever fails on the way, the directories that were made here are removed again and nothing is left running.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Final

import msgspec

from valohai_fuse.cli import fuse_access, output
from valohai_fuse.errors import MountFailedError, UsageError
from valohai_fuse.handshake import MountSpec, Report
from valohai_fuse.mount import table
from valohai_fuse.obs.runtime_dir import RuntimeDir, mount_id
from valohai_fuse.settings import Settings, as_dict
from valohai_fuse.sources.manifest_file import InputSummary, list_inputs
from valohai_fuse.supervisor import (
    REPORT_SLACK_S,
    STOP_SLACK_S,
    Plan,
    PlannedMount,
    child_command,
    child_environment,
    in_memory,
)

SUPERVISOR_SLACK_S: Final = 5.0
STARTED_WORKERS_MAX: Final = 4
"""Up to so many mounts at once each start their first worker before anything is read: 70 ms of a core each, which the first
read would wait for. Of many inputs most may never be read, or not soon."""


def choose(summaries: Sequence[InputSummary], names: Sequence[str], *, show_all: bool) -> list[InputSummary]:
    """The named inputs; without names those that have something on demand, the empty ones, and with `show_all` the others.

    Raises UsageError that lists what exists.
    """
    known = {summary.name: summary for summary in summaries}
    unknown = [name for name in names if name not in known]
    if unknown:
        exist = ", ".join(sorted(known)) or "none"
        raise UsageError(f"no input named {', '.join(map(repr, unknown))}", hint=f"inputs that exist: {exist}")
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [s for s in summaries if show_all or s.on_demand_files > 0 or s.files == 0]


def _is_safe_component(name: str) -> bool:
    return bool(name) and name not in {".", ".."} and "/" not in name and "\0" not in name


def make_plan(
    settings: Settings,
    names: Sequence[str],
    *,
    show_all: bool,
    root: str | None,
    to_stderr: bool = False,
    echo_level: str = "",
) -> Plan | None:
    """What to bring up, with the mount points made and dead mounts of ours at them removed; None when there is nothing.

    Raises UsageError, ConfigurationError, FuseUnavailableError, MountFailedError.
    """
    chosen = choose(list_inputs(settings.config_dir), names, show_all=show_all)
    if not chosen:
        return None
    fuse_access.check(allow_other=settings.allow_other)
    runtime = RuntimeDir(settings.runtime_dir)
    runtime.ensure()
    wanted: list[tuple[str, tuple[str, ...]]] = []
    if root is not None:
        wanted.append((table.resolve(root), tuple(s.name for s in chosen)))
    for summary in chosen if root is None else []:
        if not _is_safe_component(summary.name):
            output.warning(f"input {summary.name!r} is left out: its name cannot be a directory")
            continue
        wanted.append((table.resolve(os.path.join(settings.inputs_dir, summary.name)), (summary.name,)))
    made: list[str] = []
    try:
        for mountpoint, _ in wanted:
            prepare(runtime, mountpoint, made)
    except BaseException:
        remove_directories(made)
        raise
    own = as_dict(settings)
    return Plan(
        runtime_dir=runtime.path,
        mount_timeout_s=settings.mount_timeout,
        grace_period_s=settings.grace_period,
        mounts=tuple(
            PlannedMount(
                spec=MountSpec(
                    settings=own | {"log_file": settings.log_file or runtime.file(mount_id(mountpoint), "log")},
                    mountpoint=mountpoint,
                    inputs=inputs,
                    as_root=root is not None,
                    starts_worker=len(wanted) <= STARTED_WORKERS_MAX,
                    control_path=runtime.file(mount_id(mountpoint), "sock"),
                    log_to_stderr=to_stderr and settings.log_file is None,
                    echo_level=echo_level,
                ),
                made_directories=tuple(d for d in made if mountpoint == d or mountpoint.startswith(d + "/")),
            )
            for mountpoint, inputs in wanted
        ),
    )


def prepare(runtime: RuntimeDir, mountpoint: str, made: list[str]) -> None:
    """Makes `mountpoint` a directory that can be mounted on, adding what it made to `made`. Raises MountFailedError."""
    entry = table.find(mountpoint)
    if entry is not None:
        _mend(runtime, entry)
    try:
        missing = []
        path = mountpoint
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for directory in reversed(missing):
            os.mkdir(directory, 0o755)
            made.append(directory)
        if not os.path.isdir(mountpoint) or os.path.islink(mountpoint):
            raise MountFailedError(f"cannot mount on {mountpoint}: it is not a directory")
    except OSError as error:
        raise MountFailedError(
            f"cannot make the mount point {mountpoint}: {error.strerror}",
            hint="mount somewhere else: --root DIR shows all inputs in one tree there, --inputs-dir DIR moves them all",
        ) from None


def _mend(runtime: RuntimeDir, entry: table.MountEntry) -> None:
    """Removes a dead mount of ours. Raises MountFailedError when something living is mounted there."""
    mountpoint = entry.mountpoint
    if not entry.is_ours:
        what = f"{entry.file_system_type} ({entry.source})"
        raise MountFailedError(
            f"{mountpoint} is a mount point already, of {what}", hint="mount elsewhere with --root DIR"
        )
    if table.answers(mountpoint) is not False:
        record = next((r for r in runtime.records() if r.mountpoint == mountpoint), None)
        who = f" (pid {record.pid})" if record else ""
        raise MountFailedError(
            f"{mountpoint} is mounted already by valohai-fuse{who}", hint=f"valohai-fuse unmount {mountpoint}"
        )
    try:
        table.unmount_lazily(mountpoint)
    except OSError as error:
        raise MountFailedError(f"cannot remove the dead mount at {mountpoint}: {error.strerror}") from None
    for record in runtime.records():
        if record.mountpoint == mountpoint:
            runtime.forget(record)
    output.say(f"removed the dead mount at {mountpoint}")


def remove_directories(made: Sequence[str]) -> None:
    """Removes directories that were made here, where they are still empty."""
    for directory in reversed(made):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def remove_directories_of(plan: Plan) -> None:
    """The same for a plan that did not come up."""
    for planned in plan.mounts:
        remove_directories(planned.made_directories)


@dataclass
class Running:
    """A supervisor in the background, and what it reported."""

    process: subprocess.Popen[bytes]
    reports: list[Report]
    lifeline: int

    def let_go(self) -> None:
        """Leaves it to itself: it is to outlive us."""
        self.process.returncode = 0  # else Popen complains, rightly for once, that nobody waits for it

    def hasten(self) -> None:
        """Asks it to stop; asked again, it waits for nobody."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def stop(self) -> None:
        """Lets go of the lifeline: it unmounts everything and ends."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1


def start(plan: Plan, *, with_lifeline: bool, to_stderr: bool = False) -> Running:
    """Starts a supervisor on `plan` and waits until every mount answers.

    Raises the error of the first mount that failed; everything has been taken back by then.
    """
    plan_fd = in_memory(msgspec.json.encode(plan))
    report_r, report_w = os.pipe2(os.O_CLOEXEC)
    life_r, life_w = os.pipe2(os.O_CLOEXEC) if with_lifeline else (-1, -1)
    inherited = [plan_fd, report_w, *([life_r] if with_lifeline else [])]
    try:
        process = subprocess.Popen(
            child_command("valohai_fuse.supervisor", plan_fd, report_w, life_r),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if to_stderr else subprocess.DEVNULL,
            pass_fds=inherited,
            start_new_session=True,
            env=child_environment(),
            cwd="/",
        )
    finally:
        for descriptor in inherited:
            os.close(descriptor)
    running = Running(process, [], life_w)
    limit_s = plan.mount_timeout_s + REPORT_SLACK_S + plan.grace_period_s + STOP_SLACK_S + SUPERVISOR_SLACK_S
    try:
        with _terminated_like_ctrl_c():
            running.reports = _hear(report_r, limit_s)
    except BaseException:
        running.hasten()
        running.stop()
        process.wait()
        remove_directories_of(plan)
        raise
    finally:
        os.close(report_r)
    try:
        raise_first_error(running.reports)
    except BaseException:
        running.stop()
        process.wait()
        raise
    return running


def raise_first_error(reports: Sequence[Report]) -> None:
    """Raises what the first failed report says; prefers one that is more than "the others were taken back"."""
    for report in reports:
        report.raise_for_error()


def _hear(report_fd: int, limit_s: float) -> list[Report]:
    deadline_s = time.monotonic() + limit_s
    received = bytearray()
    while True:
        readable, _, _ = select.select([report_fd], [], [], max(0.0, deadline_s - time.monotonic()))
        if not readable:
            raise MountFailedError("the supervisor does not answer")
        chunk = os.read(report_fd, 65536)
        if not chunk:
            break
        received += chunk
    try:
        return msgspec.json.decode(received, type=list[Report])
    except msgspec.MsgspecError:
        raise MountFailedError("the supervisor ended before the mounts answered") from None


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt inside, so that what was begun is taken back."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def announce(plan: Plan, reports: Sequence[Report]) -> None:
    """One line per mount, and the warnings."""
    for planned, report in zip(plan.mounts, reports, strict=True):
        spec = planned.spec
        what = spec.inputs[0] if not spec.as_root else f"{len(spec.inputs)} inputs"
        output.say(
            f"mounted {what} at {spec.mountpoint} ({output.files_shown(report.files)}, {output.bytes_shown(report.bytes)})"
        )
    output.warnings(f"{p.spec.mountpoint}: {w}" for p, r in zip(plan.mounts, reports, strict=True) for w in r.warnings)
