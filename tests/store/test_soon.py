"""What is not in memory is looked for by the event loop where the disk is quick, and left to threads where it is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from support.segment_paths import segment_path
from valohai_fuse.model.extents import BLOCK_BYTES, Extent
from valohai_fuse.ports import COLD, NotHere, ObjectKey
from valohai_fuse.store import soon
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.segments import SegmentStore
from valohai_fuse.store.soon import LOOKS_MAX, QUICK_S, RESTS_MIN, SOON_S, Soon


class Disk:
    """Has what is asked for at the `answers_at`th look; a look takes `look_s`."""

    def __init__(self, answers_at: int, look_s: float = SOON_S / 4) -> None:
        self.now_s = 0.0
        self.looks = 0
        self._answers_at = answers_at
        self._look_s = look_s

    def look(self) -> bytes | NotHere:
        self.looks += 1
        self.now_s += self._look_s
        return b"here" if self.looks >= self._answers_at else COLD

    def monotonic(self) -> float:
        return self.now_s


def read(quick: Soon, disk: Disk) -> object:
    return trio.run(quick.read, (), disk.look)


@pytest.mark.parametrize("answers_at", [1, 3])
def test_a_quick_disk_is_asked_again_and_again(answers_at: int) -> None:
    disk = Disk(answers_at)
    quick = Soon(possible=True, monotonic=disk.monotonic)
    assert read(quick, disk) == b"here"
    assert disk.looks == answers_at
    assert quick.is_quick


@pytest.mark.parametrize(("look_s", "looks"), [(SOON_S * 0.6, 2), (0.0, LOOKS_MAX)])
def test_a_slow_disk_is_left_to_threads_until_they_find_it_quick(look_s: float, looks: int) -> None:
    """More and more of them each time, also where the clock stands still; a quick answer makes that good."""
    disk = Disk(10**9, look_s)
    quick = Soon(possible=True, monotonic=disk.monotonic)
    for times in (1, 2, 4):
        disk.looks = 0
        assert read(quick, disk) is COLD
        assert disk.looks == looks
        for _ in range(times * RESTS_MIN):
            assert not quick.is_quick
            quick.note(10 * QUICK_S)
            quick.note(QUICK_S)
        assert quick.is_quick
    assert read(quick, Disk(1)) == b"here"
    assert read(quick, disk) is COLD
    for _ in range(RESTS_MIN):
        quick.note(QUICK_S)
    assert quick.is_quick


def test_reads_look_one_after_the_other() -> None:
    """In the order in which they asked, and whoever is cancelled meanwhile is left out."""
    quick = Soon(possible=True, monotonic=lambda: 0.0)
    asked: list[int] = []
    looks: list[int] = []

    async def one(number: int, scope: trio.CancelScope) -> None:
        def look() -> bytes | NotHere:
            looks.append(number)
            return b"here" if looks.count(number) == 3 else COLD

        with scope:
            asked.append(number)
            assert await quick.read((), look) == b"here"

    async def all_of_them() -> None:
        scopes = [trio.CancelScope() for _ in range(4)]
        async with trio.open_nursery() as nursery:
            for number, scope in enumerate(scopes):
                nursery.start_soon(one, number, scope)
            while len(asked) < len(scopes):
                await trio.lowlevel.checkpoint()
            scopes[asked[2]].cancel()

    trio.run(all_of_them)
    first, second, _, fourth = asked
    assert looks == [first] * 3 + [second] * 3 + [fourth] * 3
    assert quick.is_quick


def test_a_disk_that_is_slow_for_one_is_asked_once_by_those_behind() -> None:
    disk = Disk(10**9, SOON_S * 0.6)
    quick = Soon(possible=True, monotonic=disk.monotonic)

    async def three() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(quick.read, (), disk.look)

    trio.run(three)
    assert disk.looks == 2 + 1 + 1
    assert not quick.is_quick


def test_a_disk_that_may_hang_is_never_asked() -> None:
    quick = Soon(possible=False, monotonic=Disk(1).monotonic)
    quick.note(0.0)
    assert not quick.is_quick


def test_a_store_reads_what_is_not_in_memory_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And verifies it as ever."""
    monkeypatch.setattr(soon, "SOON_S", 5.0)  # a disk of a busy machine
    monkeypatch.setattr(soon, "LOOKS_MAX", 10**6)
    key, content = ObjectKey("id", 3 * BLOCK_BYTES), os.urandom(3 * BLOCK_BYTES)
    store = SegmentStore(str(tmp_path / "cache"))
    path = segment_path(store, key, 0)
    with SegmentWriter(path, key, 0, "v") as writer:
        writer.land(0, content)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    extent = Extent(BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert store.read_nowait(key, "v", extent) == content[BLOCK_BYTES : 2 * BLOCK_BYTES]
    os.posix_fadvise(fd, BLOCK_BYTES, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if store.read_nowait(key, "v", extent) is not COLD:
        pytest.skip("the temporary directory's file system does not drop its pages; --basetemp on a disk lets this run")

    def no_thread(*_: object) -> bytes:
        pytest.fail("a thread was asked")

    monkeypatch.setattr(store, "read_blocking", no_thread)
    assert trio.run(store.read, key, "v", extent) == content[BLOCK_BYTES : 2 * BLOCK_BYTES]
    store.close()
