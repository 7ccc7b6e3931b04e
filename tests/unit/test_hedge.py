"""When a second request is worth it: late by the measure of its peers, and never more than the budget."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.hedge import (
    BUDGET,
    BURST,
    LATE_MIN_S,
    SAMPLES_MAX,
    SAMPLES_MIN,
    THROTTLED_PAUSE_S,
    Hedging,
)

SECONDS = st.floats(0, 100)


def after(*samples: float) -> Hedging:
    hedging = Hedging()
    for sample in samples:
        hedging.answered(sample)
    return hedging


def test_nothing_is_late_before_enough_is_known() -> None:
    hedging = after(*[0.02] * (SAMPLES_MIN - 1))
    assert hedging.late_after_s == 0
    assert not hedging.take(0)
    hedging.answered(0.02)
    assert hedging.late_after_s == LATE_MIN_S
    assert hedging.take(0)


def test_late_is_beyond_the_99th_percentile() -> None:
    """Evenly spread from 100 to 199 ms: twice the 95th percentile; nobody's answer so far was late."""
    hedging = after(*[0.1 + i / 1000 for i in range(100)])
    assert hedging.late_after_s == pytest.approx(2 * 0.195)


def test_a_long_tail_makes_patient() -> None:
    hedging = after(*[0.1] * 95, *[0.1] * 3, *[0.3] * 2)
    assert hedging.late_after_s == pytest.approx(1.25 * 0.3)


@pytest.mark.parametrize("stalled", [1, 2, 4])
def test_stalls_do_not_hide_stalls(stalled: int) -> None:
    """With 1-4 % of the answers a second late that second is not what an answer may take."""
    samples = [0.02] * (100 - stalled) + [1.02] * stalled
    random.Random(stalled).shuffle(samples)
    assert after(*samples).late_after_s < 0.1


def test_a_host_that_has_become_slower_is_the_new_measure() -> None:
    hedging = after(*[0.02] * SAMPLES_MAX, *[0.5] * (SAMPLES_MAX // 8))
    assert hedging.late_after_s >= 1.0


def test_a_host_that_throttles_is_left_alone() -> None:
    hedging = after(*[0.02] * 50)
    hedging.throttled(1000)
    assert not hedging.take(1000 + THROTTLED_PAUSE_S - 0.1)
    assert hedging.take(1000 + THROTTLED_PAUSE_S)


@given(late=st.lists(st.booleans(), min_size=1, max_size=400))
def test_the_budget_holds_however_many_are_late(late: list[bool]) -> None:
    """Over any stretch of requests no more hedges than BUDGET of them, and a burst."""
    hedging = after(*[0.02] * SAMPLES_MIN)
    hedges = []
    for is_late in late:
        hedging.sent()
        hedges.append(is_late and hedging.take(0))
    for start in range(0, len(hedges), 7):
        assert sum(hedges[start:]) <= BUDGET * (len(hedges) - start) + BURST


@given(samples=st.lists(SECONDS, min_size=SAMPLES_MIN, max_size=3 * SAMPLES_MAX))
def test_late_follows_the_last_samples_alone(samples: list[float]) -> None:
    """What is older is forgotten, whatever it was; and late is never sooner than all but a twentieth of the peers."""
    hedging = after(*samples)
    assert hedging.late_after_s == after(*samples[-SAMPLES_MAX:]).late_after_s
    last = sorted(samples[-SAMPLES_MAX:])
    assert hedging.late_after_s >= max(LATE_MIN_S, 2 * last[len(last) * 95 // 100])
    assert sum(sample > hedging.late_after_s for sample in last) <= len(last) / 20 + 1
