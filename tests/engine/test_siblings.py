"""Files opened one after the other: what guessing the next ones gains, and what it costs when it guesses wrong."""

from __future__ import annotations

import random

import pytest
import trio

from support.engine_rig import EngineRig, run
from support.prefetch_rig import tree_of
from valohai_fuse.engine.siblings import SiblingAhead
from valohai_fuse.ports import Priority

FILES = 200
FILE_BYTES = 100 * 1024
READ_BYTES = 32 * 1024
LINE_BYTES_S = 125e6
"""1 Gbit/s: on a slower line what was fetched in vain takes longer than its round trips."""
SIZES = {f"f{number}": FILE_BYTES for number in range(FILES)}


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
        siblings = SiblingAhead(tree_of(rig), rig.reader.fetch_ahead) if guessing else None
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


@pytest.mark.parametrize("listing", ["numeric", "alphabetical"])
@pytest.mark.parametrize("order", ["numeric", "alphabetical"])
def test_the_order_of_the_listing_and_others_are_learnt(listing: str, order: str) -> None:
    """img_2 before img_10 or behind it, whatever the listing says: most files are there when they are opened."""
    numeric, alphabetical = list(SIZES), sorted(SIZES)
    sizes = dict.fromkeys(numeric if listing == "numeric" else alphabetical, FILE_BYTES)
    names = numeric if order == "numeric" else alphabetical
    assert seconds(names, guessing=True, sizes=sizes) < seconds(names, guessing=False, sizes=sizes) / 5


def test_when_the_pattern_breaks_nothing_more_is_guessed() -> None:
    """From the first file that fits no order on, only what is read is fetched."""

    async def scenario(rig: EngineRig) -> None:
        siblings = SiblingAhead(tree_of(rig), rig.reader.fetch_ahead)
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
