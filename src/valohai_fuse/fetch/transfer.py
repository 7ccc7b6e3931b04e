"""One order on its way through a worker: what has arrived, what of it is landed, and how it ends.

A carrier (`curl`, `plain`) brings the answer: it appends header lines and body chunks to `head_lines` and `incoming`, or hands
over a head and what it has just received (`receive`). The loop calls `advance` after the socket events, and everything is
decided there. What a reader waits for is landed as soon as it is there; otherwise landing waits for LAND_BYTES or
LAND_INTERVAL_S, whichever comes first, because each landing costs two writes here and a wake-up in the daemon.

Invariants: nothing is landed before `response.accept` said yes; bytes land in ascending order, each once, in whole blocks
(the object's last one may be short); no byte outside the order's extent lands. Must not know: sockets, who waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from valohai_fuse.fetch import location, response, waits
from valohai_fuse.fetch.response import Body, Head, Rejected
from valohai_fuse.fetch.wire import Failed, Landed, Order, text
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES
from valohai_fuse.model.segment import segment_bytes
from valohai_fuse.ports import FailureKind, ObjectKey

LAND_BYTES: Final = 256 * 1024
LAND_INTERVAL_S: Final = 0.003
PATIENT_INTERVAL_S: Final = 0.02
"""The same for an order that nobody waits for (yet)."""
PROGRESS_BYTES: Final = 16 * 1024
"""So much must come within the stall timeout to count as progress (550 B/s by default): a connection that trickles is as good
as dead, and a reader would wait for it until its deadline while a new connection serves."""
CONNECTING_PATIENCE: Final = 3
"""How many times as long an answer may take on a new connection: TCP and TLS are a round trip each before the request's."""
LATE_BODY_S: Final = 0.5
"""A body in which nothing came for this long is late at the soonest: below, it is a lost packet, which TCP repeats."""
ERROR_BODY_BYTES: Final = 4096
"""How much of an error's body is looked at."""
ERROR_BODY_BYTES_MAX: Final = 64 * 1024
"""How much of it is read so that the connection can be kept."""


class Landing(Protocol):
    """`store.landing.SegmentWriter`, as far as it is needed here."""

    def land(self, offset: int, data: memoryview) -> None:
        """Whole blocks at `offset` of the object. Raises OSError."""
        ...

    def map(self, start: int, stop: int) -> None:
        """Makes [start, stop) of memory ready for `put`. Raises OSError."""
        ...

    def put(self, data: bytes | memoryview) -> None:
        """The next bytes to their place in memory, in any cut."""
        ...

    def room(self, most: int) -> memoryview:
        """Where the next bytes belong in memory, to be written there and told by `took`."""
        ...

    def took(self, data: memoryview) -> None:
        """So much has come into `room`."""
        ...

    def vouch(self, offset: int, stop: int) -> None:
        """The whole blocks that were put there are final. Raises OSError."""
        ...

    def give_up(self) -> None:
        """The order has ended badly. Raises OSError."""
        ...

    def copy_out(self, path: str, key: ObjectKey, version: str, start: int, stop: int) -> None:
        """Writes what has landed in memory to the segment file at `path`. Raises OSError."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Staged:
    """Bytes of an order that lie in memory and are to be written to their file. Has to be closed, by `write` at the latest."""

    __slots__ = ("_landing", "_order", "_stop", "_version", "segment", "segment_bytes")

    def __init__(self, order: Order, landing: Landing, version: str, stop: int) -> None:
        self._order = order
        self._landing = landing
        self._version = version
        self._stop = stop
        self.segment = order.segment_path
        self.segment_bytes = segment_bytes(order.size, order.start // SEGMENT_BYTES)

    def write(self) -> None:
        """Writes them, in any thread, and closes. Raises OSError."""
        order = self._order
        key = ObjectKey(text(order.stable_id), order.size)
        try:
            self._landing.copy_out(os.fsdecode(order.segment_path), key, self._version, order.start, self._stop)
        finally:
            self.close()

    def close(self) -> None:
        """Gives descriptor and mapping back. Raises OSError; idempotent."""
        self._landing.close()


OpenLanding = Callable[[str, ObjectKey, int, str], Landing]
"""(path, key, segment index, version) -> where the blocks go. Raises OSError."""

_OWN_HEADERS: Final = frozenset({b"range", b"accept-encoding"})
"""Ours whatever the lease says."""


class Transfer:
    """See the module's text."""

    def __init__(self, order: Order, open_landing: OpenLanding, now_s: float) -> None:
        """Raises Rejected where the order cannot even be sent."""
        self.order = order
        self.url = location.checked(order.url)
        self.fetched_bytes = 0
        """Of all bodies, redirects' included."""
        self.connections_new = 0
        self.first_byte_s = 0.0
        """From sending the request to the first byte of the answer, without connecting."""
        self.is_connecting = False
        """Whether a new connection had to be made for this answer."""
        self.head_lines: list[bytes] = []
        """Of the answer, as they come; interim answers' before it."""
        self.incoming: list[bytes] = []
        """Of the body, what has come and was not looked at."""
        self.disk_wait_s = 0.0
        """How long landing stood still, neither computing nor waiting for a processor."""
        self.head: Head | None = None
        self.progress_at_s = now_s
        """When the store last began to answer or sent PROGRESS_BYTES of a body; a stall is counted from here."""
        self._progress_bytes = 0
        """Of bodies, as they stood then."""
        self._heard_at_s = now_s
        """When anything last came; being late is counted from here."""
        self._late_patience = 1
        self._open_landing = open_landing
        self._landing: Landing | None = None
        self._started_at_s = now_s
        self._landed_at_s = 0.0
        self._interval_s = LAND_INTERVAL_S if order.awaited_upto else PATIENT_INTERVAL_S
        self._lease_origin = location.origin(self.url)
        self._redirects = 0
        self._answered = False
        """Whether anything has come of the answer; a header now and then is no progress."""
        self._came = False
        """Whether anything has come since `advance` looked."""
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._landed_upto = order.start
        self._body: Body | None = None
        self._body_bytes = 0
        self._skip_left_bytes = 0
        self._error_body = b""

    # --- the request --------------------------------------------------------------------------------------------------

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the request for `url` says besides its target.

        Raises Rejected for a lease header that would break out of its line.
        """
        order = self.order
        headers = [(b"Range", b"bytes=%d-%d" % (order.start, order.stop - 1)), (b"Accept-Encoding", b"identity")]
        if location.origin(self.url) == self._lease_origin:
            for name, value in order.headers:
                if any(c in name + value for c in b"\r\n\0") or not name or b":" in name:
                    raise Rejected(FailureKind.FORBIDDEN, "a header of the lease is not one line")
                if name.lower() not in _OWN_HEADERS:
                    headers.append((name, value))
        return headers

    def redirect(self) -> bool:
        """After an answer has ended: whether it was a redirect that is to be followed; `url` is its target then.

        Raises Rejected for a redirect that must not be followed, or one too many.
        """
        head = self._read_head()
        if head.status not in response.REDIRECTS or "location" not in head.headers:
            return False
        self._redirects += 1
        if self._redirects > location.REDIRECTS_MAX:
            raise Rejected(FailureKind.PROTOCOL, f"more than {location.REDIRECTS_MAX} redirects")
        self.url = location.followed(self.url, head.headers["location"].encode("latin-1"))
        self.head = None
        self._answered = self._came = False
        self.is_connecting = False
        self.head_lines.clear()
        self.incoming.clear()
        self._error_body = b""
        self._body_bytes = 0
        return True

    # --- the answer ---------------------------------------------------------------------------------------------------

    def advance(self, now_s: float) -> Landed | None:
        """Takes what arrived, lands what is due. Returns how far the order has come, if it came further.

        Raises Rejected; OSError from the landing.
        """
        answered = not self._answered and bool(self.head_lines or self.head)
        if self.incoming or answered or self._came:
            self._answered, self._came = True, False
            self._heard_at_s, self._late_patience = now_s, 1
            self._take()
            if answered or self.fetched_bytes - self._progress_bytes >= PROGRESS_BYTES or self.complete:
                self.progress_at_s, self._progress_bytes = now_s, self.fetched_bytes
        due = self._due_bytes()
        if due == 0:
            return None
        upto = self._landed_upto + due
        satisfies = upto == self.order.stop or (self.is_awaited and self.order.awaited_upto <= upto)
        if satisfies or due >= LAND_BYTES or now_s - self._landed_at_s >= self._interval_s:
            return self._land(due, now_s)
        return None

    @property
    def land_at_s(self) -> float | None:
        """When `advance` is to be called even if nothing arrives; None: no need."""
        return self._landed_at_s + self._interval_s if self._due_bytes() else None

    def look_at_s(self, stall_timeout_s: float) -> float:
        """Until when it is neither late nor stalled, whatever comes or does not."""
        return min(self.progress_at_s + stall_timeout_s, self._late_at_s())

    def take_late(self, now_s: float) -> bool:
        """Whether the pool is to hear that nothing comes; after it was said, not before twice the time has passed."""
        if now_s < self._late_at_s():
            return False
        self._late_patience *= 2
        return True

    def _late_at_s(self) -> float:
        if not self.order.late_after_s or self.complete:
            return float("inf")
        patience_s = self.order.late_after_s
        if self._answered:
            patience_s = max(patience_s, LATE_BODY_S)
        elif self.is_connecting:
            patience_s *= CONNECTING_PATIENCE
        return self._heard_at_s + patience_s * self._late_patience

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waited, when it was ordered, for what has not landed yet."""
        return self._landed_upto < self.order.awaited_upto

    @property
    def complete(self) -> bool:
        """Whether the whole extent has landed; the rest of the body, if any, is of no interest."""
        return self._landed_upto == self.order.stop

    @property
    def surplus(self) -> bool:
        """Whether the extent has landed and more of the body is to come that nobody wants."""
        return self.complete and self._body is not None and self._body_bytes < self._body.total_bytes

    def finish(self, now_s: float) -> None:
        """The body has ended as HTTP has it. Lands the rest; raises Rejected if it is not the whole of it."""
        self._take()
        if self._body is None and not self._body_bytes:
            self._judge()
        body = self._body
        if body is None:
            head = self._read_head()
            code = response.error_code(self._error_body)
            raise Rejected(response.status_kind(head.status), f"HTTP {head.status}" + (f" {code}" if code else ""))
        if self._body_bytes != body.total_bytes:
            kind = FailureKind.CHANGED if body.hold else FailureKind.TRANSIENT
            raise Rejected(kind, f"the body ended after {self._body_bytes} of {body.total_bytes} bytes")
        body.hold = False
        due = self._due_bytes()
        if due:
            self._land(due, now_s)

    def salvage(self, now_s: float) -> Landed | None:
        """Lands the whole blocks that came before a connection broke, so that they need not be fetched again.

        Raises Rejected, OSError.
        """
        self._take()
        due = self._due_bytes()
        return self._land(due, now_s) if due else None

    def cut_off(self, rejected: Rejected) -> Rejected:
        """What it means that the answer did not end for the reason given: an error status that came before counts for more."""
        if (self.head or self.head_lines) and (status := self._read_head().status) >= 400:
            return Rejected(response.status_kind(status), f"HTTP {status}")
        return rejected

    def failed(self, rejected: Rejected) -> Failed:
        """The message that ends this order."""
        head = Head(self.head_lines) if self.head_lines else self.head
        return Failed(
            id=self.order.id,
            kind=rejected.kind.value,
            detail=rejected.detail,
            status=head.status if head and head.status else None,
            retry_after_s=head.retry_after_s(time.time()) if head else None,
            server_date_s=head.date_s if head else None,
            fetched_bytes=self.fetched_bytes,
        )

    @staticmethod
    def unsent(order: Order, rejected: Rejected) -> Failed:
        """The same for an order that could not be sent at all."""
        return Failed(id=order.id, kind=rejected.kind.value, detail=rejected.detail)

    @property
    def version(self) -> str:
        """The ETag of the accepted answer."""
        return self._body.version if self._body else ""

    def total_s(self, now_s: float) -> float:
        """Since the order arrived here."""
        return now_s - self._started_at_s

    def take_staged(self) -> Staged | None:
        """What has landed of a staged order, if anything has; the transfer lands nothing after that."""
        order, landing = self.order, self._landing
        if not order.staging_path or landing is None or self._landed_upto == order.start:
            return None
        self._landing = None
        return Staged(order, landing, self.version, self._landed_upto)

    def give_up(self) -> None:
        """The order has ended badly, and so has its use of memory. Raises OSError."""
        if self._landing is not None:
            self._landing.give_up()

    def close(self) -> None:
        """Lets go of the segment file. Raises OSError (network file systems write late); a second call does nothing."""
        landing, self._landing = self._landing, None
        if landing is not None:
            landing.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _read_head(self) -> Head:
        if self.head is None:
            self.head = Head(self.head_lines)
        return self.head

    def _judge(self) -> None:
        head = self._read_head()
        if head.status in {200, 206}:
            self._body = response.accept(self.order, head)
            self._skip_left_bytes = self._body.skip_bytes
            self._landed_at_s = time.monotonic()

    def room(self, most: int) -> memoryview | None:
        """Where the next `most` bytes of the body belong, or as many as are wanted: to be received there and told by `took`. None:
        they are to be handed over to `receive`."""
        body, landing = self._body, self._landing
        if body is None or landing is None or not self.order.staging_path or self._skip_left_bytes:
            return None
        wanted = self.order.stop - self._landed_upto - self._pending_bytes
        most = min(most, wanted, body.total_bytes - self._body_bytes)
        return landing.room(most) if most > 0 else None

    def took(self, data: memoryview) -> None:
        """So much of the body has come into `room`."""
        assert self._landing is not None, "it has given room"
        self._came = True
        self.fetched_bytes += len(data)
        self._body_bytes += len(data)
        self._pending_bytes += len(data)
        self._landing.took(data)

    def receive(self, pieces: Sequence[bytes | memoryview]) -> None:
        """The next bytes of the body, which may be written over afterwards. Raises Rejected; OSError from the landing."""
        self._came = True
        if self._body is None:
            self._judge()
        arrived_bytes = sum(map(len, pieces))
        self.fetched_bytes += arrived_bytes
        self._body_bytes += arrived_bytes
        body = self._body
        if body is None:
            self._take_error(pieces)
            return
        if self._body_bytes > body.total_bytes:
            kind = FailureKind.CHANGED if body.hold else FailureKind.PROTOCOL
            raise Rejected(kind, f"the body has more than {body.total_bytes} bytes")
        if self._skip_left_bytes:
            pieces, arrived_bytes = self._skip(pieces, arrived_bytes)
        surplus_bytes = self._landed_upto + self._pending_bytes + arrived_bytes - self.order.stop
        if surplus_bytes > 0:  # only in an answer that is the whole object
            joined = b"".join(pieces)
            pieces = [joined[: max(0, arrived_bytes - surplus_bytes)]]
            arrived_bytes = len(pieces[0])
        if self.order.staging_path:
            self._put(pieces)
        else:
            self._pending += map(bytes, pieces)  # which copies nothing of what is bytes
        self._pending_bytes += arrived_bytes

    def _take(self) -> None:
        """The same for what a carrier has left in `incoming`."""
        if self.incoming:
            chunks = self.incoming.copy()
            self.incoming.clear()
            self.receive(chunks)
            self._came = False

    def _take_error(self, pieces: Sequence[bytes | memoryview]) -> None:
        if len(self._error_body) < ERROR_BODY_BYTES:
            self._error_body = (self._error_body + b"".join(pieces))[:ERROR_BODY_BYTES]
        if self._body_bytes > ERROR_BODY_BYTES_MAX:
            status = self._read_head().status
            raise Rejected(response.status_kind(status), f"HTTP {status} with a long body")

    def _skip(self, pieces: Sequence[bytes | memoryview], arrived_bytes: int) -> tuple[list[bytes], int]:
        skipped = min(self._skip_left_bytes, arrived_bytes)
        self._skip_left_bytes -= skipped
        if skipped == arrived_bytes:
            return [], 0
        return [b"".join(pieces)[skipped:]], arrived_bytes - skipped

    def _due_bytes(self) -> int:
        """How many of the pending bytes could be landed: whole blocks, or everything up to the extent's end."""
        if self._body is None or self._body.hold:
            return 0
        if self._landed_upto + self._pending_bytes == self.order.stop:
            return self._pending_bytes
        return self._pending_bytes - self._pending_bytes % BLOCK_BYTES

    def _land(self, due_bytes: int, now_s: float) -> Landed:
        order = self.order
        landing = self._opened_landing()
        self._pending_bytes -= due_bytes
        if order.staging_path:
            landing.vouch(self._landed_upto, self._landed_upto + due_bytes)
        else:
            waited_s = waits.waited_s()
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            landing.land(self._landed_upto, memoryview(data)[:due_bytes])
            self.disk_wait_s += waits.waited_s() - waited_s
            self._pending = [data[due_bytes:]] if self._pending_bytes else []
        self._landed_upto += due_bytes
        self._landed_at_s = now_s
        return Landed(id=order.id, upto=self._landed_upto, version=self.version)

    def _opened_landing(self) -> Landing:
        if self._landing is None:
            order = self.order
            path = os.fsdecode(order.staging_path or order.segment_path)
            key = ObjectKey(text(order.stable_id), order.size)
            try:
                self._landing = self._open_landing(path, key, order.start // SEGMENT_BYTES, self.version)
            except ValueError:  # the format bounds what it stores
                raise Rejected(FailureKind.PROTOCOL, "an ETag too long to keep") from None
            if order.staging_path:
                self._landing.map(order.start, order.stop)
        return self._landing

    def _put(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Straight to their place in memory, each byte copied once."""
        landing = self._opened_landing()
        for piece in pieces:
            landing.put(piece)
