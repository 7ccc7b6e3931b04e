"""The one table from meaning to errno, and the one guard around every FUSE handler.

Any exception but FUSEError in a handler would end the mount, so nothing else leaves the guard: an error that is ours becomes
its errno, a bug becomes one EIO and a log entry, and the mount lives on.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from valohai_fuse import errors
from valohai_fuse.mount.under_way import RequestsUnderWay
from valohai_fuse.ports import Metrics

log = logging.getLogger(__name__)


class Handlers(Protocol):
    """Whose methods are guarded."""

    under_way: RequestsUnderWay
    metrics: Metrics


H = TypeVar("H", bound=Handlers)
P = ParamSpec("P")
R = TypeVar("R")

ERRNO_BY_ERROR: dict[type[errors.ValohaiFuseError], int] = {
    errors.AccessRefusedError: errno.EACCES,
    errors.ObjectChangedError: errno.ESTALE,
    errors.DeadlineExceededError: errno.ETIMEDOUT,
    errors.ObjectMissingError: errno.EIO,  # ENOENT at open and lookup, where the name can still be denied
    errors.StoreUnavailableError: errno.EIO,
    errors.UnsupportedLocationError: errno.EIO,
}


def errno_of(error: errors.ValohaiFuseError, *, naming: bool = False) -> int:
    """The errno that tells the reader about `error`; `naming`: in an operation on a name (lookup, open)."""
    if naming and isinstance(error, errors.ObjectMissingError):
        return errno.ENOENT
    return next((number for kind, number in ERRNO_BY_ERROR.items() if isinstance(error, kind)), errno.EIO)


def guarded(
    *, naming: bool = False
) -> Callable[
    [Callable[Concatenate[H, P], Coroutine[Any, Any, R]]], Callable[Concatenate[H, P], Coroutine[Any, Any, R]]
]:
    """Decorates a FUSE handler: whatever it raises leaves as FUSEError, and while it runs it stands in `under_way`."""

    def decorate(
        handler: Callable[Concatenate[H, P], Coroutine[Any, Any, R]],
    ) -> Callable[Concatenate[H, P], Coroutine[Any, Any, R]]:
        name = handler.__name__

        @functools.wraps(handler)
        async def guard(self: H, /, *args: P.args, **kwargs: P.kwargs) -> R:
            entry = self.under_way.begin(name)
            try:
                return await handler(self, *args, **kwargs)
            except pyfuse3.FUSEError:
                raise
            except errors.ValohaiFuseError as error:
                number = errno_of(error, naming=naming)
                if name == "read":
                    self.metrics.count("read_errors")
                log.info("%s: %s -> %s", name, error, errno.errorcode[number])
                raise pyfuse3.FUSEError(number) from None
            except Exception as bug:
                self.metrics.count("handler_errors")
                log.exception("%s failed for an unforeseen reason", name)
                raise pyfuse3.FUSEError(errno.EIO) from bug
            finally:
                self.under_way.end(entry)

        return guard

    return decorate
