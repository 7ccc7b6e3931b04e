"""Who takes the kernel's next request: one at a time, always somebody, and the rest of the loop is not kept waiting."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from valohai_fuse.mount.turns import TURN_S, ReadLock, Turns


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Its ends, to read and to write."""
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


class Session:
    """What pyfuse3 does: tasks that take requests, bytes of a pipe, and answer them; those above 127 have to wait."""

    def __init__(self, reading: int) -> None:
        self.reading = reading
        self.lock = ReadLock()
        self.turns = Turns()
        self.answered: list[int] = []
        self.taking = 0
        self.alone = True
        self.more = trio.Event()

    async def task(self) -> None:
        while True:
            async with self.lock:
                self.taking += 1
                self.alone &= self.taking == 1
                await self.turns.wait_readable(self.reading)
                self.taking -= 1
            request = os.read(self.reading, 1)[0]
            if request > 127:
                await trio.sleep((request - 127) / 1e5)
            self.answered.append(request)
            self.more.set()

    async def wait_answered(self, count: int) -> None:
        while len(self.answered) < count:
            self.more = trio.Event()
            await self.more.wait()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=20), max_size=20), st.integers(1, 5))
def test_all_requests_are_answered_by_one_task_at_a_time(bursts: list[bytes], tasks: int) -> None:
    """However they come, and whichever of them have to wait."""

    async def main() -> None:
        with pipe() as (reading, writing), trio.fail_after(10):
            session = Session(reading)
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(session.task)
                for burst in bursts:
                    os.write(writing, burst)
                    await trio.sleep(0.0005)
                await session.wait_answered(sum(map(len, bursts)))
                assert sorted(session.answered) == sorted(b"".join(bursts))
                assert session.alone
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_rest_of_the_loop_has_its_turn() -> None:
    """Requests that never end keep nothing waiting for much longer than a turn."""
    checkpoints = 0

    async def other() -> None:
        nonlocal checkpoints
        while True:
            await trio.lowlevel.checkpoint()
            checkpoints += 1

    async def main() -> None:
        with pipe() as (reading, writing):
            os.write(writing, b"x")
            turns = Turns()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                until_s = time.monotonic() + 50 * TURN_S
                while time.monotonic() < until_s:
                    await turns.wait_readable(reading)  # it stays readable
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert checkpoints > 10


def test_what_waits_already_is_taken_without_a_round_of_the_loop() -> None:
    async def main() -> None:
        with pipe() as (reading, writing):
            os.write(writing, b"xy")
            turns = Turns()
            await turns.wait_readable(reading)
            with trio.testing.assert_no_checkpoints():
                await turns.wait_readable(reading)
            os.read(reading, 2)
            with trio.move_on_after(0.01) as scope:
                await turns.wait_readable(reading)
            assert scope.cancelled_caught, "nothing is there"

    trio.run(main)


def test_a_task_that_is_cancelled_while_it_is_woken_leaves_somebody_who_waits() -> None:
    async def main() -> None:
        with pipe() as (reading, writing), trio.fail_after(10):
            session = Session(reading)
            async with trio.open_nursery() as nursery:
                scopes: list[trio.CancelScope] = []

                async def cancellable() -> None:
                    with trio.CancelScope() as scope:
                        scopes.append(scope)
                        await session.task()

                for _ in range(3):
                    nursery.start_soon(cancellable)
                await trio.testing.wait_all_tasks_blocked()
                for scope in scopes[:2]:
                    os.write(writing, b"\x01")
                    scope.cancel()
                    await trio.sleep(0.001)
                os.write(writing, b"\x02\x03")
                await session.wait_answered(4)
                nursery.cancel_scope.cancel()

    trio.run(main)
