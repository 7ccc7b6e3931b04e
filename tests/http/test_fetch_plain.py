"""What is particular about plain HTTP: which requests it takes, its own sending and its kept connections."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from support.fetch_rig import CONTENT, SECRET, SIZE, landed_bytes, rig
from support.raw_store import open_store
from valohai_fuse.fetch.curl import CurlCarrier
from valohai_fuse.fetch.plain import PlainCarrier
from valohai_fuse.fetch.sockets import Sockets
from valohai_fuse.fetch.transfer import Landing, Transfer
from valohai_fuse.fetch.wire import Configure, Order
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
