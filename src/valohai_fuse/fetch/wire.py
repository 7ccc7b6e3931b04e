"""What the pool and a worker process say to each other over their socketpair.

A message is a length (4 bytes, big-endian) and that many bytes of msgpack: a tagged union, one tag per struct below. The
pool sends one `Configure` first, then `Order` and `Cancel`; the worker answers with one `Ready`, then for each order any
number of `Landed` and `Late` and exactly one of `Done`, `Failed` and `Cancelled`. After that one nothing of the order's answer
is written any more, but for what had landed of a staged one on its way to the disk.

URLs and headers travel over this socket only: never in argv, in an environment or in a log. That is why no struct here
has a repr that shows them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

_LENGTH: Final = struct.Struct(">I")
MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Far above any order (URLs are a few KiB): a longer message means that the stream is out of step."""


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """How a worker talks to stores; the same for all its orders."""

    connections: int
    """How many idle connections it keeps at the most."""
    connect_timeout_s: float
    stall_timeout_s: float
    ca_file: str | None
    """PEM bundle of the certificate authorities to trust; None: libcurl's own default."""
    extra_ca_file: str | None = None
    """Trusted as well."""
    has_http_proxy: bool = False
    """Whether libcurl may find a proxy for http URLs in the environment."""
    behind_bytes_max: int = 32 * 1024 * 1024
    """How much may wait in the worker to be written to the disk."""


class Order(msgspec.Struct, frozen=True, tag="order"):
    """`ports.FetchOrder`, flat. Not to be printed: it holds a signed URL.

    Names are bytes, because JSON can spell lone surrogates, which msgpack's strings cannot hold; `text` and `name_bytes`
    translate.
    """

    id: int
    url: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    stable_id: bytes
    size: int
    start: int
    stop: int
    expect_version: str | None
    segment_path: bytes
    staging_path: bytes = b""
    awaited_upto: int = 0
    late_after_s: float = 0.0
    """How long without an answer to a request that is on the wire makes it `Late`; 0: never."""

    def __repr__(self) -> str:
        return f"Order(id={self.id}, start={self.start}, stop={self.stop})"


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for this order any more; unknown ids are normal, the order may just have ended."""

    id: int


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """The order is over because of a `Cancel`."""

    id: int
    fetched_bytes: int = 0
    """What came of the body before."""


class Late(msgspec.Struct, frozen=True, tag="late"):
    """Nothing has come for this order for longer than it says, or for twice as long as when this was last said."""

    id: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker has started and takes orders."""


class Landed(msgspec.Struct, frozen=True, tag="landed"):
    """The order's bytes below `upto` (an offset in the object) are in the segment file, or staged."""

    id: int
    upto: int
    version: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """`ports.Fetched`. Implies that the whole extent has landed."""

    id: int
    version: str
    fetched_bytes: int
    first_byte_s: float
    total_s: float
    new_connection: bool
    disk_wait_s: float = 0.0
    is_kept: bool = True
    disk_error: str = ""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """`ports.FetchFailed`; `kind` is the value of a `FailureKind`."""

    id: int
    kind: str
    detail: str
    status: int | None = None
    retry_after_s: float | None = None
    server_date_s: float | None = None
    fetched_bytes: int = 0
    """What came of the body before it failed."""


ToWorker = Configure | Order | Cancel
ToPool = Ready | Landed | Late | Done | Failed | Cancelled

_encoder = msgspec.msgpack.Encoder()
to_worker_decoder: Final = msgspec.msgpack.Decoder(ToWorker)
to_pool_decoder: Final = msgspec.msgpack.Decoder(ToPool)


def name_bytes(text: str) -> bytes:
    """Any str as bytes; UTF-8 for everything that has it."""
    return text.encode("utf-8", "surrogatepass")


def text(name: bytes) -> str:
    """The reverse of `name_bytes`."""
    return name.decode("utf-8", "surrogatepass")


def frame(message: ToWorker | ToPool) -> bytes:
    """The message as it goes over the socket."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Deframer:
    """Cuts what arrives into messages; keeps the part of a message that is not complete yet."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The bodies of all messages that are complete with `data`. Must be iterated to its end before the next call.

        Raises ValueError for a length beyond MESSAGE_BYTES_MAX: the stream is out of step and of no further use.
        """
        if self._rest:
            data = self._rest + data
        view = memoryview(data)
        at = 0
        while len(data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > MESSAGE_BYTES_MAX:
                raise ValueError(f"a message of {length} bytes")
            if len(data) - at - _LENGTH.size < length:
                break
            at += _LENGTH.size
            yield view[at : at + length]
            at += length
        self._rest = data[at:]
