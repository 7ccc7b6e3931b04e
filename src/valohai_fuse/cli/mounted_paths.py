"""From a path that a person wrote to the mount that serves it and the path inside that mount."""

from __future__ import annotations

import os
from collections.abc import Sequence

from valohai_fuse.errors import UsageError
from valohai_fuse.mount import table
from valohai_fuse.obs.runtime_dir import MountRecord


def find(records: Sequence[MountRecord], path: str) -> tuple[MountRecord, str] | None:
    """The innermost mount that holds `path`, and the path inside it; None when no record's mount does."""
    absolute = os.path.abspath(path)
    # The path is taken as it is written first: resolving it would touch the mount for each of its components.
    return _holding(records, absolute) or _holding(records, os.path.realpath(absolute))


def _holding(records: Sequence[MountRecord], absolute: str) -> tuple[MountRecord, str] | None:
    for record in sorted(records, key=lambda r: -len(r.mountpoint)):
        if absolute == record.mountpoint or absolute.startswith(record.mountpoint + "/"):
            return record, absolute[len(record.mountpoint) :].strip("/")
    return None


def not_ours(path: str) -> UsageError:
    """What to say of a path that is below no mount of ours."""
    entry = table.containing(os.path.realpath(os.path.abspath(path)))
    where = f"on {entry.file_system_type}" if entry is not None else "nowhere"
    return UsageError(
        f"{path} is not below a mount of valohai-fuse but {where}", hint="valohai-fuse status shows the mounts"
    )
