"""The contract of `ports.Fetcher`, on the fake that the engine is tested with and on the worker pool over a real socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import trio
import trio.testing

from support.fake_fetcher import FakeFetcher, Script
from support.fetch_rig import CONTENT, SIZE, landed_bytes, rig
from support.raw_store import Answer, End, partial, plain
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent
from valohai_fuse.ports import (
    FailureKind,
    Fetcher,
    FetchFailed,
    FetchOrder,
    Landed,
    Lease,
    ObjectKey,
    Priority,
    Version,
)
from valohai_fuse.store.landing import SegmentWriter

Fault = Literal["missing", "refused", "cut"]


@dataclass
class Subject:
    """A fetcher, and how to make its store misbehave; the store holds CONTENT with ETag `"v1"`."""

    fetcher: Fetcher
    directory: Path
    url: str
    next_goes: Callable[[Fault], None]
    """The next order meets this; `cut`: the body breaks off within the third block."""

    def order(
        self,
        start: int = 0,
        stop: int = SIZE,
        *,
        expect: Version | None = None,
        priority: Priority = Priority.DEMAND,
        size: int = SIZE,
        name: str = "object",
    ) -> FetchOrder:
        """An order for a part of the object; the one named `stuck` is never answered."""
        return FetchOrder(
            ObjectKey(name, size),
            Extent(start, stop),
            Lease(f"{self.url}/{name}"),
            expect,
            str(self.directory / "segment"),
            priority,
        )


@contextlib.asynccontextmanager
async def _fake(directory: Path, connections: int) -> AsyncIterator[Subject]:
    def land(order: FetchOrder, offset: int, data: bytes, version: Version) -> None:
        with SegmentWriter(order.segment_path, order.key, order.extent.start // SEGMENT_BYTES, version) as writer:
            writer.land(offset, memoryview(data))

    fake = FakeFetcher({"object": CONTENT, "stuck": CONTENT}, land, connections=connections)
    fake.script("stuck", *[Script(gate=trio.Event())] * 100)
    fake.default = Script(latency_s=0.001)

    def next_goes(fault: Fault) -> None:
        scripts: dict[Fault, Script] = {
            "missing": Script(failure=FetchFailed(FailureKind.MISSING, "HTTP 404", status=404)),
            "refused": Script(failure=FetchFailed(FailureKind.REFUSED, "HTTP 403", status=403)),
            "cut": Script(failure=FetchFailed(FailureKind.TRANSIENT, "cut"), fail_at=2 * BLOCK_BYTES + 77),
        }
        fake.script("object", scripts[fault])

    yield Subject(fake, directory, "http://store.invalid", next_goes)


@contextlib.asynccontextmanager
async def _real(directory: Path, connections: int) -> AsyncIterator[Subject]:
    async with rig(directory, connections=connections) as r:
        r.store.hanging.add(b"/stuck")

        def next_goes(fault: Fault) -> None:
            whole = partial(CONTENT, 0, SIZE)
            answers: dict[Fault, Answer] = {
                "missing": [plain(404, b"")],
                "refused": [plain(403, b"")],
                "cut": [whole[: len(whole) - SIZE + 2 * BLOCK_BYTES + 77], End.CLOSE],
            }
            r.store.answers.append(answers[fault])

        yield Subject(r.pool, directory, r.store.url, next_goes)


@pytest.fixture(params=["fake", "real"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario on one of the two."""
    opened = {"fake": _fake, "real": _real}[request.param]

    def run_scenario(scenario: Callable[[Subject], Awaitable[None]], connections: int = 16) -> None:
        async def main() -> None:
            with trio.fail_after(30):
                async with opened(tmp_path, connections) as subject:
                    await scenario(subject)

        trio.run(main)

    return run_scenario


def _ignore(_: Landed) -> None:
    pass


def _unexpected(report: Landed) -> None:
    pytest.fail(f"nothing may land: {report}")


async def _failure(subject: Subject, order: FetchOrder, landed: Callable[[Landed], None] = _ignore) -> FetchFailed:
    with pytest.raises(FetchFailed) as caught:
        await subject.fetcher.fetch(order, landed)
    return caught.value


def test_lands_ascending_and_reports_to_the_end(run: Callable[..., None]) -> None:
    """The extent lands in ascending order; each report is true when it is made; the last one is the extent's end."""

    async def scenario(subject: Subject) -> None:
        order = subject.order(BLOCK_BYTES, SIZE)
        uptos: list[int] = []

        def landed(report: Landed) -> None:
            assert report.version == '"v1"'
            so_far = FetchOrder(
                order.key, Extent(BLOCK_BYTES, report.upto), order.lease, None, order.segment_path, order.priority
            )
            assert landed_bytes(so_far) == CONTENT[BLOCK_BYTES : report.upto]
            uptos.append(report.upto)

        fetched = await subject.fetcher.fetch(order, landed)
        assert uptos == sorted(set(uptos))
        assert uptos[-1] == SIZE
        assert all(upto % BLOCK_BYTES == 0 for upto in uptos[:-1])
        assert fetched.version == '"v1"'
        assert fetched.fetched_bytes == SIZE - BLOCK_BYTES
        assert 0 <= fetched.first_byte_s <= fetched.total_s

    run(scenario)


def test_expected_version_that_holds(run: Callable[..., None]) -> None:
    """An ETag that is as before is no obstacle."""

    async def scenario(subject: Subject) -> None:
        order = subject.order(0, BLOCK_BYTES, expect='"v1"')
        await subject.fetcher.fetch(order, _ignore)
        assert landed_bytes(order) == CONTENT[:BLOCK_BYTES]

    run(scenario)


@pytest.mark.parametrize("what", ["version", "size"])
def test_changed_object_lands_nothing(what: str, run: Callable[..., None]) -> None:
    """Another ETag or another total than expected: CHANGED, and not a byte of it."""

    async def scenario(subject: Subject) -> None:
        order = subject.order(expect='"v0"') if what == "version" else subject.order(0, BLOCK_BYTES, size=SIZE + 1)
        failed = await _failure(subject, order, _unexpected)
        assert failed.kind is FailureKind.CHANGED
        assert not (subject.directory / "segment").exists()

    run(scenario)


@pytest.mark.parametrize(
    ("fault", "kind", "status"), [("missing", FailureKind.MISSING, 404), ("refused", FailureKind.REFUSED, 403)]
)
def test_statuses(fault: Fault, kind: FailureKind, status: int, run: Callable[..., None]) -> None:
    """A failure has its kind and its status, lands nothing, and is over with that order."""

    async def scenario(subject: Subject) -> None:
        subject.next_goes(fault)
        failed = await _failure(subject, subject.order(), _unexpected)
        assert (failed.kind, failed.status) == (kind, status)
        await subject.fetcher.fetch(subject.order(), _ignore)

    run(scenario)


def test_what_was_reported_stays(run: Callable[..., None]) -> None:
    """Of a body that breaks off the whole blocks are there, and reported; the rest is not."""

    async def scenario(subject: Subject) -> None:
        subject.next_goes("cut")
        uptos: list[int] = []
        failed = await _failure(subject, subject.order(), lambda report: uptos.append(report.upto))
        assert failed.kind is FailureKind.TRANSIENT
        assert uptos[-1] == 2 * BLOCK_BYTES
        assert landed_bytes(subject.order(0, 2 * BLOCK_BYTES)) == CONTENT[: 2 * BLOCK_BYTES]
        with pytest.raises(KeyError):
            landed_bytes(subject.order(2 * BLOCK_BYTES, 3 * BLOCK_BYTES))

    run(scenario)


def test_cancelling_frees_the_only_connection(run: Callable[..., None]) -> None:
    """A cancelled order holds nothing back, and reports nothing any more."""

    async def scenario(subject: Subject) -> None:
        with trio.move_on_after(0.05) as scope:
            await subject.fetcher.fetch(subject.order(name="stuck"), _unexpected)
        assert scope.cancelled_caught
        await subject.fetcher.fetch(subject.order(), _ignore)

    run(scenario, connections=1)


def test_demand_finds_a_connection_beside_any_number_of_ahead(run: Callable[..., None]) -> None:
    """However much is fetched ahead, a demand order starts at once."""

    async def scenario(subject: Subject) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(subject.fetcher.fetch, subject.order(name="stuck", priority=Priority.AHEAD), _ignore)
            await trio.testing.wait_all_tasks_blocked(0.05)
            async with trio.open_nursery() as demands:  # a demand that is stuck as well leaves room for another
                demands.start_soon(subject.fetcher.fetch, subject.order(name="stuck"), _ignore)
                await trio.testing.wait_all_tasks_blocked(0.05)
                await subject.fetcher.fetch(subject.order(), _ignore)
                demands.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    run(scenario, connections=8)


def test_an_order_without_bytes(run: Callable[..., None]) -> None:
    """Nothing is asked for: the caller's mistake."""

    async def scenario(subject: Subject) -> None:
        with pytest.raises(ValueError, match="without bytes"):
            await subject.fetcher.fetch(subject.order(BLOCK_BYTES, BLOCK_BYTES), _ignore)

    run(scenario)
