"""A worker process: `python -m valohai_fuse.fetch.worker FD`, FD being one end of a socketpair whose other end is the pool's.

One loop, one epoll: the control socket and the carriers' sockets (`curl`, `plain`) wait side by side, and whatever arrives is
landed (`transfer`) before the next wait; what landed in memory is written to the disk in a thread (`behind`). The
process ends when its socket does, and so never outlives the daemon: no signal is needed for that, and PR_SET_PDEATHSIG would
tie it to the daemon's *thread* that started it.

Invariants: each order is answered once, a cancelled one too; a connection is kept after every answer that was read to its
end; nothing is written but segment files and messages. Must not know: retries, priorities, leases. Imports are kept few,
for a reader waits while this starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import time
from itertools import chain
from typing import Final

import msgspec

from valohai_fuse.allocator import keep_freed_memory
from valohai_fuse.descriptors import expand_descriptor_table
from valohai_fuse.fetch.behind import Job, WriteBehind
from valohai_fuse.fetch.curl import CurlCarrier
from valohai_fuse.fetch.plain import PlainCarrier
from valohai_fuse.fetch.response import Rejected
from valohai_fuse.fetch.sockets import Sockets
from valohai_fuse.fetch.transfer import Staged, Transfer
from valohai_fuse.fetch.wire import (
    Cancel,
    Cancelled,
    Deframer,
    Done,
    Landed,
    Late,
    Order,
    Ready,
    ToPool,
    frame,
    to_worker_decoder,
)
from valohai_fuse.ports import FailureKind
from valohai_fuse.store.landing import Landings

_RECEIVE_BYTES: Final = 256 * 1024


class Worker:
    """The event loop; see the module's text."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._landings = Landings()
        self._deframer = Deframer()
        self._stall_timeout_s = 30.0
        self._is_over = False
        self._sockets = Sockets()
        self._sockets.watch(control.fileno(), self._receive)
        self._curl = CurlCarrier(self._sockets)
        self._plain = PlainCarrier(self._sockets, self._curl)
        self._transfers: dict[int, Transfer] = {}
        self._look_at_s = float("inf")
        """Until then none of them is late or has stalled. What arrives only puts that off, so it is not kept up to date."""
        self._outgoing: list[bytes] = []
        self._behind = WriteBehind(bytes_max=0)
        self._sockets.watch(self._behind.fd, self._tell_written)

    def run(self) -> None:
        """Until the pool closes its end."""
        try:
            self._serve()
        finally:
            self._behind.close()

    def _serve(self) -> None:
        self._post(Ready())
        self._flush()
        while True:
            self._sockets.wait(self._wait_s())
            if self._is_over:
                return
            self._plain.receive()
            now_s = time.monotonic()
            self._give_up_writing(now_s)
            self._curl.tick(now_s)
            self._landings.expire(now_s)
            self._collect(now_s)  # first: what has ended is told in one message, not two
            self._advance(now_s)
            self._flush()

    def _wait_s(self) -> float | None:
        """How long to sleep at the most; None: until something happens."""
        dues = (self._curl.due_at_s, self._behind.give_up_at_s, self._landings.due_at_s)
        moments = [at_s for at_s in dues if at_s is not None]
        if self._transfers:
            moments.append(self._look_at_s)
        moments += [at_s for transfer in self._transfers.values() if (at_s := transfer.land_at_s) is not None]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    # --- the pool's side ----------------------------------------------------------------------------------------------

    def _receive(self, _fd: int, _mask: int) -> None:
        """Takes what the pool has sent."""
        try:
            data = self._control.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._is_over = True
            return
        for body in self._deframer.feed(data):
            message = to_worker_decoder.decode(body)
            if isinstance(message, Order):
                self._start(message)
            elif isinstance(message, Cancel):
                if (transfer := self._transfers.get(message.id)) is not None:
                    self._release(transfer)
                    self._post(Cancelled(id=message.id, fetched_bytes=transfer.fetched_bytes))
            else:
                self._stall_timeout_s = message.stall_timeout_s
                self._behind.bytes_max = message.behind_bytes_max
                self._curl.configure(message)
                self._plain.configure(message)

    def _start(self, order: Order) -> None:
        try:
            transfer = Transfer(order, self._landings.open, time.monotonic())
            self._send(transfer)
        except Rejected as rejected:
            self._post(Transfer.unsent(order, rejected))
            return
        self._transfers[order.id] = transfer
        if order.staging_path:
            self._landings.expect(os.fsdecode(order.staging_path), order.start, order.stop)
        self._look_at_s = min(self._look_at_s, transfer.look_at_s(self._stall_timeout_s))

    def _send(self, transfer: Transfer) -> None:
        (self._plain if self._plain.takes(transfer) else self._curl).send(transfer)

    def _post(self, message: ToPool) -> None:
        self._outgoing.append(frame(message))

    def _flush(self) -> None:
        """Sends what was posted. Blocks while the daemon does not read: then there is nothing better to do."""
        if self._outgoing:
            data = b"".join(self._outgoing)
            self._outgoing.clear()
            self._control.sendall(data)

    # --- transfers ----------------------------------------------------------------------------------------------------

    def _advance(self, now_s: float) -> None:
        """Lands what arrived, and ends what must not go on."""
        looks = now_s >= self._look_at_s
        for transfer in list(self._transfers.values()):
            try:
                landed = transfer.advance(now_s)
                if landed is not None:
                    self._post(landed)
                if transfer.surplus:
                    self._conclude(transfer, now_s)
                elif looks:
                    self._look(transfer, now_s)
            except Rejected as rejected:
                self._fail(transfer, rejected)
            except OSError as error:
                self._fail(transfer, _disk(error))
        if looks:
            self._look_at_s = min(
                (t.look_at_s(self._stall_timeout_s) for t in self._transfers.values()), default=float("inf")
            )

    def _look(self, transfer: Transfer, now_s: float) -> None:
        """Whether it is late or has stalled; raises Rejected for the latter."""
        if transfer.take_late(now_s):
            self._post(Late(id=transfer.order.id))
        if now_s - transfer.progress_at_s >= self._stall_timeout_s:
            if not transfer.complete:
                raise Rejected(FailureKind.TRANSIENT, "nothing came for the stall timeout")
            self._conclude(transfer, now_s)

    def _collect(self, now_s: float) -> None:
        """Ends the transfers that a carrier is done with."""
        for transfer, reason in chain(self._curl.collect(), self._plain.collect()):
            if reason is None:
                self._ended(transfer, now_s)
            elif transfer.complete:
                self._conclude(transfer, now_s)
            elif isinstance(reason, OSError):
                self._fail(transfer, _disk(reason))
            else:
                self._fail(transfer, reason)

    def _ended(self, transfer: Transfer, now_s: float) -> None:
        self._curl.account(transfer)
        try:
            if transfer.redirect():
                self._curl.release(transfer)
                self._send(transfer)
                return
            transfer.finish(now_s)
            self._done(transfer, now_s)
        except Rejected as rejected:
            self._fail(transfer, rejected)
        except OSError as error:
            self._fail(transfer, _disk(error))

    def _conclude(self, transfer: Transfer, now_s: float) -> None:
        """Ends an order whose extent has landed, although its answer has not ended or not ended well."""
        self._curl.account(transfer)
        try:
            self._done(transfer, now_s)
        except OSError as error:
            self._fail(transfer, _disk(error))

    def _done(self, transfer: Transfer, now_s: float) -> None:
        staged = transfer.take_staged()
        transfer.close()
        done = Done(
            id=transfer.order.id,
            version=transfer.version,
            fetched_bytes=transfer.fetched_bytes,
            first_byte_s=transfer.first_byte_s,
            total_s=transfer.total_s(now_s),
            new_connection=transfer.connections_new > 0,
            disk_wait_s=transfer.disk_wait_s,
        )
        self._release(transfer)
        if staged is not None:
            # Readers go on at once; the order is over when the disk has it, for until then its memory is needed.
            self._post(Landed(id=done.id, upto=transfer.order.stop, version=done.version))
            if self._write_behind(staged, done):
                return
            done = msgspec.structs.replace(done, is_kept=False)
        self._post(done)

    def _write_behind(self, staged: Staged, done: Done | None) -> bool:
        """Whether it will be written; if not, it stays uncached."""
        if self._behind.offer(Job(staged, done)):
            return True
        with contextlib.suppress(OSError):  # memory's file, of which nothing is expected any more
            staged.close()
        return False

    def _tell_written(self, _fd: int, _mask: int) -> None:
        for ended in self._behind.ended():
            if ended.job.done is not None:
                done = msgspec.structs.replace(ended.job.done, is_kept=ended.is_written, disk_error=ended.disk_error)
                self._post(done)

    def _give_up_writing(self, now_s: float) -> None:
        for job in self._behind.given_up(now_s):
            if job.done is not None:
                self._post(msgspec.structs.replace(job.done, is_kept=False))

    def _fail(self, transfer: Transfer, rejected: Rejected) -> None:
        if rejected.kind is FailureKind.TRANSIENT:
            with contextlib.suppress(Rejected, OSError):  # the order fails anyway, for the first reason
                if (landed := transfer.salvage(time.monotonic())) is not None:
                    self._post(landed)
        failed = transfer.failed(rejected)
        self._release(transfer)
        self._post(failed)

    def _release(self, transfer: Transfer) -> None:
        """Forgets it; its connection is closed unless its answer was read to the end."""
        del self._transfers[transfer.order.id]
        self._curl.release(transfer)
        self._plain.release(transfer)
        with contextlib.suppress(OSError):
            transfer.give_up()  # which is nothing after a good end
        if (staged := transfer.take_staged()) is not None:  # of an order that failed or is not wanted any more
            self._write_behind(staged, None)
        with contextlib.suppress(OSError):  # what landed is verified by whoever reads it
            transfer.close()


def _disk(error: OSError) -> Rejected:
    if error.errno == errno.ENOMEM:
        raise MemoryError from error  # not the disk's fault; another worker takes the orders
    return Rejected(FailureKind.DISK, error.strerror or type(error).__name__)


def main() -> None:
    """Serves the socket whose descriptor is the one argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the daemon's business; it closes the socket
    keep_freed_memory()
    expand_descriptor_table()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        control.set_inheritable(False)
        try:
            Worker(control).run()
        except (BrokenPipeError, ConnectionResetError):
            return  # the daemon is gone: so are those who waited


if __name__ == "__main__":
    main()
