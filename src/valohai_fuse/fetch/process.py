"""The daemon's end of one worker process: starts it, writes to it without ever waiting, reads what it says, buries it.

Trio only, one thread. What happens to orders is the pool's business. Invariants: `post` never blocks and never awaits (what
the socket does not take at once is kept and written by `serve`); a worker that is gone is reaped; argv and environment
hold nothing secret.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import trio

from valohai_fuse.fetch.wire import Configure, Deframer, ToPool, frame, to_pool_decoder
from valohai_fuse.settings import child_environment

log = logging.getLogger(__name__)

_RECEIVE_BYTES = 256 * 1024
_ENDS_WITHIN_S = 2.0


class WorkerProcess:
    """One running worker. Started by exec, never by a bare fork: pyfuse3 is initialised in this process."""

    def __init__(self, configure: Configure) -> None:
        """Raises OSError when no process can be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._pid = _spawn(theirs.fileno())
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours
        self._backlog = bytearray()
        self._backlog_grew = trio.Event()
        self.post(frame(configure))

    @property
    def pid(self) -> int:
        """The process id, for the log and for tests."""
        return self._pid

    def post(self, data: bytes) -> None:
        """Sends a framed message now or as soon as the socket takes it. To a worker that is gone: nothing happens here,
        `serve` notices."""
        if not self._backlog:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                return
        if data:
            self._backlog += data
            self._backlog_grew.set()

    async def serve(self, received: Callable[[ToPool], None]) -> None:
        """Calls `received` for each message until the worker closes its end, dies or talks nonsense; then returns, with
        the process reaped. Cancelling ends the worker."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_backlog)
                await self._read(received)
                nursery.cancel_scope.cancel()
        finally:
            self._socket.close()
            with trio.CancelScope(shield=True):
                await self._reap()

    def close(self) -> None:
        """Asks the worker to end by closing the conversation; `serve` returns when it has."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it is gone already

    async def _read(self, received: Callable[[ToPool], None]) -> None:
        deframer = Deframer()
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            try:
                for body in deframer.feed(data):
                    received(to_pool_decoder.decode(body))
            except ValueError:  # msgspec's errors included: out of step, of no further use
                return

    async def _write_backlog(self) -> None:
        while True:
            await self._backlog_grew.wait()
            self._backlog_grew = trio.Event()
            while self._backlog:
                await trio.lowlevel.wait_writable(self._socket)
                try:
                    sent = self._socket.send(self._backlog)
                except BlockingIOError:
                    continue
                except OSError:
                    self._backlog.clear()
                    return  # `_read` sees the end as well
                del self._backlog[:sent]

    async def _reap(self) -> None:
        """The worker ends by itself when its socket has; one that does not within two seconds is killed. Who does not die of
        that hangs in the kernel, in a disk that does not answer: it is left to whoever reaps orphans."""
        with trio.move_on_after(_ENDS_WITHIN_S):
            await _wait_until_dead(self._pid)
            return
        os.kill(self._pid, signal.SIGKILL)
        with trio.move_on_after(_ENDS_WITHIN_S):
            await _wait_until_dead(self._pid)
            return
        log.warning("worker %d hangs in a system call and cannot be ended", self._pid)


def _spawn(descriptor: int) -> int:
    """Starts a worker on its end of the conversation; returns its process id. Raises OSError.

    On this thread on purpose: about a millisecond. Not `subprocess`: that waits until the child has closed what it inherits,
    which can take for ever with a cache file on a network file system whose server is gone.
    """
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "valohai_fuse.fetch.worker", str(descriptor)],
        child_environment(),
        file_actions=(
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, descriptor, descriptor),  # onto itself: it is inherited, everything else is not
        ),
        setpgroup=0,  # keeps a Ctrl-C on the terminal from reaching the worker before it can ignore it
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
    )


async def _wait_until_dead(pid: int) -> None:
    """Until our child has ended, and been reaped. Cancelled, it is not reaped."""
    with contextlib.suppress(ChildProcessError):
        # In a thread, which may be abandoned: it ends with the process, which is killed in the end.
        await trio.to_thread.run_sync(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT, abandon_on_cancel=True)
        _bury(pid)


def _bury(pid: int) -> None:
    os.waitpid(pid, os.WNOHANG)
