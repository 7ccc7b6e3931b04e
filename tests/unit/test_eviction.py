"""What to throw away: `model.eviction`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.eviction import Budget, Oldest, Segment

GIB = 2**30


@pytest.mark.parametrize(
    ("budget", "cached", "free", "expected"),
    [
        (Budget(), 900, 0, 0),
        (Budget(bytes_max=1000), 1000, 0, 0),
        (Budget(bytes_max=1000), 1001, 0, 11),
        (Budget(free_min_bytes=1000), 5000, 1000, 0),
        (Budget(free_min_bytes=1000), 5000, 900, 110),
        (Budget(free_min_share=0.1), 5000, 1000, 0),
        (Budget(free_min_share=0.1), 5000, 900, 110),
        (Budget(free_min_share=0.1, free_min_bytes=2000), 5000, 1000, 1020),
        (Budget(bytes_max=4000, free_min_bytes=1000), 5000, 900, 1040),
        (Budget(free_min_bytes=1000), 50, 0, 50),
    ],
)
def test_how_much_must_go(budget: Budget, cached: int, free: int, expected: int) -> None:
    """Enough for both bounds and one percent more, never more than there is. The file system has 10,000 bytes."""
    assert budget.excess_bytes(cached, free, 10_000) == expected


segments = st.lists(
    st.builds(Segment, used_at_ns=st.integers(0, 50), name=st.text(max_size=3), bytes_on_disk=st.integers(0, 100)),
    max_size=60,
)


@given(segments, st.integers(0, 2000))
def test_the_oldest_that_cover_the_excess_and_no_more(offered: list[Segment], wanted: int) -> None:
    oldest = Oldest(wanted)
    for candidate in offered:
        oldest.offer(candidate)
    chosen = oldest.chosen()
    total = sum(candidate.bytes_on_disk for candidate in chosen)
    assert total >= min(wanted, sum(candidate.bytes_on_disk for candidate in offered))
    assert [c.used_at_ns for c in chosen] == sorted(c.used_at_ns for c in chosen)
    if chosen:
        newest = chosen[-1].used_at_ns
        kept = [c.used_at_ns for c in offered if c.bytes_on_disk and c not in chosen]
        assert all(used_at_ns >= newest for used_at_ns in kept), "nothing older stays"
        newest_bytes = max(c.bytes_on_disk for c in chosen if c.used_at_ns == newest)  # of one age, any may be the last
        assert total - newest_bytes < wanted, "without the newest of them it would not be enough"


def test_only_what_goes_is_kept_in_mind() -> None:
    oldest = Oldest(100)
    for n in range(10_000):
        oldest.offer(Segment((n * 7919) % 10_007, "", 10))
    assert len(oldest.chosen()) == 10
