"""Whole files that nobody reads yet: everything asked for lands once, in bounds, and what fails is told."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import trio
import trio.testing

from support.engine_rig import MIB, EngineRig, run
from support.fake_fetcher import Script
from support.prefetch_rig import prefetch_of, tree_of
from valohai_fuse import errors
from valohai_fuse.engine.objects import Handle
from valohai_fuse.engine.prefetch import REFUSED_PAUSE_S, ROUNDS_MAX, InCache
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.model.tree import ROOT, Inode, LocalFile
from valohai_fuse.ports import FailureKind, FetchFailed, Priority


def cached(rig: EngineRig, name: str) -> int:
    return rig.store.cached_bytes(rig._describe(rig.inode(name))[0])


def test_everything_lands_once_and_what_was_there_is_not_fetched() -> None:
    """Large files in several pieces, many small ones, one that was read before; each byte is fetched exactly once."""
    sizes = {"big": 3 * SEGMENT_BYTES + 17, "seen": 300_000, **{f"s{n}": 1000 + n for n in range(30)}}

    async def scenario(rig: EngineRig) -> None:
        handle = rig.open("seen")
        await rig.read(handle, 0, 300_000)
        rig.reader.close(handle)
        before = rig.fetcher.fetched_bytes
        tree = tree_of(rig)
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree)
            await prefetch.run(tree.walk_files(ROOT))
        total = sum(sizes.values())
        progress = prefetch.progress()
        assert (progress.files, progress.files_done, progress.files_failed) == (len(sizes), len(sizes), 0)
        assert progress.bytes == progress.bytes_done == total
        assert progress.bytes_fetched == rig.fetcher.fetched_bytes - before == total - 300_000
        assert all(cached(rig, name) == size for name, size in sizes.items())

    run(scenario, sizes)


def test_it_stays_within_its_bounds_and_behind_demand() -> None:
    """At most so many pieces at a time, all of them AHEAD: a read that comes meanwhile overtakes those that wait."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=0.1, bytes_per_s=8 * MIB)
        tree = tree_of(rig)
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree, pieces_max=3)
            nursery.start_soon(prefetch.run, [rig.inode("big")])
            await trio.sleep(0.5)
            handle = rig.open("other")
            began = trio.current_time()
            await rig.read(handle, 0, 4096)
            assert trio.current_time() - began < 0.2
            rig.reader.close(handle)
        ahead = [order for order in rig.fetcher.orders if order.key.stable_id == "big"]
        assert {order.priority for order in ahead} == {Priority.AHEAD}
        assert rig.fetcher.active_peak <= 3 + 1
        assert prefetch.progress().bytes_done == 10 * SEGMENT_BYTES

    run(scenario, {"big": 10 * SEGMENT_BYTES, "other": 4096})


@pytest.mark.expect_warnings("gave up on bad")
def test_a_failing_file_is_told_and_the_others_go_on() -> None:
    """404 on one of three; the rest of its pieces are not asked for."""

    async def scenario(rig: EngineRig) -> None:
        gone = FetchFailed(FailureKind.MISSING, "HTTP 404", status=404)
        rig.fetcher.script("bad", *[Script(failure=gone)] * 50)
        tree = tree_of(rig)
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree, pieces_max=2)
            await prefetch.run(tree.walk_files(ROOT))
        progress = prefetch.progress()
        assert (progress.files, progress.files_done, progress.files_failed) == (3, 2, 1)
        assert [path for path, _ in progress.failures] == ["bad"]
        assert "404" in progress.failures[0][1]
        assert len([o for o in rig.fetcher.orders if o.key.stable_id == "bad"]) < 10

    run(scenario, {"a": MIB, "bad": 20 * SEGMENT_BYTES, "z": MIB})


def test_sizes_that_are_not_known_are_asked_for() -> None:
    """A file of unknown size, large or empty, is sized first and then fetched like any other; one on the disk is not."""

    async def scenario(rig: EngineRig) -> None:
        tree = tree_of(rig, unknown=["big", "empty", "small"], local={"here": LocalFile(5, 7)})
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree)
            await prefetch.run(tree.walk_files(ROOT))
        progress = prefetch.progress()
        assert (progress.files_done, progress.files_failed) == (4, 0)
        assert progress.bytes == progress.bytes_done == 2 * SEGMENT_BYTES + 10 + 5
        assert cached(rig, "big") == 2 * SEGMENT_BYTES
        assert not [o for o in rig.fetcher.orders if o.key.stable_id == "here"]

    run(scenario, {"big": 2 * SEGMENT_BYTES, "empty": 0, "small": 10, "here": 500})


def test_cancelling_keeps_what_has_landed_and_ends_the_flights() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.default = Script(latency_s=0, bytes_per_s=MIB)
        tree = tree_of(rig)
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree, pieces_max=2)
            with trio.move_on_after(10.53) as scope:  # between two blocks: at one, who goes first is left to chance
                await prefetch.run([rig.inode("big")])
            assert scope.cancelled_caught
            await trio.testing.wait_all_tasks_blocked()
            assert rig.flights.active == 0
        there = cached(rig, "big")
        assert 2 * 8 * MIB < there < 40 * MIB
        assert prefetch.progress().bytes_fetched == there

    run(scenario, {"big": 40 * MIB})


def test_only_a_silence_ends_a_file_not_its_length() -> None:
    """A piece that takes far longer than the patience comes in; one that stands still fails."""

    async def scenario(rig: EngineRig) -> None:
        rig.fetcher.script("slow", Script(latency_s=0, bytes_per_s=MIB / 4))
        rig.fetcher.script("stuck", Script(gate=trio.Event()))
        tree = tree_of(rig)
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree, patience_s=10)
            await prefetch.run(tree.walk_files(ROOT))
        progress = prefetch.progress()
        assert (progress.files_done, progress.files_failed) == (1, 1)
        assert progress.failures[0][0] == "stuck"
        assert "10 s" in progress.failures[0][1]
        assert trio.current_time() > 30

    run(scenario, {"slow": 8 * MIB, "stuck": 8 * MIB})


def test_a_disk_that_takes_nothing_for_a_moment_is_waited_for() -> None:
    async def scenario(rig: EngineRig) -> None:
        rig.store.refuses_disk = True
        tree = tree_of(rig)
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree)
            nursery.start_soon(prefetch.run, tree.walk_files(ROOT))
            await trio.sleep(REFUSED_PAUSE_S / 2)
            assert rig.fetcher.fetched_bytes == 0
            rig.store.refuses_disk = False
        progress = prefetch.progress()
        assert (progress.files_done, progress.files_failed) == (2, 0)
        assert progress.bytes_fetched == rig.fetcher.fetched_bytes == SEGMENT_BYTES + 10

    run(scenario, {"a": SEGMENT_BYTES + 5, "b": 5})


def test_nothing_is_fetched_for_a_disk_that_takes_nothing() -> None:
    """A thousand files are told as failed after one of them has waited; when the disk takes some again the rest comes."""

    async def scenario(rig: EngineRig) -> None:
        rig.store.refuses_disk = True
        tree = tree_of(rig)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree)
            await prefetch.run(tree.walk_files(ROOT))
        progress = prefetch.progress()
        assert (progress.files_done, progress.files_failed) == (0, 1000)
        assert "takes no writes" in progress.failures[0][1]
        assert rig.fetcher.fetched_bytes == progress.bytes_fetched == progress.bytes_done == 0
        assert trio.current_time() - began < 2 * ROUNDS_MAX * REFUSED_PAUSE_S
        rig.store.refuses_disk = False
        async with trio.open_nursery() as nursery:
            again = prefetch_of(rig, nursery, tree)
            await again.run(tree.walk_files(ROOT))
        assert again.progress().files_done == 1000

    run(scenario, {f"{n}": 5 for n in range(1000)})


def test_what_keeps_the_pieces_is_told_of_each_and_of_the_end() -> None:
    """`begin` chooses the pieces; each is handed over when it has landed; `complete` comes last, or not at all."""

    class Recorder(InCache):
        def __init__(self) -> None:
            self.pieces: list[Extent] = []
            self.completed: list[Inode] = []

        async def begin(self, inode: Inode, size: int) -> tuple[Iterable[Extent], int]:
            return [Extent(SEGMENT_BYTES, size)], SEGMENT_BYTES

        async def landed(self, handle: Handle, piece: Extent) -> None:
            if handle.object.label == "refused":
                raise errors.ReadError("no room")
            self.pieces.append(piece)

        async def complete(self, inode: Inode, size: int) -> None:
            self.completed.append(inode)

    async def scenario(rig: EngineRig) -> None:
        tree = tree_of(rig)
        keep = Recorder()
        async with trio.open_nursery() as nursery:
            prefetch = prefetch_of(rig, nursery, tree, keep=keep)
            await prefetch.run(tree.walk_files(ROOT))
        assert keep.pieces == [Extent(SEGMENT_BYTES, SEGMENT_BYTES + 5)]
        assert keep.completed == [rig.inode("a")]
        progress = prefetch.progress()
        assert (progress.files_done, progress.files_failed) == (1, 1)
        assert progress.failures == (("refused", "no room"),)

    run(scenario, {"a": SEGMENT_BYTES + 5, "refused": SEGMENT_BYTES + 5})
