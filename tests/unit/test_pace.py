"""Pace: small requests where a connection is slow by itself, and only there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.model.pace import FEW, MANY, PIECE_BYTES, Pace

MIB = 1024 * 1024
WANTED = Extent(SEGMENT_BYTES, 3 * SEGMENT_BYTES)


def told(pace: Pace, rate_mb_s: float, under_way: int, answers: int = 1, byte_count: int = SEGMENT_BYTES) -> Pace:
    for _ in range(answers):
        pace.note(byte_count, byte_count / (rate_mb_s * 1e6), under_way)
    return pace


def is_small(pace: Pace) -> bool:
    sizes = {len(request) for request in pace.requests(WANTED)}
    assert sizes in ({PIECE_BYTES}, {SEGMENT_BYTES})
    return sizes == {PIECE_BYTES}


def test_requests_are_small_until_a_connection_is_known_to_be_fast() -> None:
    pace = Pace()
    assert is_small(pace)
    assert not is_small(told(pace, 900, FEW))


@pytest.mark.parametrize("under_way", [1, FEW, MANY, 30])
def test_a_store_that_sends_80_mb_a_second_on_each_connection(under_way: int) -> None:
    assert is_small(told(Pace(), 80, under_way))


def test_connections_that_are_slow_together_share_a_line() -> None:
    """A line of 125 MB/s: the first ones had it to themselves. And one over TLS, where the processor is the line."""
    for alone, together in ((110, 10), (540, 100)):
        pace = told(told(Pace(), alone, FEW), together, MANY)
        assert not is_small(pace)


def test_a_store_that_stops_being_fast_is_judged_anew_and_so_is_one_that_recovers() -> None:
    pace = told(told(Pace(), 900, FEW, 3), 900, MANY, 100)
    told(told(pace, 80, FEW, 30), 80, MANY, 30)
    assert is_small(pace)
    assert not is_small(told(pace, 900, MANY, 30))


def test_an_answer_out_of_a_buffer_counts_for_little() -> None:
    """Short ones for nothing; long ones for no more than their number."""
    pace = told(Pace(), 80, MANY, 20)
    assert is_small(told(pace, 5000, FEW, 50, byte_count=2 * MIB))
    assert is_small(told(pace, 5000, MANY))
    pace.note(SEGMENT_BYTES, 0.0, MANY)
    assert not is_small(told(pace, 5000, MANY, 20))


@given(
    start=st.integers(0, 3 * SEGMENT_BYTES), length=st.integers(1, 4 * SEGMENT_BYTES), rate=st.sampled_from([80, 900])
)
def test_requests_cover_what_is_wanted_and_stay_within_segments(start: int, length: int, rate: int) -> None:
    wanted = Extent(start, start + length)
    requests = list(told(Pace(), rate, MANY).requests(wanted))
    assert [request.start for request in requests] == [start, *(request.stop for request in requests[:-1])]
    assert requests[-1].stop == wanted.stop
    assert all(request.start // SEGMENT_BYTES == (request.stop - 1) // SEGMENT_BYTES for request in requests)
