"""When a file that is read at random is completed behind its reader: what it may cost at the most, and when it stops."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent
from valohai_fuse.model.fill import (
    FAILURES_MAX,
    MISSES_MIN,
    MISSES_MIN_ALONE,
    PAUSE_S,
    PIECE_BYTES_MAX,
    PIECE_BYTES_MIN,
    RATE_BYTES_S,
    RENT_TIMES,
    RUN_BYTES_MAX,
    SMALL_SHARE_MAX,
    SPENT_SHARE_MIN,
    WHOLE_SHARE_MIN,
    Fill,
)
from valohai_fuse.model.readahead import RANDOM_READ_BYTES, Planner

MIB = 1024 * 1024
GIB = 1024 * MIB


def read_at_random(
    fill: Fill, misses: int, *, within: Extent | None = None, waited_s: float = 0.02, start_s: float = 0.0
) -> float:
    """So many misses anywhere in `within`, by one of several threads; returns when the last one ended."""
    dice = random.Random(5)
    within = within or Extent(0, fill.size)
    now_s = start_s
    for _ in range(misses):
        now_s += waited_s
        start = dice.randrange(within.start, within.stop) // BLOCK_BYTES * BLOCK_BYTES
        fill.on_miss(start, RANDOM_READ_BYTES, waited_s, now_s, is_alone=False)
    return now_s


def misses_until_worth_it(
    fill: Fill, *, limit: int = 5000, waited_s: float = 0.02, is_alone: bool = False, seed: int = 5
) -> int:
    """After how many misses anywhere in the file it is worth completing; `limit` when it never is."""
    dice = random.Random(seed)
    for number in range(limit):
        if fill.is_worth_it:
            return number
        start = dice.randrange(fill.size) // BLOCK_BYTES * BLOCK_BYTES
        fill.on_miss(start, RANDOM_READ_BYTES, waited_s, number * waited_s, is_alone=is_alone)
    return limit


def ordered(fill: Fill, now_s: float) -> list[Extent]:
    """Carries out all pieces as if nothing was cached."""
    pieces = []
    while (piece := fill.piece(now_s)) is not None:
        pieces.append(piece)
        fill.ordered(len(piece))
    return pieces


def test_a_file_read_at_random_again_and_again_is_completed() -> None:
    """515 MiB, 20 ms away: after some hundred misses, in pieces that do not overlap and leave nothing out."""
    fill = Fill(515 * MIB + 17, 4 * GIB)
    now_s = read_at_random(fill, 600)
    pieces = sorted(ordered(fill, now_s))
    assert sum(map(len, pieces)) == fill.size
    assert all(one.stop == other.start for one, other in itertools.pairwise(pieces))
    assert fill.piece(now_s) is None


def test_a_short_random_workload_fetches_what_it_reads() -> None:
    """The threshold lies well above some hundred reads of a large file, and is reached within some hundred; of a file that is
    small beside what may be bought, as soon as it shows that there is no order in it."""
    assert 500 <= misses_until_worth_it(Fill(2 * GIB, 4 * GIB)) <= 600
    assert 120 <= misses_until_worth_it(Fill(513 * MIB, 4 * GIB)) <= 200
    assert MISSES_MIN <= misses_until_worth_it(Fill(512 * MIB, 4 * GIB)) <= 72
    assert MISSES_MIN <= misses_until_worth_it(Fill(30 * MIB, 4 * GIB)) <= 72


@pytest.mark.parametrize("size", [30 * MIB, 256 * MIB, 512 * MIB])
def test_a_reader_alone_shows_sooner_that_there_is_no_order(size: int) -> None:
    """Its misses come in the order of the program. A large file knows no haste."""
    found = sorted(misses_until_worth_it(Fill(size, 4 * GIB), is_alone=True, seed=seed) for seed in range(20))
    assert found[0] >= MISSES_MIN_ALONE
    assert found[10] <= 10
    assert found[-1] <= 40
    large = Fill(513 * MIB, 4 * GIB)
    assert misses_until_worth_it(large, is_alone=True) == misses_until_worth_it(Fill(513 * MIB, 4 * GIB))


def test_what_tells_where_things_are_is_no_disorder() -> None:
    """The end of a table, the beginning of a column, the end again, of one column after the other."""
    fill = Fill(60 * MIB, 4 * GIB)
    for number, start in enumerate(range(MIB, 59 * MIB, 2 * MIB)):
        fill.on_miss(60 * MIB - 4096, RANDOM_READ_BYTES, 0.02, number, is_alone=True)
        fill.on_miss(start, RANDOM_READ_BYTES, 0.02, number + 0.5, is_alone=True)
        assert not fill.is_worth_it


def test_a_second_reader_beside_it_takes_that_back() -> None:
    fill, now_s = Fill(30 * MIB, 4 * GIB), 0.0
    for start in (20, 5, 12, 3, 25, 1):
        now_s += 0.02
        fill.on_miss(start * MIB, RANDOM_READ_BYTES, 0.02, now_s, is_alone=True)
    assert fill.is_worth_it
    fill.on_miss(15 * MIB, RANDOM_READ_BYTES, 0.02, now_s, is_alone=False)
    assert not fill.is_worth_it


def read_while_it_fills(fill: Fill, *, within: Extent, reads: int = 5000) -> list[int]:
    """One reader at random in `within`, 20 ms away on a line of 1.2 GB/s, while hits take 0.1 ms: after each read, what was
    ordered so far."""
    dice, now_s, brought, total = random.Random(3), 0.0, set[int](), 0
    totals = []
    for _ in range(reads):
        start = dice.randrange(within.start, within.stop) // BLOCK_BYTES * BLOCK_BYTES
        if start in brought:
            now_s += 0.0001
            fill.on_hit(start, RANDOM_READ_BYTES)
        else:
            now_s += 0.02
            fill.on_miss(start, RANDOM_READ_BYTES, 0.02, now_s, is_alone=True)
        while total < 1.2e9 * now_s and (piece := fill.piece(now_s)) is not None:
            fill.ordered(len(piece))
            total += len(piece)
            brought.update(range(piece.start, piece.stop, BLOCK_BYTES))
        totals.append(total)
    return totals


def test_a_small_file_is_bought_in_instalments() -> None:
    """From the first misses on, and never more than the misses pay for and the hits that they have become."""
    size, each = 512 * MIB, RANDOM_READ_BYTES / (SPENT_SHARE_MIN * SMALL_SHARE_MAX)
    totals = read_while_it_fills(Fill(size, 4 * GIB), within=Extent(0, size))
    assert totals[MISSES_MIN_ALONE + 4] > 0
    assert all(total <= number * each + PIECE_BYTES_MAX for number, total in enumerate(totals, 1))
    assert totals[100] == size
    assert max(totals) == size


@pytest.mark.parametrize("part", [Extent(0, 160 * MIB), Extent(300 * MIB, 400 * MIB)])
def test_of_a_small_file_too_a_part_gets_that_part(part: Extent) -> None:
    """And what its misses paid for until that showed, for at first it looks like the whole: then nothing more, however long it is
    read."""
    totals = read_while_it_fills(Fill(512 * MIB, 4 * GIB), within=part)
    assert len(part) <= totals[-1] <= totals[100] + SEGMENT_BYTES
    assert totals[-1] <= 340 * MIB


def test_reads_anywhere_in_a_terabyte_cost_only_themselves() -> None:
    assert misses_until_worth_it(Fill(1024 * GIB, 4 * GIB), limit=20_000) == 20_000


def test_a_reader_that_keeps_to_a_part_gets_that_part() -> None:
    """200 MiB of 1 TB, read densely: those segments and no other."""
    fill = Fill(1024 * GIB, 4 * GIB)
    part = Extent(500 * GIB, 500 * GIB + 200 * MIB)
    pieces = ordered(fill, read_at_random(fill, 500, within=part))
    assert sum(map(len, pieces)) == len(part)
    assert all(part.start <= piece.start and piece.stop <= part.stop for piece in pieces)


@pytest.mark.parametrize("threads", [1, 8])
def test_one_pass_over_a_column_is_not_completed(threads: int) -> None:
    """A tenth of 2 GiB of parquet, in ascending pieces, by threads side by side; nor is a second column right after it."""
    fill = Fill(2 * GIB, 4 * GIB)
    for column in (MIB, 2 * MIB):
        pieces = range(column, 2 * GIB, 4 * MIB)
        lanes = [pieces[lane * len(pieces) // threads : (lane + 1) * len(pieces) // threads] for lane in range(threads)]
        for number, together in enumerate(itertools.zip_longest(*lanes)):
            for start in together:
                if start is not None:
                    fill.on_miss(start, 400 * 1024, 0.5, number * 0.5, is_alone=threads == 1)
                    assert not fill.is_worth_it


def test_a_file_that_is_read_all_over_in_sorted_batches_is_completed() -> None:
    """As h5py wants indices: each batch ascending, and then the next one from the beginning."""
    fill, dice = Fill(512 * MIB, 4 * GIB), random.Random(2)
    for batch in range(20):
        for start in sorted(dice.randrange(512 * MIB // BLOCK_BYTES) * BLOCK_BYTES for _ in range(32)):
            fill.on_miss(start, RANDOM_READ_BYTES, 0.02, batch, is_alone=False)
    assert fill.is_worth_it


def test_a_near_store_needs_no_fill() -> None:
    """Where a miss costs a millisecond, ten times as many are cheaper than completing the file: so much is bought of it."""
    fill = Fill(512 * MIB, 4 * GIB)
    now_s = read_at_random(fill, 300, waited_s=0.001)
    assert sum(map(len, ordered(fill, now_s))) <= RENT_TIMES * 0.3 * RATE_BYTES_S + PIECE_BYTES_MIN
    bytes_price = misses_until_worth_it(Fill(2 * GIB, 4 * GIB), waited_s=0.1)  # is the same everywhere
    assert bytes_price == misses_until_worth_it(Fill(2 * GIB, 4 * GIB), waited_s=0.02)


def test_a_slow_line_is_found_out() -> None:
    """What has come shows that it takes forty times as long as was thought: readers have not waited as long."""
    fill = Fill(512 * MIB, 4 * GIB)
    now_s = read_at_random(fill, 72)
    for _ in range(24):
        assert fill.piece(now_s) is not None
        fill.ordered(2 * MIB)
    for _ in range(24):
        fill.on_landed(2 * MIB, 2 * MIB / (RATE_BYTES_S / 40))
    assert fill.piece(now_s) is None
    now_s = read_at_random(fill, 72, start_s=now_s)
    assert fill.piece(now_s) is not None


def test_the_most_missed_comes_first() -> None:
    fill = Fill(512 * MIB, 4 * GIB)
    now_s = read_at_random(fill, 400)
    for _ in range(50):
        fill.on_miss(17 * SEGMENT_BYTES, RANDOM_READ_BYTES, 0.02, now_s, is_alone=False)
    assert [piece.start // SEGMENT_BYTES for piece in ordered(fill, now_s)[: SEGMENT_BYTES // PIECE_BYTES_MIN]] == [
        17
    ] * 4


@pytest.mark.parametrize("ending", ["run", "pause", "failures"])
def test_it_stops_when_the_pattern_does(ending: str) -> None:
    """A stream of more than a record, a pause, a store in trouble."""
    fill = Fill(512 * MIB, 4 * GIB)
    now_s = read_at_random(fill, 400)
    fill.on_run(RUN_BYTES_MAX - 1)
    assert fill.piece(now_s) is not None
    if ending == "run":
        fill.on_run(RUN_BYTES_MAX)
    elif ending == "pause":
        now_s += PAUSE_S + 1
    else:
        for _ in range(FAILURES_MAX):
            fill.failed()
    assert fill.piece(now_s) is None
    fill.on_miss(0, RANDOM_READ_BYTES, 0.02, now_s, is_alone=False)
    assert fill.piece(now_s) is None


def test_a_piece_is_never_ordered_twice_over() -> None:
    """A cache that loses what it is given: each piece is paid for once."""
    fill = Fill(64 * MIB, 4 * GIB)
    now_s = read_at_random(fill, 200)
    orders = 0
    while fill.piece(now_s) is not None:
        fill.ordered(BLOCK_BYTES)  # again and again the first block of what is missing
        orders += BLOCK_BYTES
    assert orders == fill.size


def test_the_planner_tells_scattered_reads_from_the_others() -> None:
    planner = Planner(GIB, 64 * MIB)
    assert not planner.on_read(0, 4096).is_scattered  # the beginning
    assert planner.on_read(100 * MIB, 100 * MIB + 4096).is_scattered
    assert not planner.on_read(100 * MIB + 4096, 101 * MIB).is_scattered  # goes on
    assert planner.on_read(101 * MIB, 102 * MIB).run_bytes == 2 * MIB
    strided = [planner.on_read(at * MIB, at * MIB + 4096).is_scattered for at in range(200, 400, 10)]
    assert not any(strided[4:])


@given(
    size=st.integers(1, 40 * SEGMENT_BYTES),
    bytes_max=st.integers(0, 30 * SEGMENT_BYTES),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["miss", "misses", "run", "order", "orders", "done", "landed"]), st.integers(0, 2**40)
        ),
        max_size=60,
    ),
    is_alone=st.booleans(),
)
def test_bounds_hold_whatever_happens(size: int, bytes_max: int, steps: list[tuple[str, int]], is_alone: bool) -> None:
    """Pieces lie within the file and one segment, on segments in which misses fell; never more than `bytes_max` and a piece in
    all, nor before misses have fetched their share of it."""
    fill = Fill(size, bytes_max)
    now_s, spent, total = 0.0, 0, 0
    touched: set[int] = set()
    for kind, value in steps:
        now_s += value % 7
        if kind in {"miss", "misses"}:
            for nth in range(1 if kind == "miss" else 100):
                start = (value + nth * 7 * BLOCK_BYTES) % size // BLOCK_BYTES * BLOCK_BYTES
                touched.add(start // SEGMENT_BYTES)
                fill.on_miss(start, RANDOM_READ_BYTES, 0.2, now_s, is_alone=is_alone)
                spent += RANDOM_READ_BYTES
        elif kind == "run":
            fill.on_run(value)
        elif kind == "landed":
            fill.on_landed(value % MIB, 0.01)
        else:
            for _ in range(30 if kind == "orders" else 1):
                piece = fill.piece(now_s)
                if piece is None:
                    break
                assert 0 <= piece.start < piece.stop <= size
                assert piece.start % BLOCK_BYTES == 0
                assert len(piece) <= PIECE_BYTES_MAX
                assert piece.start // SEGMENT_BYTES == (piece.stop - 1) // SEGMENT_BYTES
                assert piece.start // SEGMENT_BYTES in touched or len(touched) * SEGMENT_BYTES >= size * WHOLE_SHARE_MIN
                if kind == "done":
                    fill.is_ordered()
                else:
                    fill.ordered(len(piece))
                    total += len(piece)
    assert total <= bytes_max + PIECE_BYTES_MAX
    assert total <= spent / (SPENT_SHARE_MIN * SMALL_SHARE_MAX) + SEGMENT_BYTES
