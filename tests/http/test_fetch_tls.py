"""TLS, proxies, and what must not be downgraded: over a real handshake on loopback."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from support.fetch_rig import CONTENT, SECRET, SIZE, landed_blocks, landed_bytes, rig
from support.raw_store import LOOPBACK_PEM, open_store, partial
from valohai_fuse.ports import FailureKind


def test_ca_file_is_trusted(tmp_path: Path) -> None:
    """A certificate of an authority in --ca-file is good; its connection is kept like any other."""

    async def scenario() -> None:
        async with rig(tmp_path, tls=True, ca_file=str(LOOPBACK_PEM)) as r:
            for i in range(3):
                order = r.order(name=f"n{i}")
                await r.fetch(order)
                assert landed_bytes(order) == CONTENT
            assert r.store.connections == 1

    trio.run(scenario)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_new_connections_resume_the_session(version: ssl.TLSVersion, tmp_path: Path) -> None:
    """A worker's later connections save the store's certificate (and over TLS 1.2 a round trip). Two at a time here, for
    OpenSSL gives out two tickets of TLS 1.3 per connection, each good for one."""

    async def scenario() -> None:
        async with rig(tmp_path, tls=True, tls_version=version, ca_file=str(LOOPBACK_PEM)) as r:
            await r.fetch(r.order())
            gate = trio.Event()
            r.store.answers.extend([[gate, partial(CONTENT, 0, SIZE)]] * 3)
            async with trio.open_nursery() as nursery:
                for i in range(3):
                    nursery.start_soon(r.fetch, r.order(name=f"n{i}"))
                await r.store.wait_until(lambda: len(r.store.requests) == 4)
                gate.set()
            assert (r.store.connections, r.store.resumed_connections) == (3, 2)

    trio.run(scenario)


def test_unknown_authority_is_not_trusted(tmp_path: Path) -> None:
    """TLS is verified: without --ca-file the same store is refused, and the reason is told."""

    async def scenario() -> None:
        async with rig(tmp_path, tls=True) as r:
            order = r.order()
            failed = await r.failure(order)
            assert failed.kind is FailureKind.TRANSIENT
            assert "certificate" in failed.detail
            assert SECRET not in str(failed)
            assert r.store.requests == []
            assert landed_blocks(order) == {}

    trio.run(scenario)


def test_wrong_name_is_not_trusted(tmp_path: Path) -> None:
    """A good certificate for another host is not good."""

    async def scenario() -> None:
        async with rig(tmp_path, tls=True, ca_file=str(LOOPBACK_PEM)) as r:
            failed = await r.failure(r.order(url=r.store.url.replace("127.0.0.1", "127.0.0.2") + "/x"))
            assert failed.kind is FailureKind.TRANSIENT
            assert r.store.requests == []

    trio.run(scenario)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_redirect_from_https_is_not_followed_down(scheme: str, tmp_path: Path) -> None:
    """What was asked for over TLS does not come over plain HTTP."""

    async def scenario() -> None:
        async with rig(tmp_path, tls=True, ca_file=str(LOOPBACK_PEM)) as r, open_store(CONTENT) as plain:
            where = plain.url.replace("http:", f"{scheme}:")
            r.store.answers.append([f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {where}/x\r\n\r\n".encode()])
            assert (await r.failure(r.order())).kind is FailureKind.FORBIDDEN
            assert plain.requests == []

    trio.run(scenario)


def test_proxy_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`http_proxy` is honoured as curl does it."""

    async def scenario() -> None:
        async with open_store(CONTENT) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url)
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            async with rig(tmp_path) as r:
                order = r.order(url="http://store.invalid/object?q=%2f")
                await r.fetch(order)
                assert landed_bytes(order) == CONTENT
                assert proxy.requests[0].target == b"http://store.invalid/object?q=%2f"
                assert r.store.requests == []

    trio.run(scenario)


def test_proxy_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's refusal to connect is not the store's: renewing the URL would not cure it."""

    async def scenario() -> None:
        async with open_store(CONTENT) as proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            proxy.answers.append([b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"])
            async with rig(tmp_path) as r:
                failed = await r.failure(r.order(url=f"https://store.invalid/object?{SECRET}"))
                assert failed.kind is FailureKind.TRANSIENT
                assert failed.detail == "the proxy answered HTTP 403"
                assert failed.status is None

    trio.run(scenario)
