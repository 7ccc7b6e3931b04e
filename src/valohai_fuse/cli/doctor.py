"""`valohai-fuse doctor`: one line per thing that a mount needs, `ok`, `warn` or `FAIL`, with what to do about it.

Looks only, but for three probes: a directory's writability is tried with a temporary file, Valohai's API is asked for new URLs of
the smallest input (which a mount would ask for just so, and which makes no older URL invalid), and a store for one byte.
`--offline` leaves the last two out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Final

import click

from valohai_fuse.cli import fuse_access, network, output
from valohai_fuse.cli.finding import FAIL, OK, WARN, Finding
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import ConfigurationError, FuseUnavailableError, ValohaiFuseError
from valohai_fuse.mount import table
from valohai_fuse.obs.redaction import redact
from valohai_fuse.settings import Settings, parse_bytes

CACHE_FREE_BYTES_MIN: Final = 1024**3


def examine(settings: Settings, *, offline: bool) -> list[Finding]:
    """Everything, in the order in which a mount would need it; messages are cut of secrets, as all that is said is."""
    parts: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _fuse,
        _configuration,
        _inputs_dir,
        _cache_dir,
        _tuning,
        _dead_mounts,
        *([] if offline else [network.examine]),
    )
    findings = (finding for part in parts for finding in part(settings))
    return [replace(finding, message=redact(finding.message)) for finding in findings]


def _fuse(settings: Settings) -> Iterator[Finding]:
    try:
        fuse_access.check_device()
    except FuseUnavailableError as error:
        yield Finding("fuse device", FAIL, error.message, error.hint, 4)
    else:
        yield Finding("fuse device", OK, f"{fuse_access.DEVICE} can be opened")
    try:
        how = fuse_access.check_privilege()
    except FuseUnavailableError as error:
        yield Finding("privilege", FAIL, error.message, error.hint, 4)
        return
    yield Finding("privilege", OK, f"mounting is permitted through {how}")
    if how != "CAP_SYS_ADMIN" and not fuse_access.user_allow_other():
        verdict = FAIL if settings.allow_other else OK
        hint = "add user_allow_other to /etc/fuse.conf"
        yield Finding("allow_other", verdict, "other users cannot be let into a mount", hint, 4)


def _configuration(settings: Settings) -> Iterator[Finding]:
    from valohai_fuse.sources.manifest_file import list_inputs

    hint = (
        "in an execution Valohai writes it; elsewhere name the directory with --config-dir, or try `valohai-fuse demo`"
    )
    try:
        inputs = list_inputs(settings.config_dir)
    except ConfigurationError as error:
        yield Finding("inputs", FAIL, error.message, error.hint or hint, 3)
    else:
        on_demand = [summary for summary in inputs if summary.on_demand_files]
        files = output.files_shown(sum(summary.on_demand_files for summary in on_demand))
        yield Finding(
            "inputs",
            OK if on_demand else WARN,
            f"{len(on_demand)} of {len(inputs)} inputs have files on demand ({files})",
        )
    yield _api_file(settings)


def _api_file(settings: Settings) -> Finding:
    from valohai_fuse.sources import api_file

    path = os.path.join(settings.config_dir, "api.json")
    without = "signed URLs cannot be renewed: reads fail once those in inputs.json have expired"
    try:
        request = api_file.load(settings.config_dir)
    except ValohaiFuseError as error:
        return Finding("api.json", FAIL, error.message, error.hint or without, 3)
    if request is None:
        return Finding("api.json", WARN, f"{path} does not exist", without)
    return Finding("api.json", OK, f"{path} says how to renew URLs")


def _inputs_dir(settings: Settings) -> Iterator[Finding]:
    path = settings.inputs_dir
    hint = "use --root DIR to mount one tree elsewhere, or --inputs-dir DIR"
    problem = _not_writable(_nearest_existing(path))
    if problem:
        yield Finding("inputs directory", FAIL, f"mount points cannot be made in {path}: {problem}", hint, 3)
    else:
        yield Finding("inputs directory", OK, f"mount points can be made in {path}")


def _cache_dir(settings: Settings) -> Iterator[Finding]:
    path = settings.cache_dir
    where = _nearest_existing(path)
    problem = _not_writable(where)
    if problem:
        hint = "name another with --cache-dir; without a cache each remount fetches everything again"
        yield Finding("cache directory", WARN, f"{path} cannot be written: {problem}", hint)
        return
    found = os.statvfs(where)
    free = found.f_bavail * found.f_frsize
    kept = settings.cache_min_free
    total = found.f_blocks * found.f_frsize
    usable = free - (int(total * float(kept[:-1]) / 100) if kept.endswith("%") else parse_bytes(kept))
    hint = "name a larger disk with --cache-dir, or leave less of this one free with --cache-min-free"
    if found.f_files and not found.f_favail:
        yield Finding("cache directory", WARN, f"{path}: its file system has no room for another file", hint)
        return
    few = usable < CACHE_FREE_BYTES_MIN
    message = f"{path} can be written, {output.bytes_shown(free)} free, of which the cache may take "
    yield Finding("cache directory", WARN if few else OK, message + output.bytes_shown(max(0, usable)), hint)


def _tuning(_settings: Settings) -> Iterator[Finding]:
    try:
        writable = not os.statvfs("/sys").f_flag & os.ST_RDONLY and os.access("/sys/class/bdi", os.W_OK)
    except OSError:
        writable = False
    if writable:
        yield Finding("kernel tuning", OK, "/sys is writable: the kernel will ask for 1 MiB at a time")
    else:
        hint = "no harm: sequential reads cost about twice the CPU; a privileged container has it writable"
        yield Finding("kernel tuning", WARN, "/sys is read-only: the kernel asks for 128 KiB at a time", hint)


def _dead_mounts(_settings: Settings) -> Iterator[Finding]:
    for entry in table.entries():
        if entry.is_ours and table.answers(entry.mountpoint) is False:
            hint = f"valohai-fuse unmount {entry.mountpoint}"
            yield Finding("dead mount", WARN, f"{entry.mountpoint} has lost its daemon", hint)


def _nearest_existing(path: str) -> str:
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _not_writable(directory: str) -> str | None:
    """Why no file can be made there; None when one can."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


@verb(
    "doctor",
    example="valohai-fuse doctor",
    groups=("mount", "cache", "network"),
    help="Say what is missing on this machine and how to get it.\n\n"
    "Exit code: 0 fit, 1 Valohai or a store refuses or is out of reach, 3 configuration, 4 FUSE not usable.",
)
@click.option("--offline", is_flag=True, help="Ask neither Valohai's API nor a store.")
@click.option("--json", "for_programs", is_flag=True, help="For programs: a list of check, verdict, message and hint.")
def doctor(settings: Settings, offline: bool, for_programs: bool) -> int:
    """Examines; 0 when a mount would work, else the exit code that it would end with."""
    findings = examine(settings, offline=offline)
    code = max((finding.exit_code for finding in findings if finding.verdict == FAIL), default=0)
    if for_programs:
        output.data_json([{k: v for k, v in asdict(finding).items() if k != "exit_code"} for finding in findings])
        return code
    for finding in findings:
        padding = " " * (5 - len(finding.verdict))
        output.data(f"{output.styled(finding.verdict, sys.stdout)}{padding}{finding.check}: {finding.message}")
        if finding.hint and finding.verdict != OK:
            output.data(f"     hint: {finding.hint}")
    return code
