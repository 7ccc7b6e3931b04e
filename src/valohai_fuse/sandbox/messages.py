"""What goes between a server of the sandbox and its handler: requests, responses, and the record of both.

A `Response` says more than HTTP can: where the body is cut, what happens then, how slowly it comes. Invariant: an
`Exchange` never holds a query, a token or a header that is secret, for it is printed when a test fails.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from valohai_fuse.sandbox.content import Content, InMemory

_NO_CONTENT = InMemory(b"", "empty")


class Ending(enum.Enum):
    """What follows the last byte that is sent."""

    KEEP_ALIVE = "keep-alive"
    CLOSE = "close"
    RESET = "reset"
    STALL = "stall"  # nothing more comes, and the connection stays open


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came. Header names are lower case; of repeated ones the last counts."""

    method: str
    target: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    connection_id: int
    nth_on_connection: int
    """1 for the first request of its connection."""

    @property
    def path(self) -> str:
        """The target's path, still percent-encoded, without the query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The raw query, "" when there is none."""
        return self.target.partition("?")[2]


@dataclass(slots=True)
class Response:
    """What goes onto the wire. Faults change it between the handler's answer and the sending."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: Content = _NO_CONTENT
    start: int = 0
    stop: int = 0
    """The bytes [start, stop) of `content` are the body."""
    trailing: bytes = b""
    """Sent behind the body, beyond what Content-Length says."""
    chunked: bool = False
    delay_s: float = 0.0
    """Before the first byte of the head."""
    silent: bool = False
    """Nothing is sent, not even a head; `ending` happens at once."""
    cut_after_bytes: int | None = None
    """So many bytes of the body are sent, then `at_cut` is called and `ending` happens. None: the whole body."""
    at_cut: Callable[[], None] | None = None
    resume_after_s: float | None = None
    """With a cut: wait so long, then send the rest after all."""
    ending: Ending = Ending.KEEP_ALIVE
    rate_bytes_per_s: float | None = None
    piece_bytes: int | None = None
    piece_pause_s: float = 0.0
    """Drip: pause so long before each piece of at most `piece_bytes`."""


def text_response(status: int, body: str | bytes, content_type: str = "text/plain; charset=utf-8") -> Response:
    """A short answer with its length."""
    data = body.encode() if isinstance(body, str) else body
    headers = {"Content-Type": content_type, "Content-Length": str(len(data))}
    return Response(status, headers, InMemory(data), 0, len(data))


@dataclass(slots=True)
class Exchange:
    """A request and what became of it. Holds no query and no secret: `path` is cut, Authorization is only noted."""

    server: str
    method: str
    path: str
    """Decoded, without the query; for the store the object key."""
    range: str | None
    headers: dict[str, str] = field(repr=False)
    connection_id: int
    at_s: float
    """time.monotonic() when the request had been read."""
    status: int = 0
    sent_bytes: int = 0
    """Bytes of the body given to the kernel; a client may have received fewer when it hung up."""
    ended_at_s: float | None = None
    fault: str = ""
    carried_secret: bool = False
    """A secret that is none of this server's business was in the request."""
