"""`valohai-fuse run -- CMD`: mount, run, unmount whatever happens, and leave with the command's own status.

The command stays in our process group with our terminal, as if the shell had started it. Signals are waited for, not
handled: what the terminal sends (Ctrl-C) has reached the command already, since it goes to the whole group; what somebody
sent to us alone is passed on. That needs a process without further threads, which would be given the signals instead: so a
download that stands in for a mount happens in a process of its own. The supervisor holds the read end of a pipe whose write
end is ours: if we are killed, it unmounts.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Final

import click

from valohai_fuse import settings as environment
from valohai_fuse.cli import downloading, output, starting, unmounting
from valohai_fuse.cli.options import ALL_GROUPS, verb, was_given
from valohai_fuse.errors import FuseUnavailableError
from valohai_fuse.obs.runtime_dir import RuntimeDir
from valohai_fuse.settings import Settings
from valohai_fuse.supervisor import Plan

EXIT_NOT_EXECUTABLE: Final = 126
EXIT_NOT_FOUND: Final = 127
_SI_KERNEL: Final = 0x80
"""si_code of a signal that a terminal sent (signal.h)."""
_IMPATIENT: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_PASSED_ON: Final = frozenset(
    {
        *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCONT),
    }
)


@verb(
    "run",
    example="valohai-fuse run -- python train.py --epochs 3",
    groups=ALL_GROUPS,
    help="Mount the on-demand inputs, run CMD, unmount, and exit with CMD's status.\n\n"
    "128+N when signal N ended CMD, 127 when there is no such command, 126 when it cannot be run.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("--input", "inputs", metavar="INPUT", multiple=True, help="Mount just this input. May be repeated.")
@click.option(
    "--all", "show_all", is_flag=True, help="Also mount inputs whose files are on the disk already (download: always)."
)
@click.option("--root", metavar="DIR", help="Mount one tree at DIR with every input as a top directory.")
@click.option(
    "--fallback",
    type=click.Choice(["download"]),
    help="Where FUSE cannot be used: download everything first, then run CMD.",
)
@click.argument("command", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    settings: Settings,
    inputs: tuple[str, ...],
    show_all: bool,
    root: str | None,
    fallback: str | None,
    command: tuple[str, ...],
) -> int:
    """Runs `command` over the mounts; its exit status."""
    plan, running = None, None
    try:
        with RuntimeDir(settings.runtime_dir).starting():
            plan = starting.make_plan(settings, inputs, show_all=show_all, root=root, echo_level=_echo_level(settings))
            if plan is None:
                output.say(f"nothing to mount: no input in {settings.config_dir} has files on demand")
            else:
                running = starting.start(plan, with_lifeline=True, to_stderr=True)
                starting.announce(plan, running.reports)
    except FuseUnavailableError as error:
        if fallback is None:
            raise
        with _signals_waited_for() as before:
            downloading_pid = os.fork()
            if downloading_pid:
                code = _follow(downloading_pid)
            else:  # our single thread: nothing of ours is halfway through anything
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return _download(settings, inputs, error, show_all=show_all, target=root)
        if code:
            return code
    locations = {"VH_CONFIG_DIR": settings.config_dir, "VH_INPUTS_DIR": settings.inputs_dir}
    with _signals_waited_for() as before:
        try:
            return _run_to_end(command, locations, before)
        finally:
            if running is not None and plan is not None:
                _unmount(running, plan)


@contextlib.contextmanager
def _signals_waited_for() -> Iterator[set[signal.Signals | int]]:
    """Holds back what `_follow` waits for; gives the mask as it was."""
    before: set[signal.Signals | int] = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _download(
    settings: Settings, names: tuple[str, ...], why: FuseUnavailableError, *, show_all: bool, target: str | None
) -> int:
    """Fetches what would have been mounted to where it would have been seen; 0 when all of it is there."""
    from valohai_fuse.sources.manifest_file import list_inputs

    chosen = starting.choose(list_inputs(settings.config_dir), names, show_all=show_all)
    output.warning(f"{why.message}; downloading instead")
    code = downloading.fetch(settings, [summary.name for summary in chosen], target)
    if code:
        output.error("not everything is there: the command was not run")
    return code


def _echo_level(settings: Settings) -> str:
    """What of the log stands between the command's own lines on stderr: warnings, or what was asked for."""
    return settings.log_level if was_given("log_level") and settings.log_file is None else "WARNING"


def _run_to_end(command: tuple[str, ...], locations: dict[str, str], mask: set[signal.Signals | int]) -> int:
    given = environment.command_environment()
    assumed = {o.env: given.get(o.env) or o.default for o in environment.OPTIONS}
    changed = {name: value for name, value in locations.items() if value != assumed[name]}  # a flag said so
    try:
        child = os.posix_spawnp(
            command[0],
            command,
            given | changed,
            setsigmask=mask,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores these; the command must not inherit that
        )
    except FileNotFoundError:
        output.error(f"no such command: {command[0]}")
        return EXIT_NOT_FOUND
    except OSError as error:
        output.error(f"cannot run {command[0]}: {error.strerror}")
        return EXIT_NOT_EXECUTABLE
    return _follow(child)


def _follow(child: int) -> int:
    """Passes signals on to a child until it ends; its exit status, 128+N for signal N. `_signals_waited_for` holds."""
    while True:
        info = signal.sigwaitinfo(_PASSED_ON | {signal.SIGCHLD})
        if info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif info.si_code != _SI_KERNEL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, info.si_signo)


def _unmount(running: starting.Running, plan: Plan) -> None:
    """Waits for the supervisor to unmount; who asks us to end meanwhile makes it hurry. Without it, we unmount ourselves."""
    running.stop()
    while running.process.poll() is None:
        info = signal.sigtimedwait({signal.SIGCHLD, *_IMPATIENT}, 0.5)
        # Named one by one: after a stop and SIGCONT, CPython 3.11 may return a siginfo of nothing instead of None.
        if info is not None and info.si_signo in _IMPATIENT:
            running.hasten()
    runtime = RuntimeDir(plan.runtime_dir)
    places = {planned.spec.mountpoint for planned in plan.mounts}
    for record in runtime.records():
        if record.mountpoint in places:
            unmounting.take_down(runtime, unmounting.Target(record.mountpoint, record))
    if running.process.returncode != 0:
        output.warning("a mount or its supervisor did not end as it should")
