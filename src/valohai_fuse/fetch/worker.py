"""A worker process: `python -m valohai_fuse.fetch.worker FD`, FD being one end of a socketpair whose other end is the pool's.

One loop, one epoll, one `CurlMulti`: the control socket and libcurl's sockets wait side by side, and whatever arrives is
landed (`transfer.py`) before the next wait; what landed in memory is written to the disk in a thread (`behind.py`). The
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
import select
import signal
import socket
import sys
import time
from typing import Any, Final

import msgspec
import pycurl

from valohai_fuse import __version__
from valohai_fuse.allocator import keep_freed_memory
from valohai_fuse.fetch.behind import Job, WriteBehind
from valohai_fuse.fetch.response import Rejected
from valohai_fuse.fetch.transfer import OpenLanding, Staged, Transfer, first_byte_s
from valohai_fuse.fetch.wire import (
    Cancel,
    Cancelled,
    Configure,
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
from valohai_fuse.ports import FailureKind, ObjectKey
from valohai_fuse.store.landing import SegmentWriter

_BUFFER_BYTES: Final = 512 * 1024
_RECEIVE_BYTES: Final = 256 * 1024
_IDLE_CONNECTION_S: Final = 110
"""Below the 118 s of libcurl and the 2-5 minutes of the large stores: a kept connection should still be alive."""


class Worker:
    """The event loop; see the module's text."""

    def __init__(self, control: socket.socket, open_landing: OpenLanding) -> None:
        self._control = control
        self._open_landing = open_landing
        self._deframer = Deframer()
        self._configure = Configure(connections=16, connect_timeout_s=10, stall_timeout_s=30, ca_file=None)
        self._ca_path: str | None = None
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._watched: set[int] = set()
        self._curl_timer_at_s: float | None = None
        self._idle_curls: list[pycurl.Curl] = []
        self._transfers: dict[int, Transfer] = {}
        self._look_at_s = float("inf")
        """Until then none of them is late or has stalled. What arrives only puts that off, so it is not kept up to date."""
        self._by_curl: dict[pycurl.Curl, Transfer] = {}
        self._outgoing: list[bytes] = []
        self._behind = WriteBehind()
        self._epoll.register(self._behind.fd, select.EPOLLIN)
        self._multi: Any = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)

    def run(self) -> None:
        """Until the pool closes its end."""
        try:
            self._serve()
        finally:
            self._behind.close()

    def _serve(self) -> None:
        self._post(Ready())
        self._flush()
        control = self._control.fileno()
        while True:
            events = self._epoll.poll(self._wait_s())
            for fd, mask in events:
                if fd == control:
                    if not self._receive():
                        return
                elif fd == self._behind.fd:
                    self._tell_written()
                else:
                    self._multi.socket_action(fd, _curl_mask(mask))
            now_s = time.monotonic()
            self._give_up_writing(now_s)
            if self._curl_timer_at_s is not None and now_s >= self._curl_timer_at_s:
                self._curl_timer_at_s = None
                self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
            self._collect(now_s)  # first: what has ended is told in one message, not two
            self._advance(now_s)
            self._flush()

    # --- libcurl's side -----------------------------------------------------------------------------------------------

    def _watch(self, what: int, fd: int, _multi: object, _data: object) -> None:
        """libcurl says what to wait for on its socket `fd`."""
        if what == pycurl.POLL_REMOVE:
            if fd in self._watched:
                self._watched.discard(fd)
                self._epoll.unregister(fd)
            return
        mask = (select.EPOLLIN if what & pycurl.POLL_IN else 0) | (select.EPOLLOUT if what & pycurl.POLL_OUT else 0)
        if fd in self._watched:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
            self._watched.add(fd)

    def _set_timer(self, timeout_ms: int) -> None:
        self._curl_timer_at_s = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000

    def _wait_s(self) -> float | None:
        """How long epoll may sleep; None: until something happens."""
        moments = [at_s for at_s in (self._curl_timer_at_s, self._behind.give_up_at_s) if at_s is not None]
        if self._transfers:
            moments.append(self._look_at_s)
        moments += [at_s for transfer in self._transfers.values() if (at_s := transfer.land_at_s) is not None]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _new_curl(self) -> pycurl.Curl:
        """A handle with everything set that is the same for all requests."""
        if self._idle_curls:
            return self._idle_curls.pop()
        curl = pycurl.Curl()
        for option, value in (
            (pycurl.HTTPGET, 1),
            (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1),
            (pycurl.HTTP09_ALLOWED, 0),
            (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
            (pycurl.FOLLOWLOCATION, 0),
            (pycurl.PATH_AS_IS, 1),
            (pycurl.HTTP_CONTENT_DECODING, 0),
            (pycurl.NOSIGNAL, 1),
            (pycurl.TCP_NODELAY, 1),
            (pycurl.TCP_KEEPALIVE, 1),
            (pycurl.BUFFERSIZE, _BUFFER_BYTES),
            (pycurl.MAXAGE_CONN, _IDLE_CONNECTION_S),
            (pycurl.CONNECTTIMEOUT_MS, max(1, round(self._configure.connect_timeout_s * 1000))),
            (pycurl.USERAGENT, f"valohai-fuse/{__version__}"),
        ):
            curl.setopt(option, value)
        if self._ca_path is not None:
            curl.setopt(pycurl.CAINFO, self._ca_path)
        return curl

    # --- the pool's side ----------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Takes what the pool has sent; False: it has gone."""
        try:
            data = self._control.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if not data:
            return False
        for body in self._deframer.feed(data):
            message = to_worker_decoder.decode(body)
            if isinstance(message, Order):
                self._start(message)
            elif isinstance(message, Cancel):
                if (transfer := self._transfers.get(message.id)) is not None:
                    self._release(transfer)
                    self._post(Cancelled(id=message.id, fetched_bytes=transfer.fetched_bytes))
            else:
                self._apply(message)
        return True

    def _apply(self, configure: Configure) -> None:
        self._configure = configure
        self._ca_path = _merged_ca_path(configure.ca_file, configure.extra_ca_file)
        self._multi.setopt(pycurl.M_MAXCONNECTS, configure.connections)

    def _start(self, order: Order) -> None:
        curl = self._new_curl()
        try:
            transfer = Transfer(order, curl, self._open_landing, time.monotonic())
            transfer.prepare()
        except Rejected as rejected:
            self._idle_curls.append(curl)
            self._post(Transfer.unsent(order, rejected))
            return
        self._transfers[order.id] = transfer
        self._by_curl[curl] = transfer
        self._look_at_s = min(self._look_at_s, transfer.look_at_s(self._configure.stall_timeout_s))
        self._multi.add_handle(curl)

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
            stall_timeout_s = self._configure.stall_timeout_s
            self._look_at_s = min(
                (t.look_at_s(stall_timeout_s) for t in self._transfers.values()), default=float("inf")
            )

    def _look(self, transfer: Transfer, now_s: float) -> None:
        """Whether it is late or has stalled; raises Rejected for the latter."""
        if transfer.take_late(now_s):
            self._post(Late(id=transfer.order.id))
        if now_s - transfer.progress_at_s >= self._configure.stall_timeout_s:
            if not transfer.complete:
                raise Rejected(FailureKind.TRANSIENT, "nothing came for the stall timeout")
            self._conclude(transfer, now_s)

    def _collect(self, now_s: float) -> None:
        """Ends the transfers that libcurl is done with."""
        left = 1
        while left:
            left, succeeded, broken = self._multi.info_read()
            for curl in succeeded:
                self._ended(self._by_curl[curl], now_s)
            for curl, code, message in broken:
                transfer = self._by_curl[curl]
                if transfer.complete:
                    self._conclude(transfer, now_s)
                else:
                    self._fail(transfer, transfer.broken(code, message))

    def _ended(self, transfer: Transfer, now_s: float) -> None:
        transfer.connections_new += transfer.curl.getinfo(pycurl.NUM_CONNECTS)
        try:
            if transfer.redirect():
                self._multi.remove_handle(transfer.curl)
                transfer.prepare()
                self._multi.add_handle(transfer.curl)
                return
            transfer.finish(now_s)
            self._done(transfer, now_s)
        except Rejected as rejected:
            self._fail(transfer, rejected)
        except OSError as error:
            self._fail(transfer, _disk(error))

    def _conclude(self, transfer: Transfer, now_s: float) -> None:
        """Ends an order whose extent has landed, although its answer has not ended or not ended well."""
        transfer.connections_new += transfer.curl.getinfo(pycurl.NUM_CONNECTS)
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
            first_byte_s=first_byte_s(transfer.curl),
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

    def _tell_written(self) -> None:
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
        """Takes the handle back; libcurl closes the connection unless its answer was read to the end."""
        del self._transfers[transfer.order.id]
        del self._by_curl[transfer.curl]
        self._multi.remove_handle(transfer.curl)
        if (staged := transfer.take_staged()) is not None:  # of an order that failed or is not wanted any more
            self._write_behind(staged, None)
        if transfer.single_use:
            transfer.curl.close()
        else:
            self._idle_curls.append(transfer.curl)
        with contextlib.suppress(OSError):  # what landed is verified by whoever reads it
            transfer.close()


def _curl_mask(mask: int) -> int:
    result = 0
    if mask & (select.EPOLLIN | select.EPOLLHUP):
        result |= pycurl.CSELECT_IN
    if mask & select.EPOLLOUT:
        result |= pycurl.CSELECT_OUT
    if mask & select.EPOLLERR:
        result |= pycurl.CSELECT_ERR
    return result


def _disk(error: OSError) -> Rejected:
    if error.errno == errno.ENOMEM:
        raise MemoryError from error  # not the disk's fault; another worker takes the orders
    return Rejected(FailureKind.DISK, error.strerror or type(error).__name__)


def _merged_ca_path(ca_file: str | None, extra_ca_file: str | None) -> str | None:
    """One file with the authorities of both. A path rather than a blob: libcurl keeps the parsed store of a *file* for all
    its connections (20 ms of CPU each otherwise). The memory file is this process's own and goes with it."""
    if extra_ca_file is None:
        return ca_file
    merged = b""
    for path in (ca_file, extra_ca_file):
        if path is not None:
            with open(path, "rb") as file:
                merged += file.read() + b"\n"
    descriptor = os.memfd_create("ca-bundle")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(merged)
    return f"/proc/self/fd/{descriptor}"


def open_segment(path: str, key: ObjectKey, segment_index: int, version: str) -> SegmentWriter:
    """The real place to land: a segment file of the block cache."""
    return SegmentWriter(path, key, segment_index, version)


def main() -> None:
    """Serves the socket whose descriptor is the one argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the daemon's business; it closes the socket
    keep_freed_memory()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        control.set_inheritable(False)
        try:
            Worker(control, open_segment).run()
        except (BrokenPipeError, ConnectionResetError):
            return  # the daemon is gone: so are those who waited


if __name__ == "__main__":
    main()
