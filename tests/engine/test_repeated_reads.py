"""The kernel asks once more for a page whose readahead failed; together that must not take longer than a read may."""

from __future__ import annotations

import pytest
import trio

from support.engine_rig import MIB, EngineRig, run
from support.fake_fetcher import Script
from valohai_fuse.engine.objects import GIVEN_UP_MAX, REPEAT_S, Handle
from valohai_fuse.errors import DeadlineExceededError

DEADLINE_S = 30.0


async def fails_after(rig: EngineRig, handle: Handle, offset: int, size: int) -> float:
    """How long this read takes to fail."""
    began = trio.current_time()
    with pytest.raises(DeadlineExceededError):
        await rig.read(handle, offset, size)
    return trio.current_time() - began


def end(rig: EngineRig, *handles: Handle) -> None:
    """Closes the files, and ends what still waits for a store that never answers."""
    for flight in list(handles[0].object.flights):
        flight.scope.cancel()
    for handle in handles:
        rig.reader.close(handle)


def test_the_kernels_repetition_of_a_read_has_no_deadline_of_its_own() -> None:
    """Each page of it fails at once, once, whoever asks; the program's own next read has all its time."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=1e9)
        one, other = rig.open("a"), rig.open("a")
        assert await fails_after(rig, one, 0, MIB) == pytest.approx(DEADLINE_S)
        assert await fails_after(rig, one, 0, 4096) == 0
        assert await fails_after(rig, other, 8192, 4096) == 0
        assert await fails_after(rig, one, 0, 4096) == pytest.approx(DEADLINE_S)
        await trio.sleep(REPEAT_S)
        assert await fails_after(rig, one, 8192, 4096) == pytest.approx(DEADLINE_S)
        end(rig, one, other)

    run(scenario, {"a": 4 * MIB}, window=0, read_timeout_s=DEADLINE_S)


def test_what_was_not_asked_for_is_no_repetition() -> None:
    """A read of other bytes waits for them, also when it only overlaps."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=1e9)
        handle = rig.open("a")
        assert await fails_after(rig, handle, MIB, MIB) == pytest.approx(DEADLINE_S)
        assert await fails_after(rig, handle, MIB - 4096, 8192) == pytest.approx(DEADLINE_S)
        end(rig, handle)

    run(scenario, {"a": 4 * MIB}, window=0, read_timeout_s=DEADLINE_S)


def test_what_is_remembered_is_bounded() -> None:
    """Thousands of reads that fail together leave a few notes, and those expire."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=1e9)
        handle = rig.open("a")
        async with trio.open_nursery() as nursery:
            for page in range(500):
                nursery.start_soon(fails_after, rig, handle, page * 4096, 4096)
        assert len(handle.object.given_up) == GIVEN_UP_MAX
        await trio.sleep(REPEAT_S)
        await fails_after(rig, handle, 0, 4096)
        assert len(handle.object.given_up) == 1
        end(rig, handle)

    run(scenario, {"a": 4 * MIB}, window=0, read_timeout_s=DEADLINE_S)
