"""The readahead planner: same reads in, same plans out; what each kind of reader costs."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES, Extent, align, split_by_segment
from valohai_fuse.model.readahead import FIRST_READ_BYTES, RANDOM_READ_BYTES, Plan, Planner
from valohai_fuse.model.stride import TRIED_PIECES

MIB = 1024 * 1024
GIB = 1024 * MIB


class Ledger:
    """Executes plans as the engine would with an empty cache: counts requests and bytes of what was not fetched before."""

    def __init__(self, size: int, window: int = 64 * MIB) -> None:
        self.planner = Planner(size, window)
        self.size = size
        self.fetched: set[int] = set()
        self.requests = 0

    def read(self, start: int, stop: int) -> Plan:
        stop = min(stop, self.size)
        plan = self.planner.on_read(start, stop)
        whole = (
            [plan.demand, plan.ahead]
            if plan.ahead.start != plan.demand.stop
            else [Extent(plan.demand.start, plan.ahead.stop)]
        )
        for extent in (*whole, *plan.elsewhere):
            for part in split_by_segment(extent):
                blocks = set(range(part.start // BLOCK_BYTES, -(-part.stop // BLOCK_BYTES))) - self.fetched
                self.requests += bool(blocks)
                self.fetched |= blocks
        return plan

    @property
    def fetched_bytes(self) -> int:
        return len(self.fetched) * BLOCK_BYTES


def kernel_sequential(ledger: Ledger, start: int, stop: int) -> None:
    """The requests that a tuned kernel sends for a sequential reader: 16 KiB, then growing to 1 MiB."""
    position, step = start, 16 * 1024
    while position < stop:
        ledger.read(position, min(position + step, stop))
        position += step
        step = min(step * 2, MIB)


def test_head_of_a_large_file_fetches_one_mebibyte() -> None:
    """`head -c 4096` of a 1 GiB file costs at most 1.25 MiB."""
    ledger = Ledger(GIB)
    ledger.read(0, 16 * 1024)
    assert ledger.fetched_bytes == FIRST_READ_BYTES
    assert ledger.requests == 1


def test_random_reads_fetch_no_more_than_two_blocks() -> None:
    """A random 4 KiB read costs at most 256 KiB, in one request, and nothing is fetched ahead of it."""
    ledger = Ledger(GIB)
    for count, offset in enumerate((977 * MIB + 4096, 13 * MIB, 500 * MIB + 60 * 1024, 250 * MIB, 3 * MIB), start=1):
        ledger.read(offset, offset + 4096)
        assert ledger.requests == count
        assert ledger.fetched_bytes == count * RANDOM_READ_BYTES


def test_a_sequential_stream_costs_few_requests() -> None:
    """256 MiB in sequence take at most 48 requests: refilled at half-empty, in parts that end with a segment."""
    ledger = Ledger(256 * MIB)
    kernel_sequential(ledger, 0, 256 * MIB)
    assert ledger.requests <= 48
    assert ledger.fetched_bytes == 256 * MIB


def test_the_window_grows_with_what_was_read() -> None:
    """A stream that ends anywhere has cost at most three times what it read, and a long one has its full window."""
    ledger = Ledger(GIB)
    for step in range(1, 128):
        ledger.read((step - 1) * MIB, step * MIB)
        assert ledger.fetched_bytes <= 3 * step * MIB + FIRST_READ_BYTES
    assert ledger.fetched_bytes >= (127 + 56) * MIB


def test_a_stream_in_the_middle_of_a_file_earns_its_window() -> None:
    ledger = Ledger(GIB)
    kernel_sequential(ledger, 300 * MIB, 310 * MIB)
    assert ledger.fetched_bytes >= 15 * MIB


def test_two_streams_on_one_handle_do_not_disturb_each_other() -> None:
    ledger = Ledger(GIB)
    for step in range(64):
        for base in (0, 512 * MIB):
            ledger.read(base + step * MIB, base + (step + 1) * MIB)
    assert ledger.fetched_bytes >= 2 * (64 + 24) * MIB
    assert ledger.requests <= 56


def test_reordered_kernel_readahead_stays_one_stream() -> None:
    """The kernel's asynchronous readahead may arrive out of order; the window must not collapse."""
    ledger = Ledger(256 * MIB)
    kernel_sequential(ledger, 0, 8 * MIB)
    for position in range(8, 200, 2):
        ledger.read((position + 1) * MIB, (position + 2) * MIB)
        ledger.read(position * MIB, (position + 1) * MIB)
    assert ledger.requests <= 60


def foreseen(ledger: Ledger, pieces: list[tuple[int, int]]) -> int:
    """How many of the pieces were fetched before they were read."""
    count = 0
    for start, stop in pieces:
        count += all(block in ledger.fetched for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)))
        for at in range(start, stop, MIB):
            ledger.read(at, min(at + MIB, stop))
    return count


def test_regular_jumps_are_foreseen() -> None:
    """Read 1 MiB, jump 17 MiB: all but the first few pieces are there, and hardly more is fetched than is read."""
    ledger = Ledger(GIB)
    pieces = [(start, start + MIB) for start in range(0, GIB, 18 * MIB)]
    assert foreseen(ledger, pieces) >= len(pieces) - 5
    assert ledger.fetched_bytes <= 1.2 * len(pieces) * MIB


def test_reading_backwards_is_foreseen() -> None:
    ledger = Ledger(256 * MIB)
    pieces = [(start, start + MIB) for start in range(255 * MIB, -1, -MIB)]
    assert foreseen(ledger, pieces) >= len(pieces) - 5
    assert ledger.fetched_bytes == 256 * MIB


def test_small_strides_are_foreseen() -> None:
    """128 KiB of every 4 MiB."""
    ledger = Ledger(GIB)
    pieces = [(start, start + 128 * 1024) for start in range(0, GIB, 4 * MIB)]
    assert foreseen(ledger, pieces) >= len(pieces) - 5
    assert ledger.fetched_bytes <= 2 * len(pieces) * 128 * 1024 + FIRST_READ_BYTES


def test_a_stride_that_ends_costs_little() -> None:
    """The pieces planned in vain are three times as many as were read at the most."""
    ledger = Ledger(GIB)
    pieces = [(start, start + MIB) for start in range(0, 180 * MIB, 18 * MIB)]
    foreseen(ledger, pieces)
    assert ledger.fetched_bytes <= (1 + 3) * len(pieces) * MIB
    before = ledger.fetched_bytes
    ledger.read(900 * MIB, 900 * MIB + 4096)
    ledger.read(333 * MIB, 333 * MIB + 4096)
    assert ledger.fetched_bytes - before <= 2 * RANDOM_READ_BYTES


def test_two_jumps_alike_are_worth_a_try() -> None:
    """The fourth place is fetched before it is read; in vain it has cost little more than what was read."""
    ledger = Ledger(GIB)
    pieces = [(start, start + MIB) for start in range(18 * MIB, 90 * MIB, 18 * MIB)]
    assert foreseen(ledger, pieces[:3]) == 0
    assert ledger.fetched_bytes == (3 + TRIED_PIECES) * MIB
    assert foreseen(ledger, pieces[3:]) == 1


def test_a_first_jump_over_as_much_as_was_read_is_worth_one_piece() -> None:
    """The third place is fetched before it is read. Who reads a header only, comes from elsewhere or has jumped before, jumps for
    itself."""
    pieces = [(start, start + MIB) for start in range(0, 90 * MIB, 18 * MIB)]
    ledger = Ledger(GIB)
    assert foreseen(ledger, pieces[:2]) == 0
    assert ledger.fetched_bytes == 3 * MIB
    assert foreseen(ledger, pieces[2:]) == 3
    for before in ([(0, 4096)], [(MIB, 2 * MIB)], [(0, MIB), (500 * MIB, 501 * MIB), (300 * MIB, 301 * MIB)]):
        ledger = Ledger(GIB)
        foreseen(ledger, before)
        fetched_bytes = ledger.fetched_bytes
        assert foreseen(ledger, [(18 * MIB, 19 * MIB)]) == 0
        assert ledger.fetched_bytes == fetched_bytes + MIB


def read_records(ledger: Ledger, sizes: list[int], *, seed: int = 4) -> list[int]:
    """At each of so many places anywhere 16 KiB, and then what is behind that; how many requests each took."""
    dice = random.Random(seed)
    requests = []
    for size in sizes:
        before = ledger.requests
        start = dice.randrange(1, ledger.size // (4 * MIB)) * 4 * MIB + dice.randrange(4096)
        ledger.read(start, start + 16 * 1024)
        ledger.read(start + 16 * 1024, start + size)
        requests.append(ledger.requests - before)
    return requests


def test_records_that_are_read_in_two_steps_are_fetched_in_one() -> None:
    """Once five of them have shown how long they are; and nothing is fetched ahead of what is no stream."""
    ledger = Ledger(400 * GIB)
    assert read_records(ledger, [400 * 1024] * 50) == [2] * 5 + [1] * 45
    before = ledger.fetched_bytes
    assert read_records(ledger, [400 * 1024] * 50, seed=5) == [1] * 50
    assert ledger.fetched_bytes - before <= 50 * (400 + 2 * 64) * 1024


def test_a_record_is_bounded_by_the_window() -> None:
    """To the byte, also where a block at the end of the file is not whole."""
    planner = Planner(1114115, MIB)
    for start, length in ((4, 1), (7, 1), (6, 1), (3, 1114112), (2, 1114112), (1, 1)):
        plan = planner.on_read(start, min(start + length, 1114115))
        assert len(plan.ahead) <= MIB
    read_records(ledger := Ledger(400 * GIB, window=0), [400 * 1024] * 10)
    assert ledger.fetched_bytes <= 10 * (400 + 2 * 128) * 1024


def test_one_long_record_among_short_ones_says_nothing() -> None:
    ledger = Ledger(400 * GIB)
    read_records(ledger, [20 * 1024] * 20)
    read_records(ledger, [MIB], seed=6)
    before = ledger.fetched_bytes
    read_records(ledger, [20 * 1024] * 20, seed=7)
    assert ledger.fetched_bytes - before <= 20 * RANDOM_READ_BYTES


def test_a_record_reader_that_reads_on_is_a_stream() -> None:
    """With the window of one: what is ahead of 8 MiB is as much again."""
    ledger = Ledger(400 * GIB)
    read_records(ledger, [400 * 1024] * 10)
    kernel_sequential(ledger, 7 * GIB, 7 * GIB + 8 * MIB)
    ahead = [
        block for block in range((7 * GIB + 8 * MIB) // BLOCK_BYTES, 8 * GIB // BLOCK_BYTES) if block in ledger.fetched
    ]
    assert 8 * MIB <= len(ahead) * BLOCK_BYTES <= 16 * MIB


def test_no_window_means_demand_only() -> None:
    ledger = Ledger(GIB, window=0)
    kernel_sequential(ledger, 0, 32 * MIB)
    assert ledger.fetched_bytes == 32 * MIB


reads = st.lists(st.tuples(st.integers(0, 70 * MIB), st.integers(1, 2 * MIB)), max_size=60)


@given(size=st.integers(1, 64 * MIB), pattern=reads, window=st.sampled_from([0, MIB, 8 * MIB, 64 * MIB]))
def test_plans_are_well_formed(size: int, pattern: list[tuple[int, int]], window: int) -> None:
    """Demand is the read's whole blocks; ahead never overlaps it, never leaves the file, never exceeds the window."""
    planner, twin = Planner(size, window), Planner(size, window)
    for offset, length in pattern:
        if offset >= size:
            continue
        stop = min(offset + length, size)
        plan = planner.on_read(offset, stop)
        assert plan == twin.on_read(offset, stop)
        assert plan.demand == align(offset, stop, size)
        assert not plan.ahead or plan.ahead.start >= plan.demand.stop
        assert plan.ahead.stop <= size
        assert len(plan.ahead) <= max(window, RANDOM_READ_BYTES)
        assert plan.ahead.start % BLOCK_BYTES == 0 or plan.ahead.start == size
        assert plan.ahead.stop % BLOCK_BYTES == 0 or plan.ahead.stop == size
        assert sum(map(len, plan.elsewhere)) <= 3 * window
        for piece in plan.elsewhere:
            assert piece
            assert piece.stop <= size
            assert piece.start % BLOCK_BYTES == 0


@given(start=st.integers(0, 10 * SEGMENT_BYTES), length=st.integers(0, 3 * SEGMENT_BYTES))
def test_split_by_segment_covers_exactly(start: int, length: int) -> None:
    parts = list(split_by_segment(Extent(start, start + length)))
    assert sum(len(part) for part in parts) == length
    assert all(part.start // SEGMENT_BYTES == (part.stop - 1) // SEGMENT_BYTES for part in parts)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
