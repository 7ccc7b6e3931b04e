"""`valohai-fuse download`: every file of the inputs named as an ordinary file, for machines without FUSE."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from valohai_fuse.cli import output, progress, starting
from valohai_fuse.cli.options import verb, was_given
from valohai_fuse.errors import UsageError
from valohai_fuse.mount import table
from valohai_fuse.settings import Settings


@verb(
    "download",
    example="valohai-fuse download train --to /scratch/inputs",
    groups=("network", "log"),
    help="Download every file of each INPUT, to its place in the inputs directory or to DIR/<input>/<name>. Needs no FUSE.\n\n"
    "Goes on where a former download was interrupted; complete files are not fetched again. Sizes are verified, and checksums "
    "where Valohai knows them. Exit code: 0 all there, 1 a file failed, 130 interrupted.",
)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--to", "target", metavar="DIR", help="Where to put the inputs; default: the inputs directory.")
@click.option("--json", "for_programs", is_flag=True, help="For programs: a summary at the end.")
def download(settings: Settings, inputs: tuple[str, ...], target: str | None, for_programs: bool) -> int:
    """Downloads; the exit code as the help says."""
    from valohai_fuse.sources.manifest_file import list_inputs

    chosen = starting.choose(list_inputs(settings.config_dir), inputs, show_all=True)
    return fetch(settings, [summary.name for summary in chosen], target, for_programs=for_programs)


def fetch(settings: Settings, inputs: Sequence[str], target: str | None, *, for_programs: bool = False) -> int:
    """The same for inputs that exist; also what `run --fallback download` does."""
    from valohai_fuse import downloading
    from valohai_fuse.engine.prefetch import Progress
    from valohai_fuse.obs import logs

    for place in (table.resolve(os.path.join(target or settings.inputs_dir, name)) for name in inputs):
        entry = table.find(place)
        if entry is not None and entry.is_ours:
            raise UsageError(
                f"{place} is mounted", hint=f"valohai-fuse unmount {place}, or another directory with --to"
            )
    level = settings.log_level if was_given("log_level") or settings.log_file is not None else "WARNING"
    logs.configure(level, log_file=settings.log_file, subject="download")
    where = os.path.abspath(target if target is not None else settings.inputs_dir)
    with progress.Shown("download") as shown:

        def show(now: Progress) -> None:
            shown.update(_totals(now))

        outcome = downloading.download(settings, inputs, where, show=show)
        shown.update(_totals(outcome.progress))
    output.warnings(outcome.warnings)
    failures = [(os.path.join(where, path), why) for path, why in outcome.progress.failures]
    return progress.conclude(
        "download",
        _totals(outcome.progress),
        failures,
        elapsed_s=shown.elapsed_s,
        interrupted=outcome.interrupted,
        for_programs=for_programs,
    )


def _totals(now: object) -> progress.Totals:
    return progress.Totals(*(getattr(now, name) for name in progress.Totals.__slots__))
