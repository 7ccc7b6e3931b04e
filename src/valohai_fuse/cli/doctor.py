"""`valohai-fuse doctor`: one line per thing that a mount needs, `ok`, `warn` or `FAIL`, with what to do about it.

Looks only, but for two probes: a directory's writability is tried with a temporary file, and API and store are not asked (a
GET would cost somebody's quota, and a renewal invalidates nothing that a mount would not renew itself).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final

import click

from valohai_fuse.cli import fuse_access, output
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import ConfigurationError, FuseUnavailableError, ValohaiFuseError
from valohai_fuse.mount import table
from valohai_fuse.obs.redaction import redact
from valohai_fuse.settings import Settings

CACHE_FREE_BYTES_MIN: Final = 1024**3
_OK, _WARN, _FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `exit_code` counts when it is a FAIL: 3 configuration, 4 FUSE."""

    check: str
    verdict: str
    message: str
    hint: str | None = None
    exit_code: int = 0


def examine(settings: Settings) -> list[Finding]:
    """Everything, in the order in which a mount would need it; messages are cut of secrets, as all that is said is."""
    parts: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _fuse,
        _configuration,
        _inputs_dir,
        _cache_dir,
        _tuning,
        _dead_mounts,
    )
    findings = (finding for part in parts for finding in part(settings))
    return [replace(finding, message=redact(finding.message)) for finding in findings]


def _fuse(settings: Settings) -> Iterator[Finding]:
    try:
        fuse_access.check_device()
    except FuseUnavailableError as error:
        yield Finding("fuse device", _FAIL, error.message, error.hint, 4)
    else:
        yield Finding("fuse device", _OK, f"{fuse_access.DEVICE} can be opened")
    try:
        how = fuse_access.check_privilege()
    except FuseUnavailableError as error:
        yield Finding("privilege", _FAIL, error.message, error.hint, 4)
        return
    yield Finding("privilege", _OK, f"mounting is permitted through {how}")
    if how != "CAP_SYS_ADMIN" and not fuse_access.user_allow_other():
        verdict = _FAIL if settings.allow_other else _OK
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
        yield Finding("inputs", _FAIL, error.message, error.hint or hint, 3)
    else:
        on_demand = [summary for summary in inputs if summary.on_demand_files]
        files = output.files_shown(sum(summary.on_demand_files for summary in on_demand))
        yield Finding(
            "inputs",
            _OK if on_demand else _WARN,
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
        return Finding("api.json", _FAIL, error.message, error.hint or without, 3)
    if request is None:
        return Finding("api.json", _WARN, f"{path} does not exist", without)
    return Finding("api.json", _OK, f"{path} says how to renew URLs")


def _inputs_dir(settings: Settings) -> Iterator[Finding]:
    path = settings.inputs_dir
    hint = "use --root DIR to mount one tree elsewhere, or --inputs-dir DIR"
    problem = _not_writable(_nearest_existing(path))
    if problem:
        yield Finding("inputs directory", _FAIL, f"mount points cannot be made in {path}: {problem}", hint, 3)
    else:
        yield Finding("inputs directory", _OK, f"mount points can be made in {path}")


def _cache_dir(settings: Settings) -> Iterator[Finding]:
    path = settings.cache_dir
    where = _nearest_existing(path)
    problem = _not_writable(where)
    if problem:
        hint = "name another with --cache-dir; without a cache each remount fetches everything again"
        yield Finding("cache directory", _WARN, f"{path} cannot be written: {problem}", hint)
        return
    free = shutil.disk_usage(where).free
    few = free < CACHE_FREE_BYTES_MIN
    message = f"{path} can be written, {output.bytes_shown(free)} free"
    yield Finding(
        "cache directory", _WARN if few else _OK, message, "name a larger disk with --cache-dir" if few else None
    )


def _tuning(_settings: Settings) -> Iterator[Finding]:
    try:
        writable = not os.statvfs("/sys").f_flag & os.ST_RDONLY and os.access("/sys/class/bdi", os.W_OK)
    except OSError:
        writable = False
    if writable:
        yield Finding("kernel tuning", _OK, "/sys is writable: the kernel will ask for 1 MiB at a time")
    else:
        hint = "no harm: sequential reads cost about twice the CPU; a privileged container has it writable"
        yield Finding("kernel tuning", _WARN, "/sys is read-only: the kernel asks for 128 KiB at a time", hint)


def _dead_mounts(_settings: Settings) -> Iterator[Finding]:
    for entry in table.entries():
        if entry.is_ours and table.answers(entry.mountpoint) is False:
            hint = f"valohai-fuse unmount {entry.mountpoint}"
            yield Finding("dead mount", _WARN, f"{entry.mountpoint} has lost its daemon", hint)


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
    groups=("mount",),
    help="Say what is missing on this machine and how to get it.\n\nExit code: 0 fit, 3 configuration, 4 FUSE not usable.",
)
@click.option("--json", "for_programs", is_flag=True, help="For programs: a list of check, verdict, message and hint.")
def doctor(settings: Settings, for_programs: bool) -> int:
    """Examines; 0 when a mount would work, else the exit code that it would end with."""
    findings = examine(settings)
    code = max((finding.exit_code for finding in findings if finding.verdict == _FAIL), default=0)
    if for_programs:
        output.data_json([{k: v for k, v in asdict(finding).items() if k != "exit_code"} for finding in findings])
        return code
    for finding in findings:
        padding = " " * (5 - len(finding.verdict))
        output.data(f"{output.styled(finding.verdict, sys.stdout)}{padding}{finding.check}: {finding.message}")
        if finding.hint and finding.verdict != _OK:
            output.data(f"     hint: {finding.hint}")
    return code
