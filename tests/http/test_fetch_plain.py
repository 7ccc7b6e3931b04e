"""What is particular about plain HTTP: which requests it takes, its own sending and its kept connections."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pycurl
import pytest
import trio

from support.fetch_rig import CONTENT, SECRET, SIZE, landed_bytes, rig
from support.raw_store import open_store
from valohai_fuse.fetch import plain
from valohai_fuse.fetch.connections import READY, SPARES_EVERY_S, Connection, Connections
from valohai_fuse.fetch.curl import CurlCarrier, Exchange
from valohai_fuse.fetch.plain import SPARES_FROM_BYTES, PlainCarrier
from valohai_fuse.fetch.sockets import WINDOW_BYTES, Sockets
from valohai_fuse.fetch.transfer import Landing, Transfer
from valohai_fuse.fetch.wire import Configure, Order
from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.ports import ObjectKey


def taken(url: str, *headers: tuple[bytes, bytes], has_http_proxy: bool = False) -> bool:
    """Whether an order for `url` goes over plain HTTP."""
    sockets = Sockets()
    carrier = PlainCarrier(sockets, CurlCarrier(sockets))
    carrier.configure(Configure(1, 1, 1, None, has_http_proxy=has_http_proxy))
    return carrier.takes(Transfer(Order(1, url.encode(), headers, b"x", 10, 0, 10, None, b"/x"), nowhere, 0.0))


def nowhere(path: str, key: ObjectKey, segment_index: int, version: str) -> Landing:
    """Where nothing lands."""
    raise AssertionError(path)


@pytest.mark.parametrize(
    ("url", "is_taken"),
    [
        ("http://store/x", True),
        ("HTTP://Store.Example.com:8080?x", True),
        ("http://127.0.0.1:80/x", True),
        ("http://[::1]:9000/x", True),
        ("https://store/x", False),
        ("http://u:p@store/x", False),
        ("http://b\xfccher.example/x", False),
        ("http://[2001:db8::1%25eth0]/x", False),
        ("http://store:123456/x", False),
        ("http://st%6fre/x", False),
    ],
)
def test_what_is_plain_enough(url: str, is_taken: bool) -> None:
    """A plain host, with or without a port; everything else is libcurl's, and so is everything where a proxy is configured."""
    assert taken(url) is is_taken
    assert taken(url, (b"X-Amz-Meta", b"x")) is is_taken
    assert not taken(url, (b"Connection", b"close"))
    assert not taken(url, has_http_proxy=True)


def test_a_request_that_does_not_fit_the_socket(tmp_path: Path) -> None:
    """It is sent as the socket takes it, and everything else goes on meanwhile."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            long = "x" * 3_500_000
            order = r.order(headers=(("X-Long", long),))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.fetch, order)
                nursery.start_soon(r.fetch, r.order(name="other"))
            assert landed_bytes(order) == CONTENT
            assert sorted(len(request.header("X-Long") or "") for request in r.store.requests) == [0, len(long)]

    trio.run(scenario)


def test_the_lease_may_say_who_asks(tmp_path: Path) -> None:
    """Its User-Agent is sent instead of ours, not beside it."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            await r.fetch(r.order(headers=(("user-agent", "someone"),)))
            (request,) = r.store.requests
            assert request.head.lower().count(b"user-agent") == 1
            assert request.header("User-Agent") == "someone"
            assert request.header("Host") == r.store.url.removeprefix("http://")

    trio.run(scenario)


def test_kept_connections_are_bounded(tmp_path: Path) -> None:
    """As many as requests may be under way, over all stores; the one that was not used for longest goes."""

    async def scenario() -> None:
        async with rig(tmp_path, connections=2) as r, open_store(CONTENT) as second, open_store(CONTENT) as third:
            for store in (r.store, second, r.store, third):
                await r.fetch(r.order(url=f"{store.url}/object?{SECRET}"))
            await second.wait_until(lambda: second.open_connections == 0)
            await r.fetch(r.order())
            assert (r.store.connections, second.connections, third.connections) == (1, 1, 1)
            assert r.store.open_connections == third.open_connections == 1

    trio.run(scenario)


def test_credentials_in_the_url(tmp_path: Path) -> None:
    """Are libcurl's business, and reach the store."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            url = r.store.url.replace("//", "//user:word@")
            assert (await r.fetch(r.order(url=f"{url}/object?{SECRET}"))).fetched_bytes == SIZE
            (request,) = r.store.requests
            assert request.header("Authorization") == "Basic dXNlcjp3b3Jk"

    trio.run(scenario)


# --- several at once ---------------------------------------------------------------------------------------------------


def test_connections_are_ready_when_more_of_a_large_object_is_asked_for(tmp_path: Path) -> None:
    """They are opened while its first bytes are on their way, used by what is asked for next, and counted when they are."""
    content = bytes(SPARES_FROM_BYTES)

    async def scenario() -> None:
        async with rig(tmp_path, content) as r:
            await r.fetch(r.order(0, BLOCK_BYTES))
            await r.store.wait_until(lambda: r.store.connections == READY)
            assert r.metrics.counters["connections_opened"] == 1
            async with trio.open_nursery() as nursery:
                for block in range(1, READY):
                    nursery.start_soon(r.fetch, r.order(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES))
            assert r.store.connections == READY
            assert 1 < r.metrics.counters["connections_opened"] <= READY

    trio.run(scenario)


def test_a_small_object_takes_one_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, bytes(SPARES_FROM_BYTES - 1)) as r:
            for block in range(2):
                await r.fetch(r.order(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES))
            assert r.store.connections == 1

    trio.run(scenario)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        yield server


def connected(connections: Connections, server: socket.socket) -> Connection:
    """A connection to `server`, as a carrier has made it."""
    sock = socket.create_connection(server.getsockname())
    sock.setblocking(False)
    server.accept()[0].close()
    return connections.add(b"http://store", sock)


def filled(client: socket.socket, sender: socket.socket) -> int:
    """How many bytes lie at `client` when no more come, because it does not receive."""
    sender.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        sender.sendall(bytes(64 * WINDOW_BYTES))
    return int.from_bytes(fcntl.ioctl(client, termios.FIONREAD, bytes(4)), sys.byteorder)


def by_libcurl(server: socket.socket) -> socket.socket:
    """A connection as libcurl makes one for us."""
    order = Order(1, b"http://store/", (), b"x", 10, 0, 10, None, b"/x")
    address = SimpleNamespace(family=socket.AF_INET, socktype=socket.SOCK_STREAM, protocol=0, addr=server.getsockname())
    made = Exchange(Transfer(order, nowhere, 0.0), pycurl.Curl(), None).open_socket(pycurl.SOCKTYPE_IPCXN, address)
    assert isinstance(made, socket.socket)
    made.connect(server.getsockname())
    return made


def as_spare(server: socket.socket) -> socket.socket:
    """One of those that are opened before they are needed."""
    sockets = Sockets()
    connections = PlainCarrier(sockets, CurlCarrier(sockets))._connections
    first = connected(connections, server)
    connections.open_spares(first, time.monotonic())
    spare, *others = [connection.sock for connection in connections._by_fd.values() if connection is not first]
    for sock in (first.sock, *others):
        sock.close()
    return spare


@pytest.mark.parametrize("make", [by_libcurl, as_spare])
def test_a_new_connection_has_room_before_anybody_receives(
    make: Callable[[socket.socket], socket.socket], server: socket.socket
) -> None:
    """The one whose turn comes last is filled meanwhile, not held up at the kernel's first 64 KiB; its room still grows."""
    with socket.create_connection(server.getsockname()) as ordinary, server.accept()[0] as sender:
        ordinary_bytes = filled(ordinary, sender)
    with make(server) as wide, server.accept()[0] as sender:
        assert wide.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1  # it wakes for the first byte
        room_bytes = filled(wide, sender)
        assert room_bytes >= 0.9 * WINDOW_BYTES
        assert room_bytes > 3 * ordinary_bytes
        wide.setblocking(False)
        for _ in range(40):
            with contextlib.suppress(BlockingIOError):
                while wide.recv(WINDOW_BYTES):
                    pass
            sender.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                sender.sendall(bytes(8 * WINDOW_BYTES))
        assert filled(wide, sender) > 1.5 * room_bytes


def test_a_store_that_wants_no_spare_connections_is_left_alone(server: socket.socket) -> None:
    """What it refuses or closes is gone without a word, and is not tried again at once."""
    sockets = Sockets()
    carrier = PlainCarrier(sockets, CurlCarrier(sockets))
    connections = carrier._connections
    first = connected(connections, server)
    now_s = time.monotonic()
    connections.open_spares(first, now_s)
    sockets.wait(1)
    for _ in range(READY - 1):
        server.accept()[0].close()
    while len(connections._by_fd) > 0:  # `first`, which the server has closed as well, and the spares
        sockets.wait(1)
        carrier.receive()
    assert connections.take(b"http://store") is None

    second = connected(connections, server)
    connections.open_spares(second, now_s + SPARES_EVERY_S - 0.1)
    assert list(connections._by_fd.values()) == [second]
    server.close()
    connections.open_spares(second, now_s + SPARES_EVERY_S)
    for _ in range(3):
        sockets.wait(0.01)
    assert list(connections._by_fd.values()) == [second]
    connections.close(second)


def test_spare_connections_do_not_delay_the_request(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at the store before the first of them is begun: somebody waits for its answer, and nobody yet for them."""
    sockets = Sockets()
    carrier = PlainCarrier(sockets, CurlCarrier(sockets))
    sock = socket.create_connection(server.getsockname())
    sock.setblocking(False)
    with server.accept()[0] as theirs:
        theirs.settimeout(0.1)
        heard: list[bytes] = []
        monkeypatch.setattr(Connections, "open_spares", lambda *_: heard.append(theirs.recv(65536)))
        url = b"http://127.0.0.1:%d/x" % server.getsockname()[1]
        transfer = Transfer(Order(1, url, (), b"x", SPARES_FROM_BYTES, 0, 1, None, b"/x"), nowhere, 0.0)
        carrier._connected(transfer, sock)
        assert [request[:8] for request in heard] == [b"GET /x H"]
        carrier.release(transfer)


class Sink:
    """A landing that takes everything."""

    def land(self, offset: int, data: memoryview) -> None: ...

    def map(self, start: int, stop: int) -> None: ...

    def put(self, data: bytes | memoryview) -> None: ...

    def room(self, most: int) -> memoryview:
        raise AssertionError("in memory")

    def took(self, data: memoryview) -> None: ...

    def vouch(self, offset: int, stop: int) -> None: ...

    def give_up(self) -> None: ...

    def copy_out(self, path: str, key: ObjectKey, version: str, start: int, stop: int) -> None: ...

    def close(self) -> None: ...


def test_what_somebody_waits_for_is_received_first_then_what_was_asked_for_first(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much has come for the others: here there is time for one buffer a turn."""
    monkeypatch.setattr(plain, "_RECEIVES_MAX", 1)
    size = 4 * BLOCK_BYTES
    sockets = Sockets()
    carrier = PlainCarrier(sockets, CurlCarrier(sockets))
    url = b"http://127.0.0.1:%d/x" % server.getsockname()[1]
    transfers = {}
    theirs = []
    for number, awaited_upto in ((1, 0), (2, 0), (3, BLOCK_BYTES)):
        order = Order(number, url, (), b"x", size, 0, size, None, b"/x", awaited_upto=awaited_upto)
        transfers[number] = Transfer(order, lambda *_: Sink(), time.monotonic())
        sock = socket.create_connection(server.getsockname())
        sock.setblocking(False)
        carrier._connected(transfers[number], sock)
        theirs.append(server.accept()[0])
    head = b'HTTP/1.1 206 Partial Content\r\nETag: "v"\r\nContent-Length: %d\r\n' % size
    head += b"Content-Range: bytes 0-%d/%d\r\n\r\n" % (size - 1, size)
    for sock in theirs:
        sock.recv(65536)
        sock.sendall(head + bytes(BLOCK_BYTES // 2))

    began: list[int] = []
    while len(began) < 3:
        sockets.wait(1)
        carrier.receive()
        began += [number for number, transfer in transfers.items() if transfer.head and number not in began]
    assert began == [3, 1, 2]
    for transfer in transfers.values():
        carrier.release(transfer)
    for sock in theirs:
        sock.close()
