"""The FUSE session of this process: mount, serve, unmount. pyfuse3 keeps it in module globals, so there is one a process.

Order that matters: `init` mounts; nothing answers until `serve` runs on the loop; so the first `stat` is made in a thread,
never on the loop. An unmount is first tried the ordinary way, which fails while files are open; after the grace period the
mount is detached lazily and the session closed: readers that are left get an error, they never hang.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Awaitable, Iterator, Sequence

import pyfuse3
import trio

from valohai_fuse import errors
from valohai_fuse.mount import table, turns
from valohai_fuse.mount.operations import Operations

log = logging.getLogger(__name__)

TASKS_MAX = 20_000
"""Requests that may be waiting at once. 99 is pyfuse3's default: 99 stalled reads would then freeze an unrelated `stat`."""

TASKS_IDLE = 8

POLL_S = 0.1

_SAID_BYTES_MAX = 4096
_NOT_PERMITTED = ("Operation not permitted", "Permission denied", "/dev/fuse", "device not found", "exec fusermount3")
_ASK = (
    "grant the container CAP_SYS_ADMIN and /dev/fuse, and lift AppArmor's or seccomp's ban on mount; `valohai-fuse doctor` says "
    "more, `run --fallback download` and `download` do without"
)


class Session:
    """One mount, from `mount` to `close`."""

    def __init__(self, operations: Operations, mountpoint: str) -> None:
        self._operations = operations
        self.mountpoint = mountpoint
        self.ended = trio.Event()
        """The kernel or `close` ended the session: nothing is served any more."""
        self._serving = trio.CancelScope()

    def mount(self, *, source: str, allow_other: bool) -> None:
        """Mounts. Raises FuseUnavailableError or MountFailedError; nothing is left mounted then."""
        options = {"ro", "nosuid", "nodev", "default_permissions", "subtype=valohai-fuse", f"fsname={_option(source)}"}
        if allow_other:
            options.add("allow_other")
        with _libfuse_heard() as said:
            try:
                pyfuse3.init(self._operations, self.mountpoint, options)
            except RuntimeError as error:
                said.append(str(error))
                failed = True
            else:
                failed = False
        if failed:
            raise mount_error(self.mountpoint, said)
        for line in said:
            log.warning("libfuse: %s", line)

    async def serve(self) -> None:
        """Answers the kernel until the mount is gone or `close` is called."""
        try:
            with self._serving:
                turns.install()
                main: Awaitable[None] = pyfuse3.main(min_tasks=TASKS_IDLE, max_tasks=TASKS_MAX)
                await main
        finally:
            self.ended.set()

    async def wait_answering(self, timeout_s: float) -> None:
        """Until a `stat` of the mount point is answered by us. Raises MountFailedError."""
        with trio.move_on_after(timeout_s) as scope:
            await trio.to_thread.run_sync(os.stat, self.mountpoint, abandon_on_cancel=True)
        if scope.cancelled_caught:
            raise errors.MountFailedError(f"{self.mountpoint}: the mount does not answer within {timeout_s:g} s")

    async def unmount(self, *, grace_s: float) -> bool:
        """Unmounts; busy files have `grace_s` to be closed, then the mount is detached. True: it was detached lazily.

        Reads go on being answered meanwhile.
        """
        deadline = trio.current_time() + grace_s
        while not self.ended.is_set():
            try:
                await trio.to_thread.run_sync(table.unmount, self.mountpoint)
            except OSError as error:
                if error.errno in {errno.EINVAL, errno.ENOENT}:
                    return False  # somebody else was faster
                if trio.current_time() >= deadline:
                    log.warning("%s is busy (%s): detached lazily", self.mountpoint, error.strerror)
                    await trio.to_thread.run_sync(table.unmount_lazily, self.mountpoint)
                    return True
            else:
                return False
            with trio.move_on_after(POLL_S):
                await self.ended.wait()
        return False

    def close(self) -> None:
        """Ends the session; requests that are still waiting in the kernel fail there. Call after `serve` has ended."""
        pyfuse3.close(unmount=False)

    def terminate(self) -> None:
        """Makes `serve` return, also while requests are being answered: pyfuse3 alone would wait for them, as long as their
        deadline is. They fail in the kernel with `close`."""
        if not self.ended.is_set():
            pyfuse3.terminate()
            self._serving.cancel()


@contextlib.contextmanager
def _libfuse_heard() -> Iterator[list[str]]:
    """Collects, by the end of the block, the lines that libfuse and fusermount3 write to stderr in it, before what the block
    adds itself. They say the reason of a failure nowhere else. Nothing else may run meanwhile."""
    said: list[str] = []
    heard, before = os.memfd_create("libfuse"), os.dup(2)
    try:
        os.dup2(heard, 2)
        yield said
    finally:
        os.dup2(before, 2)
        lines = os.pread(heard, _SAID_BYTES_MAX, 0).decode(errors="replace").splitlines()
        said[:0] = [line.strip() for line in lines if line.strip()]
        os.close(heard)
        os.close(before)


def mount_error(mountpoint: str, said: Sequence[str]) -> errors.ValohaiFuseError:
    """What a failed mount means. `said`: libfuse's and fusermount3's lines, the first of which has the reason, and last what
    pyfuse3 makes of it, which is the same for all."""
    reason = re.sub(r"^(fuse|fusermount3): ", "", said[0])
    about_mountpoint = mountpoint in reason or "mountpoint" in reason or "mount point" in reason
    if not about_mountpoint and any(word in reason for word in _NOT_PERMITTED):
        return errors.FuseUnavailableError(f"{mountpoint}: mounting is refused: {reason}", hint=_ASK)
    return errors.MountFailedError(
        f"{mountpoint}: {reason}", hint="`valohai-fuse doctor` says what is missing on this machine"
    )


def _option(text: str) -> str:
    """libfuse splits its options at commas and takes a backslash as the escape."""
    return text.replace("\\", "\\\\").replace(",", "\\,")
