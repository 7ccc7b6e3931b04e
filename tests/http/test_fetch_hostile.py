"""What a worker makes of answers that were made to upset it, and of hosts that it must not ask."""

# ruff: noqa: PT017 - both outcomes are right here, so pytest.raises, which demands one, does not fit

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pycurl
import pytest
import trio

from support.fetch_rig import SECRET, SIZE, rig
from support.raw_store import Answer, End, head, partial, plain
from valohai_fuse.fetch.curl import Exchange
from valohai_fuse.fetch.transfer import Landing, Transfer
from valohai_fuse.fetch.wire import Order
from valohai_fuse.ports import FailureKind, FetchFailed, ObjectKey


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "2852039166", "[::ffff:169.254.169.254]", "[fe80::1]", "u:p@169.254.0.1:80"]
)
def test_the_machines_own_network_is_not_asked(host: str, tmp_path: Path) -> None:
    """Neither by a URL nor by a redirect: final, and at once."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append([plain(307, b"", ("Location", f"http://{host}/latest/meta-data/"))])
            assert (await r.failure(r.order())).kind is FailureKind.FORBIDDEN
            assert (await r.failure(r.order(url=f"http://{host}/x?{SECRET}"))).kind is FailureKind.FORBIDDEN

    trio.run(scenario)


@pytest.mark.parametrize(
    ("address", "refused"),
    [
        (("169.254.169.254", 80), True),
        (("fe80::1", 80, 0, 2), True),
        (("::ffff:169.254.1.1", 80, 0, 0), True),
        (("127.0.0.1", 80), False),
    ],
)
def test_an_address_is_judged_when_it_is_connected_to(address: tuple[object, ...], refused: bool) -> None:
    """Whatever name it was resolved from: no socket, and a final failure."""
    order = Order(1, b"http://name/x", (), b"x", 10, 0, 10, None, b"/x")
    exchange = Exchange(Transfer(order, nowhere, 0.0), pycurl.Curl(), None)
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    wanted = SimpleNamespace(family=family, socktype=socket.SOCK_STREAM, protocol=0, addr=address)
    opened = exchange.open_socket(pycurl.SOCKTYPE_IPCXN, wanted)
    if isinstance(opened, socket.socket):
        opened.close()
    assert (opened == pycurl.SOCKET_BAD) is refused
    kind = exchange.broken(pycurl.E_COULDNT_CONNECT, "").kind
    assert kind is (FailureKind.FORBIDDEN if refused else FailureKind.TRANSIENT)


@pytest.mark.parametrize(
    "answer",
    [
        [partial(b"x", 0, "9" * 5000)],
        [head(206, ("Content-Range", "bytes " + "9" * 5000 + "-1/5"), ("Content-Length", "0"))],
        [plain(302, b"", ("Location", "\xe9/relative"))],
        [plain(302, b"", ("Location", "//["))],
        [plain(429, b"", ("Retry-After", "9" * 5000))],
        [head(200, ("Content-Length", "9" * 5000)), End.CLOSE],
        [plain(403, b"<Code>" + b"\xff" * 100)],
    ],
    ids=["total of 5000 digits", "start of 5000 digits", "odd Location", "no host", "Retry-After", "length", "code"],
)
def test_an_answer_that_was_made_to_upset_a_worker(answer: Answer, tmp_path: Path) -> None:
    """Thousands of digits, bytes that no URL has: the worker lives on, and others' transfers with it."""

    async def scenario() -> None:
        async with rig(tmp_path) as r:
            r.store.answers.append(answer)
            try:
                await r.fetch(r.order())  # a Location that is odd but leads back to the store is no failure
            except FetchFailed as failed:
                assert failed.kind is not FailureKind.WORKER_LOST
            (pid,) = r.pool.worker_pids
            assert (await r.fetch(r.order())).fetched_bytes == SIZE
            assert r.pool.worker_pids == (pid,)

    trio.run(scenario)


@pytest.mark.parametrize("what", ["body", "headers", "head"])
def test_a_connection_that_trickles_is_given_up(what: str, tmp_path: Path) -> None:
    """A byte or a header now and then is no progress: the order fails as a stalled one does, and a new connection serves it."""

    async def scenario() -> None:
        async with rig(tmp_path, stall_timeout_s=0.5) as r:
            whole = partial(r.store.content, 0, SIZE)
            start = whole.index(b"\r\n\r\n") + 4 if what == "body" else 0
            pieces: list[bytes | float | trio.Event | End] = [whole[:start]] if start else []
            for n in range(400):
                header = b"HTTP/1.1 206 X\r\n" if n == 0 else b"X-N: %d\r\n" % n
                pieces += [header if what == "headers" else whole[start + n : start + n + 1], 0.05]
            r.store.answers.append(pieces)
            failed = await r.failure(r.order())
            assert failed.kind is FailureKind.TRANSIENT
            assert (await r.fetch(r.order())).fetched_bytes == SIZE

    trio.run(scenario)


def nowhere(path: str, key: ObjectKey, segment_index: int, version: str) -> Landing:
    """Where nothing lands."""
    raise AssertionError(path)
