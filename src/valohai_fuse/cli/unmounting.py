"""`valohai-fuse unmount`: asks the daemon, and does without it where there is none.

A living daemon unmounts itself: it knows what is being read and waits for that. A dead mount (ENOTCONN) is detached by us. In
both cases we come back only when the kernel's table no longer shows the mount and the daemon's process is gone. A mount of
which the runtime directory knows nothing may be alive, for another runtime directory to know: its readers have the grace
period as well, and its daemon ends when it sees that the mount is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import click

from valohai_fuse.cli import output
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import MountFailedError, UsageError, ValohaiFuseError
from valohai_fuse.mount import table
from valohai_fuse.obs.control_client import ask
from valohai_fuse.obs.runtime_dir import MountRecord, RuntimeDir, is_running
from valohai_fuse.settings import Settings

SLACK_S: Final = 10.0
"""A daemon that is not gone this long after its grace period is killed."""
_IMPATIENT_S: Final = 1.0
_POLL_S: Final = 0.1
_STILL_BUSY: Final = "was still busy after the grace period: detached, readers that are left get errors"


@dataclass(frozen=True, slots=True)
class Target:
    """A mount to take down; `record` is None when only the kernel knows of it."""

    mountpoint: str
    record: MountRecord | None


def find_targets(settings: Settings, runtime: RuntimeDir, names: Sequence[str]) -> list[Target]:
    """What the words on the command line mean: names of inputs, or directories; none: all in the inputs directory.

    Raises UsageError for a word that is no mount of ours.
    """
    records = {record.mountpoint: record for record in runtime.records()}
    mounted = {entry.mountpoint for entry in table.entries() if entry.is_ours}
    known = {place: Target(place, records.get(place)) for place in sorted(mounted | set(records))}
    if not names:
        base = table.resolve(settings.inputs_dir)
        return [t for place, t in known.items() if place == base or place.startswith(base + "/")]
    found = []
    for name in names:
        places = [table.resolve(name)]
        if "/" not in name:
            places.insert(0, table.resolve(os.path.join(settings.inputs_dir, name)))
        target = next((known[place] for place in places if place in known), None)
        if target is None:
            raise _not_ours(name, places, list(known))
        found.append(target)
    return found


def _not_ours(name: str, places: Sequence[str], known: Sequence[str]) -> UsageError:
    for place in places:
        entry = table.find(place)
        if entry is not None:
            return UsageError(
                f"{place} is not a mount of valohai-fuse but of {entry.file_system_type}", hint=f"umount {place}"
            )
    shown = ", ".join(known) or "nothing"
    return UsageError(f"{name}: not mounted", hint=f"mounted are: {shown}")


def take_down(runtime: RuntimeDir, target: Target, *, grace_s: float = 0.0) -> str:
    """Unmounts one and tidies up after it; says in a word how it went. `grace_s`: for readers where there is no record.

    Raises MountFailedError.
    """
    record = target.record
    entry = table.find(target.mountpoint)
    ours = entry if entry is not None and entry.is_ours else None
    alive = record is not None and is_running(record)
    if record is not None and alive and _ask_daemon(record):
        how = _wait_for_daemon(record, ours)
    elif ours is not None:
        is_dead = record is not None or table.answers(target.mountpoint) is False
        how = _detach(ours) if is_dead else _wait_unmounted(ours, grace_s)
    else:
        how = "was gone already"
    if record is not None:
        runtime.forget(record)
    return how


def _ask_daemon(record: MountRecord) -> bool:
    try:
        ask(record.control_path, "unmount", timeout_s=5)
    except ValohaiFuseError:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(record.pid, signal.SIGTERM)
            return True
        return False
    return True


def _wait_for_daemon(record: MountRecord, entry: table.MountEntry | None) -> str:
    began_s = time.monotonic()
    limit_s = began_s + record.grace_period + SLACK_S
    said = False
    how = "unmounted"
    while is_running(record):
        waited_s = time.monotonic() - began_s
        if waited_s > _IMPATIENT_S and not said:
            output.say(_busy(record.mountpoint, record.grace_period))
            said = True
        if time.monotonic() >= limit_s:
            os.kill(record.pid, signal.SIGKILL)
            how = "unmounted (its daemon did not end and was killed)"
            limit_s = float("inf")
        time.sleep(0.01 if waited_s < _IMPATIENT_S else 0.1)
    if said and how == "unmounted" and time.monotonic() - began_s >= record.grace_period:
        how = _STILL_BUSY
    if entry is not None and table.is_there(entry):
        _detach(entry)
    return how


def _wait_unmounted(entry: table.MountEntry, grace_s: float) -> str:
    began_s, said = time.monotonic(), False
    while True:
        try:
            table.unmount(entry.mountpoint)
        except OSError as error:
            if not table.is_there(entry):
                return "was gone already"
            waited_s = time.monotonic() - began_s
            if error.errno != errno.EBUSY or waited_s >= grace_s:
                break
            if waited_s > _IMPATIENT_S and not said:
                output.say(_busy(entry.mountpoint, grace_s))
                said = True
            time.sleep(_POLL_S)
        else:
            return "unmounted"
    _detach(entry)
    return _STILL_BUSY


def _busy(mountpoint: str, grace_s: float) -> str:
    return f"{mountpoint} is busy: waiting up to {grace_s:g} s for what is open there"


def _detach(entry: table.MountEntry) -> str:
    try:
        table.unmount_lazily(entry.mountpoint)
    except OSError as error:
        if not table.is_there(entry):
            return "was gone already"
        raise MountFailedError(f"cannot unmount {entry.mountpoint}: {error.strerror}") from None
    return "removed (it was dead)"


@verb(
    "unmount",
    example="valohai-fuse unmount train",
    help="Unmount the INPUTs or directories named, or all of the inputs directory; also what a dead daemon left behind.",
)
@click.argument("names", metavar="[INPUT or DIR]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every mount of this runtime directory, wherever it is.")
def unmount(settings: Settings, names: tuple[str, ...], everything: bool) -> int:
    """Unmounts; 0 when all of it is gone, also when nothing was mounted."""
    runtime = RuntimeDir(settings.runtime_dir)
    if everything and names:
        raise UsageError("--all and names contradict each other")
    targets = (
        [Target(r.mountpoint, r) for r in runtime.records()] if everything else find_targets(settings, runtime, names)
    )
    if not targets:
        output.say("nothing is mounted")
        return 0
    failures = []
    for target in targets:
        try:
            output.say(f"{target.mountpoint}: {take_down(runtime, target, grace_s=settings.grace_period)}")
        except MountFailedError as error:
            failures.append(error)
    for failure in failures[1:]:
        output.error(failure.message, failure.hint)
    if failures:
        raise failures[0]
    return 0
