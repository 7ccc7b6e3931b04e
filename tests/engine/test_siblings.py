"""Files opened one after the other: what guessing the next ones gains, and what it costs when it guesses wrong."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import trio

from support.engine_rig import EngineRig, run
from support.prefetch_rig import tree_of
from valohai_fuse.engine import siblings as siblings_room
from valohai_fuse.engine.fill import FillLimits
from valohai_fuse.engine.reader import Ahead
from valohai_fuse.engine.siblings import PRESENT_PER_OPEN, SMALL_BYTES_MAX, SiblingAhead
from valohai_fuse.model.manifest_json import from_json
from valohai_fuse.model.tree import Inode, build
from valohai_fuse.ports import ObjectKey, Priority

GIB = 1024**3
UNBOUNDED = FillLimits(GIB)
FILES = 200
FILE_BYTES = 100 * 1024
READ_BYTES = 32 * 1024
LINE_BYTES_S = 125e6
"""1 Gbit/s: on a slower line what was fetched in vain takes longer than its round trips."""
SIZES = {f"f{number}": FILE_BYTES for number in range(FILES)}


def followed(rig: EngineRig, fill: FillLimits = UNBOUNDED) -> SiblingAhead:
    return SiblingAhead(
        tree_of(rig), rig.reader.fetch_ahead, requests_ahead=lambda: rig.reader.statistics().flights_ahead, fill=fill
    )


async def read_whole(rig: EngineRig, name: str, siblings: SiblingAhead | None) -> None:
    handle = rig.open(name)
    if siblings is not None:
        siblings.on_open(rig.inode(name))
    for at in range(0, FILE_BYTES, READ_BYTES):
        assert await rig.read(handle, at, READ_BYTES) == rig.contents[name][at : at + READ_BYTES]
    rig.reader.close(handle)


def seconds(names: list[str], *, guessing: bool, sizes: dict[str, int] = SIZES) -> float:
    """How long one reader takes for these files, 20 ms away."""
    took_s = 0.0

    async def scenario(rig: EngineRig) -> None:
        nonlocal took_s
        rig.fetcher.line_bytes_s = LINE_BYTES_S
        siblings = followed(rig) if guessing else None
        began_t = trio.current_time()
        for name in names:
            await read_whole(rig, name, siblings)
        took_s = trio.current_time() - began_t

    run(scenario, sizes)
    return took_s


def in_runs(length: int) -> list[str]:
    """Runs of neighbours, each somewhere else than the one before and far enough from it not to be foreseen."""
    starts = list(range(0, FILES - length, length + 30))
    random.Random(1).shuffle(starts)
    return [f"f{start + nth}" for start in starts for nth in range(length)]


PATTERNS = {
    "shuffled": random.Random(1).sample(list(SIZES), FILES),
    **{f"runs of {length}": in_runs(length) for length in (2, 3, 4, 6, 9, 17)},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_wrong_guess_costs_a_reader_no_more_than_a_twentieth(pattern: str) -> None:
    """Runs of three are the worst: long enough to be believed, and over at that very moment. Longer ones gain by it."""
    names = PATTERNS[pattern]
    assert seconds(names, guessing=True) <= 1.05 * seconds(names, guessing=False)


def test_an_epoch_in_no_order_takes_less_than_half() -> None:
    """One reader, every file once: more and more of them are there when they are opened."""
    names = PATTERNS["shuffled"]
    assert seconds(names, guessing=True) < seconds(names, guessing=False) / 2


LIMITS = {
    "off": FillLimits(0),
    "few connections": FillLimits(GIB, connections=1),
    "a sick disk": FillLimits(GIB, is_kept=lambda: False),
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_where_it_must_not_no_directory_is_completed(limits: FillLimits) -> None:
    assert shuffled_guesses(limits, SIZES) == 0


def test_no_more_of_a_directory_than_the_limit_and_no_large_files() -> None:
    """Twenty files of 100 KiB; and nothing at all of files of which it would be the beginning."""
    assert shuffled_guesses(FillLimits(20 * FILE_BYTES), SIZES) == 20
    assert shuffled_guesses(FillLimits(GIB), dict.fromkeys(SIZES, SMALL_BYTES_MAX + 1)) == 0


def shuffled_guesses(limits: FillLimits, sizes: dict[str, int]) -> int:
    """How many files are fetched ahead while half of them are opened and not read."""
    ahead = 0

    async def scenario(rig: EngineRig) -> None:
        nonlocal ahead
        siblings = followed(rig, limits)
        for name in PATTERNS["shuffled"][: FILES // 2]:
            siblings.on_open(rig.inode(name))
            await trio.sleep(1)
        ahead = len({order.key for order in rig.fetcher.orders})

    run(scenario, sizes)
    return ahead


@pytest.mark.parametrize("listing", ["numeric", "alphabetical"])
@pytest.mark.parametrize("order", ["numeric", "alphabetical"])
def test_the_order_of_the_listing_and_others_are_learnt(listing: str, order: str) -> None:
    """img_2 before img_10 or behind it, whatever the listing says: most files are there when they are opened."""
    numeric, alphabetical = list(SIZES), sorted(SIZES)
    sizes = dict.fromkeys(numeric if listing == "numeric" else alphabetical, FILE_BYTES)
    names = numeric if order == "numeric" else alphabetical
    assert seconds(names, guessing=True, sizes=sizes) < seconds(names, guessing=False, sizes=sizes) / 5


@pytest.mark.parametrize(("files_max", "looks"), [(siblings_room.FILES_MAX, 1000), (26_000, 3000)])
def test_a_thousand_directories_are_followed_at_once(
    files_max: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of pictures, shuffled: each directory's names are looked at once, unless the bound allows for a hundred of them."""
    monkeypatch.setattr(siblings_room, "FILES_MAX", files_max)
    names = [f"{number:04}/{nth}.jpg" for nth in range(3) for number in range(1000)]
    document = {"data": {"files": [{"name": name, "size": FILE_BYTES} for name in names]}}
    manifest = from_json(json.dumps(document).encode(), mtime_ns=7)
    tree = build(manifest, as_root=False, local={}, inputs_dir="/valohai/inputs")
    siblings = SiblingAhead(tree, lambda _: Ahead.BEGUN, requests_ahead=lambda: 0, fill=UNBOUNDED)
    looked_at = []
    make = siblings._directory

    def counted(parent: Inode) -> Any:
        looked_at.append(parent)
        return make(parent)

    monkeypatch.setattr(siblings, "_directory", counted)
    for name in names:
        inode = tree.find(name)
        assert inode is not None
        siblings.on_open(inode)
    assert len(looked_at) == looks


def test_what_there_was_no_room_for_is_fetched_later() -> None:
    """Readahead may take three of these files at once: there is more to fetch than that, and none is forgotten."""

    async def scenario(rig: EngineRig) -> None:
        siblings = followed(rig)
        for name in SIZES:
            await read_whole(rig, name, siblings)
        assert rig.metrics.snapshot()["ahead_bytes"] >= (FILES - 4) * FILE_BYTES

    run(scenario, SIZES, window=3 * FILE_BYTES)


async def cached(rig: EngineRig) -> None:
    for name, content in rig.contents.items():
        rig.store.land(ObjectKey(name, FILE_BYTES), 0, content, '"v1"')


def test_cached_siblings_are_looked_at_a_few_at_a_time() -> None:
    """Upon one open, but each before it is opened: a window of them at once would hold up everybody."""

    async def scenario(rig: EngineRig) -> None:
        await cached(rig)
        siblings = followed(rig)
        foreseen = 0
        names = list(SIZES)
        for name in names[FILES // 2 :] + names[: FILES // 2]:
            foreseen += ObjectKey(name, FILE_BYTES) in rig.store.expected
            before = len(rig.store.expected)
            siblings.on_open(rig.inode(name))
            assert len(rig.store.expected) - before <= PRESENT_PER_OPEN
        assert foreseen >= FILES - 8
        assert not rig.fetcher.orders

    run(scenario, SIZES)


def test_what_is_cached_counts_for_nothing_when_a_directory_is_completed() -> None:
    """The bound is one of what is fetched."""

    async def scenario(rig: EngineRig) -> None:
        await cached(rig)
        opened, left = PATTERNS["shuffled"][: FILES // 2], PATTERNS["shuffled"][-40:]
        for name in left:
            rig.store.evict(ObjectKey(name, FILE_BYTES))
        siblings = followed(rig, FillLimits(20 * FILE_BYTES))
        for name in opened:
            siblings.on_open(rig.inode(name))
            await trio.sleep(1)
        assert len({order.key for order in rig.fetcher.orders}) == 20

    run(scenario, SIZES)


def test_readers_with_a_part_of_the_directory_each_are_followed_each() -> None:
    """Eight workers, 25 files each."""
    took_s = {}

    async def worker(rig: EngineRig, number: int, siblings: SiblingAhead | None) -> None:
        for nth in range(25):
            name = f"f{25 * number + nth}"
            handle = rig.open(name)
            if siblings is not None:
                siblings.on_open(rig.inode(name), 4000 + number)
            assert await rig.read(handle, 0, FILE_BYTES) == rig.contents[name]
            rig.reader.close(handle)
            await trio.sleep(0.002)

    for guessing in (True, False):

        async def scenario(rig: EngineRig, *, guessing: bool = guessing) -> None:
            siblings = followed(rig) if guessing else None
            began_t = trio.current_time()
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(worker, rig, number, siblings)
            took_s[guessing] = trio.current_time() - began_t

        run(scenario, SIZES)
    assert took_s[True] < 0.6 * took_s[False]


def test_when_the_pattern_breaks_nothing_more_is_guessed() -> None:
    """From the first file that fits no order on, only what is read is fetched."""

    async def scenario(rig: EngineRig) -> None:
        siblings = followed(rig)
        for number in range(20):
            await read_whole(rig, f"f{number}", siblings)
        await trio.sleep(1)

        def guesses() -> int:
            return sum(order.priority is Priority.AHEAD for order in rig.fetcher.orders)

        before = guesses()
        assert before > 20
        for number in (150, 111, 190, 130):
            siblings.on_open(rig.inode(f"f{number}"))
        await trio.sleep(1)
        assert guesses() == before

    run(scenario, SIZES)
