"""`valohai-fuse mount`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import click

from valohai_fuse import settings as environment
from valohai_fuse.cli import output, starting
from valohai_fuse.cli.options import ALL_GROUPS, verb
from valohai_fuse.handshake import Report
from valohai_fuse.obs.notify import sd_notify
from valohai_fuse.obs.runtime_dir import RuntimeDir
from valohai_fuse.settings import Settings
from valohai_fuse.supervisor import Plan, Supervisor


@verb(
    "mount",
    example="valohai-fuse mount train --cache-dir /scratch/valohai",
    groups=ALL_GROUPS,
    help="Mount each on-demand input, or just the INPUTs named, at its place in the inputs directory.\n\n"
    "Goes to the background and returns 0 when every mount answers. When one fails, all are taken back.",
)
@click.argument("inputs", metavar="[INPUT]...", nargs=-1)
@click.option(
    "--all", "show_all", is_flag=True, help="Also mount inputs whose files are on the disk already (download: always)."
)
@click.option("--root", metavar="DIR", help="Mount one tree at DIR with every input as a top directory.")
@click.option("--foreground", is_flag=True, help="Stay, log to stderr, unmount upon Ctrl-C. For systemd: Type=notify.")
def mount(settings: Settings, inputs: tuple[str, ...], show_all: bool, root: str | None, foreground: bool) -> int:
    """Mounts; 0 when every mount answers."""
    with contextlib.ExitStack() as until_started:
        until_started.enter_context(RuntimeDir(settings.runtime_dir).starting())
        plan = starting.make_plan(settings, inputs, show_all=show_all, root=root, to_stderr=foreground)
        if plan is None:
            output.say(
                f"nothing to mount: no input in {settings.config_dir} has files on demand (--all mounts the others)"
            )
            return 0
        if foreground:
            return _stay(plan, until_started)
        running = starting.start(plan, with_lifeline=False)
    starting.announce(plan, running.reports)
    running.let_go()
    return 0


def _stay(plan: Plan, until_started: contextlib.ExitStack) -> int:
    address = environment.notify_socket()
    heard: list[Report] = []

    def started(reports: Sequence[Report]) -> None:
        until_started.close()
        heard.extend(reports)
        if len(reports) == len(plan.mounts) and not any(report.error for report in reports):
            starting.announce(plan, reports)
            sd_notify(address, "READY=1", f"STATUS=serving {len(reports)} mounts")

    def stopping() -> None:
        sd_notify(address, "STOPPING=1")

    code = Supervisor(plan, on_start=started, on_stop=stopping).run()
    starting.raise_first_error(heard)
    return code
