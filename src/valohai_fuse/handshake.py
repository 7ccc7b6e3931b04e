"""What the supervisor and the daemon of one mount say to each other.

The supervisor starts `python -m valohai_fuse.daemon SPEC_FD REPORT_FD`, writes one `MountSpec` as JSON to SPEC_FD and closes
it; the daemon answers with exactly one line of JSON on REPORT_FD, a `Report`, once its mount answers or has failed, and
closes it. End of file without a line means that the daemon died; its log says why. Nothing secret goes through argv.
"""

from __future__ import annotations

from typing import Any

import msgspec

from valohai_fuse import errors


class MountSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One mount: what to show, and where."""

    settings: dict[str, Any]
    """`settings.as_dict(...)`."""
    mountpoint: str
    inputs: tuple[str, ...]
    """Names of the inputs to show. One, shown at the mount point itself, or with `as_root` any number."""
    as_root: bool = False
    """Each input as a top directory of one tree."""
    starts_worker: bool = False
    """Start the first fetch worker while everything else is built: the first read need not wait for it."""
    control_path: str = ""
    """Where the daemon listens for status, info and unmount (unix socket, 0600)."""
    log_to_stderr: bool = False
    """The log goes to stderr and nowhere else."""
    echo_level: str = ""
    """Lines of this level and above go to stderr as well as to the log file; empty: none do."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How the start went. `error` is the name of a class of `errors`, empty when the mount answers."""

    error: str = ""
    message: str = ""
    hint: str | None = None
    pid: int = 0
    files: int = 0
    bytes: int = 0
    warnings: tuple[str, ...] = ()

    def raise_for_error(self) -> None:
        """Raises the error that the daemon met, as its own class where it is one of ours."""
        if self.error:
            kind = getattr(errors, self.error, None)
            if isinstance(kind, type) and issubclass(kind, errors.ValohaiFuseError):
                raise kind(self.message, hint=self.hint)
            raise errors.MountFailedError(f"{self.error}: {self.message}", hint=self.hint)


def failed(error: BaseException) -> Report:
    """The report of a start that ended with `error`."""
    hint = error.hint if isinstance(error, errors.ValohaiFuseError) else None
    return Report(error=type(error).__name__, message=str(error), hint=hint)
