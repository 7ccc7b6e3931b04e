"""What can go wrong, named by what it means to the person or the reader.

Errno, exit codes and HTTP statuses are translations of these and live at the edges: errno in `mount/errnos.py`, exit
codes in `cli`, HTTP statuses in `fetch` and `sources`. No message here ever holds the query of a URL or a token: whoever
raises, redacts first.
"""

from __future__ import annotations


class ValohaiFuseError(Exception):
    """Root of everything this package raises on purpose. `hint` says what the person can do about it, if anything."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


# --- before anything is mounted ---------------------------------------------------------------------------------------


class UsageError(ValohaiFuseError):
    """The command line asks for something that does not exist or contradicts itself (exit code 2)."""


class ConfigurationError(ValohaiFuseError):
    """A configuration file is missing or invalid; the message names the file and the JSON path (exit code 3)."""


class FuseUnavailableError(ValohaiFuseError):
    """This machine does not let us use FUSE: no /dev/fuse, no privilege, no fusermount3 (exit code 4)."""


class MountFailedError(ValohaiFuseError):
    """FUSE works but this mount did not come up: mount point busy, cannot be made, not empty... (exit code 5)."""


# --- while reading ----------------------------------------------------------------------------------------------------


class ReadError(ValohaiFuseError):
    """A read (or the sizing of a file) could not be answered. Subclasses say why; plain ReadError is "anything else"."""


class ObjectMissingError(ReadError):
    """The store says that the object is not there (404, 410)."""


class AccessRefusedError(ReadError):
    """Refused with a URL that was renewed for this very request, or Valohai refuses to renew (token dead)."""


class ObjectChangedError(ReadError):
    """Size or ETag of the object is not what it was: its bytes must not be mixed with those already served."""


class DeadlineExceededError(ReadError):
    """Everything that can be retried was retried until the read's deadline."""


class StoreUnavailableError(ReadError):
    """The store or Valohai's API cannot be used now, in a way that waiting did not or cannot cure."""


class UnsupportedLocationError(ReadError):
    """The file's location has a scheme that this mount cannot or must not fetch (s3:// without credentials, file:)."""
