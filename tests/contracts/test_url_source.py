"""What a UrlSource promises, on the fake of the engine tests and on the real one over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import pytest
import trio

from support.fake_source import FakeSource, file_ref
from support.scripted_http import Request, ScriptedHttp, response
from valohai_fuse.errors import AccessRefusedError, StoreUnavailableError, ValohaiFuseError
from valohai_fuse.model.urls import supported
from valohai_fuse.ports import UrlSource
from valohai_fuse.sources.api_file import ApiRequest
from valohai_fuse.sources.valohai_api import ValohaiApi

NAMES = ["a.bin", "dir/b c.bin"]


class World(Protocol):
    """A source, and how to make it misbehave."""

    source: UrlSource

    def refuse(self) -> None:
        """The token is dead from now on."""

    def go_down(self) -> None:
        """No answer from now on."""

    def come_back(self) -> None:
        """All is well again."""


class FakeWorld:
    """The fake fails as often as it is asked."""

    def __init__(self) -> None:
        self.fake = FakeSource(time.time, left_out={"missing.bin"})
        self.source: UrlSource = self.fake

    def refuse(self) -> None:
        self.fake.fail([AccessRefusedError("no")] * 9)

    def go_down(self) -> None:
        self.fake.fail([StoreUnavailableError("down")] * 9)

    def come_back(self) -> None:
        self.fake.failures.clear()


class RealWorld:
    """Valohai over HTTP: signs anew on each POST."""

    def __init__(self, source: UrlSource) -> None:
        self.source = source
        self.status, self.posts = 200, 0

    def answer(self, request: Request) -> bytes:
        self.posts += 1
        files = [
            {
                "filename": name,
                "original_uri": f"datum://{name}",
                "input_id": "i-1",
                "url": f"https://h/k?sig={self.posts}",
            }
            for name in NAMES
        ]
        return response(self.status, json.dumps([{"name": "data", "files": files}]))

    def refuse(self) -> None:
        self.status = 401

    def go_down(self) -> None:
        self.status = 503

    def come_back(self) -> None:
        self.status = 200


@asynccontextmanager
async def fake_world() -> AsyncIterator[World]:
    """The engine tests' source."""
    yield FakeWorld()


@asynccontextmanager
async def real_world() -> AsyncIterator[World]:
    """The daemon's source."""
    worlds: list[RealWorld] = []
    with ScriptedHttp(lambda request: worlds[0].answer(request)) as server:  # noqa: PLW0108 - the world needs the server first
        request = ApiRequest("POST", f"{server.url}/x?execution=1", ())
        async with ValohaiApi(request, clock=time.time, budget_s=0.05, delay_base_s=0.01) as api:
            worlds.append(RealWorld(api))
            yield worlds[0]


MakeWorld = Callable[[], AbstractAsyncContextManager[World]]
both = pytest.mark.parametrize("make", [fake_world, real_world])


@both
def test_one_answer_covers_the_input(make: MakeWorld) -> None:
    """A file that was not asked for is in the answer as well; one that Valohai does not know is not."""

    async def main() -> None:
        async with make() as world:
            before_s = time.time()
            renewal = await world.source.renew(file_ref(NAMES[0]))
            assert before_s <= renewal.minted_at_s <= time.time()
            for index, name in enumerate(NAMES):
                url = renewal.url_for(file_ref(name, index=index))
                assert url is not None
                assert supported(url)
            assert renewal.url_for(file_ref("missing.bin")) is None

    trio.run(main)


@both
def test_nothing_is_cached(make: MakeWorld) -> None:
    """Each renewal gives other URLs, and leaves those of the one before as they were."""

    async def main() -> None:
        async with make() as world:
            file = file_ref(NAMES[0])
            first = await world.source.renew(file)
            url = first.url_for(file)
            second = await world.source.renew(file)
            assert second.url_for(file) != url
            assert first.url_for(file) == url

    trio.run(main)


@both
def test_errors_are_those_of_the_port(make: MakeWorld) -> None:
    """A dead token and an API that is down are told apart; afterwards it works again."""

    async def main() -> None:
        async with make() as world:
            expected: list[tuple[Callable[[], None], type[ValohaiFuseError]]] = [
                (world.refuse, AccessRefusedError),
                (world.go_down, StoreUnavailableError),
            ]
            for misbehave, error in expected:
                misbehave()
                with pytest.raises(error):
                    await world.source.renew(file_ref(NAMES[0]))
                world.come_back()
                renewal = await world.source.renew(file_ref(NAMES[0]))
                assert renewal.url_for(file_ref(NAMES[0])) is not None

    trio.run(main)


@both
def test_cancelling_one_leaves_the_source_usable(make: MakeWorld) -> None:
    """As an unmount or a test does."""

    async def main() -> None:
        async with make() as world:
            with trio.CancelScope() as scope:
                scope.cancel()
                await world.source.renew(file_ref(NAMES[0]))
            assert scope.cancelled_caught
            assert (await world.source.renew(file_ref(NAMES[0]))).url_for(file_ref(NAMES[0])) is not None

    trio.run(main)
