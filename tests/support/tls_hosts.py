"""Hosts that vouch for themselves wrongly, or whose TLS breaks on the way: what a redirect may lead to in the fault loop.

All of them serve the objects of a sandbox, so that whoever trusts one gets the right bytes and is found out by that. A break
on the way is a `Relay` in front of a host that is in order: what it does to the bytes happens below TLS, in the handshake or
in the middle of a body, as far on as its number says.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import socketserver
import struct
import threading
from types import TracebackType
from typing import Self

from valohai_fuse.sandbox import tls
from valohai_fuse.sandbox.valohai import Sandbox

PIECE_BYTES = 16 * 1024


class Break(enum.Enum):
    """What happens to the bytes from the host to its client."""

    CLOSE = "close"
    """The end, without TLS's own good-bye."""
    RESET = "reset"
    STALL = "stall"
    FLIP = "flip"
    """One byte is another one; everything behind it is passed on."""


class Relay(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of loopback until the host has said `after_bytes`; then `what` happens. A context manager;
    one thread per connection, all of which have ended at the end."""

    allow_reuse_address = True
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, port: int, what: Break, after_bytes: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.target_port, self.what, self.after_bytes = port, what, after_bytes
        self.ends: set[socket.socket] = set()
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name=f"relay-{what.value}")

    @property
    def origin(self) -> str:
        """scheme://host:port."""
        return f"https://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        with self.lock:
            for end in self.ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.server_close()
        self._thread.join()


class _Passing(socketserver.BaseRequestHandler):
    server: Relay
    request: socket.socket

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.target_port)) as host:
            with self.server.lock:
                self.server.ends |= {self.request, host}
            try:
                self._pass_on(host)
            finally:
                with self.server.lock:
                    self.server.ends -= {self.request, host}

    def _pass_on(self, host: socket.socket) -> None:
        client, left = self.request, self.server.after_bytes
        while True:
            for end in select.select([client, host], [], [])[0]:
                data = end.recv(PIECE_BYTES)
                if not data:
                    return
                if end is client:
                    host.sendall(data)
                    continue
                if not len(data) > left >= 0:
                    client.sendall(data)
                elif not self._breaks(data, left):
                    return
                left -= len(data)

    def _breaks(self, data: bytes, at: int) -> bool:
        """Sends `data`, which breaks at byte `at`; False when that was the end."""
        what, client = self.server.what, self.request
        if what is Break.FLIP:
            client.sendall(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            return True
        client.sendall(data[:at])
        if what is Break.STALL:
            while client.recv(PIECE_BYTES):
                pass  # until the client has had enough
        if what is Break.RESET:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        return False


class TlsHosts:
    """The origins by name; a context manager, to be left before the sandbox is. `authority` vouches for the good ones."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._undo = contextlib.ExitStack()
        self.authority = tls.make_authority(sandbox.root)
        self.origins: dict[str, str] = {}

    def __enter__(self) -> Self:
        root = self._sandbox.root
        tls.make_certificate(root, "expired", days=-1)
        tls.make_certificate(root, "wrong-name", valid_for="DNS:store.example,IP:127.0.0.9")
        tls.make_authority(f"{root}/stranger")
        good = self._sandbox.another_host("tls", tls.server_context(root))
        self.origins["good"] = good.origin
        for name in ("expired", "wrong-name"):
            self.origins[name] = self._sandbox.another_host(name, tls.server_context(root, name)).origin
        stranger = self._sandbox.another_host("untrusted", tls.server_context(f"{root}/stranger"))
        self.origins["untrusted"] = stranger.origin
        for name, what, after_bytes in BREAKS:
            self.origins[name] = self._undo.enter_context(Relay(good.port, what, after_bytes)).origin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()


_IN_MID_HANDSHAKE = 300
_IN_MID_BODY = 40_000
BREAKS = (
    ("garbage", Break.FLIP, 0),
    ("garbled", Break.FLIP, _IN_MID_HANDSHAKE),
    ("closed at once", Break.CLOSE, 0),
    ("closed in the handshake", Break.CLOSE, _IN_MID_HANDSHAKE),
    ("reset in the handshake", Break.RESET, _IN_MID_HANDSHAKE),
    ("stalled handshake", Break.STALL, _IN_MID_HANDSHAKE),
    ("closed in the body", Break.CLOSE, _IN_MID_BODY),
    ("reset in the body", Break.RESET, _IN_MID_BODY),
    ("stalled in the body", Break.STALL, _IN_MID_BODY),
    ("tampered body", Break.FLIP, _IN_MID_BODY),
)
