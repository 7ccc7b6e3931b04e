"""Room is taken before it is used, by all processes together: `store.room`, and the evictor that works for it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from support.segment_paths import segment_path
from valohai_fuse.model.eviction import Budget, Segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent
from valohai_fuse.ports import NotHere, ObjectKey
from valohai_fuse.store import evictor
from valohai_fuse.store.claims import Claims
from valohai_fuse.store.evictor import Evictor
from valohai_fuse.store.landing import SegmentWriter, is_memory_path
from valohai_fuse.store.room import Room
from valohai_fuse.store.segments import SegmentStore

MIB = 1024 * 1024
SCRIPT = str(Path(__file__).with_name("room_process.py"))


@pytest.fixture
def cache(tmp_path: Path) -> str:
    cache_dir = str(tmp_path / "cache")
    SegmentStore(cache_dir).close()
    return cache_dir


@pytest.fixture
def room_of(cache: str) -> Iterator[Callable[..., Room]]:
    """`room_of(bytes_max=...)`: what another process has; measured as empty unless `measured=False`."""
    made: list[Room] = []

    def make(*, measured: bool = True, **budget: int) -> Room:
        room = Room(cache, Budget(**budget))
        made.append(room)
        if measured:
            room.measured(room.records_now(), room.records_now(), 0)
        return room

    yield make
    for room in made:
        room.close()


def unlockable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def unsupported(fd: int, operation: int, *more: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(fcntl, "fcntl", unsupported)


def held_bytes(cache: str) -> int:
    """What the segments held at one moment: what was there in a first look and still is in a second one."""
    first = {found.name: found.bytes_on_disk for found in evictor.scan(cache)}
    second = {found.name: found.bytes_on_disk for found in evictor.scan(cache)}
    return sum(min(byte_count, second.get(name, 0)) for name, byte_count in first.items())


def test_what_is_taken_is_taken_for_everybody(room_of: Callable[..., Room]) -> None:
    ours, theirs = room_of(bytes_max=1000), room_of(bytes_max=1000)
    assert ours.reserve(600)
    assert not theirs.reserve(600)
    assert theirs.reserve(400)
    assert not ours.reserve(1)


def test_what_has_landed_stays_counted_until_somebody_looks(room_of: Callable[..., Room]) -> None:
    """A fetch that is over has left its bytes on the disk, or not: only a scan can tell."""
    ours, theirs = room_of(bytes_max=1000), room_of(bytes_max=1000)
    assert ours.reserve(900)
    ours.release(900)
    assert not theirs.reserve(200)
    theirs.measured(theirs.records_now(), theirs.records_now(), 100)
    assert theirs.reserve(200)
    assert not ours.reserve(200)


def test_what_landed_while_somebody_looked_is_counted(room_of: Callable[..., Room]) -> None:
    """Twice at the worst, never not at all."""
    ours, theirs = room_of(bytes_max=1000), room_of(bytes_max=1000)
    before = theirs.records_now()
    assert ours.reserve(500)
    ours.release(500)
    theirs.measured(before, theirs.records_now(), 0)
    assert theirs.used_bytes() == 500


def test_what_others_evict_makes_room(room_of: Callable[..., Room]) -> None:
    ours, theirs = room_of(bytes_max=1000), room_of(bytes_max=1000)
    assert ours.reserve(900)
    ours.release(900)
    theirs.evicted(500)
    assert ours.reserve(600)


def test_before_the_first_look_the_cache_counts_as_full(room_of: Callable[..., Room]) -> None:
    room = room_of(bytes_max=1000, measured=False)
    assert room.reserve(10), "one percent"
    assert not room.reserve(1)
    assert room.wanted.is_set()


def test_a_dead_process_takes_its_share_with_it(cache: str, room_of: Callable[..., Room]) -> None:
    ours = room_of(bytes_max=1000)
    dead = Room(cache, Budget(bytes_max=1000))
    dead.measured(dead.records_now(), dead.records_now(), 0)
    assert dead.reserve(900)
    assert not ours.reserve(200)
    dead.close()
    before = ours.records_swept()
    assert len(os.listdir(os.path.join(cache, "v1", "shares"))) == 1
    assert not ours.reserve(200), "what it had landed since we looked, nobody knows"
    ours.measured(before, ours.records_now(), 0)
    assert ours.reserve(900)


def test_without_locks_a_share_dies_of_old_age(
    cache: str, room_of: Callable[..., Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    unlockable(monkeypatch)
    ours, theirs = room_of(bytes_max=1000), room_of(bytes_max=1000)
    assert theirs.reserve(900)
    assert not ours.reserve(200)
    theirs.evicted(900)
    assert not ours.reserve(200), "who evicts without a lock may report what our scan had not seen"
    shares = Path(cache, "v1", "shares")
    assert ours.reserve(1)
    for share in shares.iterdir():
        os.utime(share, (1, 1))
    ours.reserve(1)
    ours.records_swept()
    assert len(list(shares.iterdir())) == 1


def test_the_file_systems_free_room_counts_what_is_taken(
    room_of: Callable[..., Room], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    fields = list(os.statvfs(cache))
    fields[0] = fields[1] = 1
    fields[2], fields[4] = 10**6, 5000
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    ours, theirs = room_of(free_min_bytes=4000), room_of(free_min_bytes=4000)
    assert ours.reserve(600)
    assert not theirs.reserve(600)
    ours.release(600)
    assert theirs.reserve(600), "what has landed shows in what is free"


def test_processes_together_keep_the_bound(cache: str) -> None:
    """Four at once, each landing five times what may be there; seen at every moment that we can look at."""
    bound = 24 * MIB
    script = [sys.executable, SCRIPT, cache, str(bound)]
    landers = [subprocess.Popen([*script, str(n), "120"], stdout=subprocess.PIPE) for n in range(4)]
    held, looks = 0, 0
    while any(lander.poll() is None for lander in landers):
        held = max(held, held_bytes(cache))
        looks += 1
    on_disk = [int(lander.communicate()[0]) for lander in landers]
    assert [lander.returncode for lander in landers] == [0, 0, 0, 0]
    assert looks > 50
    assert held <= 1.02 * bound
    assert held > bound // 2
    assert sum(on_disk) > 0.8 * 480, "most of it found room on the disk"


def test_without_room_what_is_waited_for_goes_to_memory(cache: str) -> None:
    """And what nobody waits for is not fetched at all. Nothing waits long for an evictor that does not come."""
    key = ObjectKey("datum:1", SEGMENT_BYTES)
    store = SegmentStore(cache, room=Room(cache, Budget(bytes_max=MIB)))

    async def landing(*, ahead: bool) -> str | None:
        async with store.landing(key, Extent(0, SEGMENT_BYTES), ahead=ahead) as path:
            return None if path is None else path.segment_path

    async def main() -> None:
        path = await landing(ahead=False)
        assert path is not None
        assert is_memory_path(path)
        assert await landing(ahead=True) is None

    trio.run(main)
    store.close()


def test_what_is_fetched_or_read_goes_last(cache: str) -> None:
    """Claimed by anybody: never. Being read here: only when nothing else is left."""
    store = SegmentStore(cache)
    keys = [ObjectKey(f"datum:{n}", BLOCK_BYTES) for n in range(4)]
    for age, key in enumerate(reversed(keys)):
        with SegmentWriter(segment_path(store, key, 0), key, 0, "v") as writer:
            writer.land(0, bytes(BLOCK_BYTES))
        os.utime(segment_path(store, key, 0), (10**9 - age, 10**9 - age))
    one = Extent(0, BLOCK_BYTES)

    def kept() -> list[bool]:
        return [os.path.exists(segment_path(store, key, 0)) for key in keys]

    assert store.claim(keys[0], one)
    assert not isinstance(trio.run(store.read, keys[1], "v", one), NotHere)
    pressed = Evictor(cache, Budget(bytes_max=3 * (BLOCK_BYTES + 4096)), in_use=store.being_read)
    pressed.run_pass()
    assert kept() == [True, True, False, True]
    Evictor(cache, Budget(bytes_max=1), in_use=store.being_read).run_pass()
    assert kept() == [True, False, False, False]
    store.unclaim(keys[0], one)
    Evictor(cache, Budget(bytes_max=1)).run_pass()
    assert held_bytes(cache) == 0
    store.close()


def test_those_in_use_are_chosen_last() -> None:
    found = [Segment(n, str(n), 10) for n in range(5)]
    names = [segment.name for segment in evictor.choose(iter(found), 35, frozenset({"0", "1"}))]
    assert names == ["2", "3", "4", "0"]


def test_a_claim_is_seen_by_all_and_ends_with_its_owner(cache: str) -> None:
    ours, theirs = Claims(cache), Claims(cache)
    assert ours.claim("00/x.0", 0, 10)
    assert not theirs.claim("00/x.0", 5, 20)
    assert theirs.claim("00/x.0", 10, 20), "other blocks of the segment"
    assert theirs.claim("00/x.1", 0, 10)
    assert ours.is_claimed("00/x.1")
    assert not ours.is_claimed("00/x.2")
    ours.release("00/x.0", 0, 10)
    assert theirs.claim("00/x.0", 0, 10)
    theirs.close()
    assert ours.claim("00/x.0", 0, 20)
    ours.close()


def test_without_locks_everybody_may_claim_everything(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Claims(cache), Claims(cache)
    unlockable(monkeypatch)
    assert ours.claim("00/x.0", 0, 10)
    assert theirs.claim("00/x.0", 0, 10)
    assert not ours.is_claimed("00/x.0")
    ours.close()
    theirs.close()
