"""The retry policy as a table, and its bounds for any sequence of failures."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.errors import (
    AccessRefusedError,
    ConfigurationError,
    DeadlineExceededError,
    ObjectChangedError,
    ObjectMissingError,
    ReadError,
    StoreUnavailableError,
    UnsupportedLocationError,
    ValohaiFuseError,
)
from valohai_fuse.model.retry import (
    Decision,
    GiveUp,
    Renew,
    RetryAfter,
    RetryState,
    parse_http_date,
    parse_retry_after,
)
from valohai_fuse.ports import FailureKind, FetchFailed


def _state() -> RetryState:
    return RetryState(random=lambda: 0.5)


def _after(state: RetryState, kind: FailureKind, elapsed_s: float = 1.0, **rest: float | None) -> Decision:
    return state.after(
        FetchFailed(kind, "why", retry_after_s=rest.pop("retry_after_s", None)),
        elapsed_s=elapsed_s,
        deadline_s=300.0,
        **rest,
    )


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (FailureKind.MISSING, ObjectMissingError),
        (FailureKind.CHANGED, ObjectChangedError),
        (FailureKind.FORBIDDEN, UnsupportedLocationError),
    ],
)
def test_final_at_once(kind: FailureKind, error: type[ValohaiFuseError]) -> None:
    """Repeating does not bring an object back."""
    assert _after(_state(), kind) == GiveUp(error, "why")


def test_a_refusal_renews_once_and_a_second_one_is_real() -> None:
    """A fresh URL that is refused again is a real refusal."""
    state = _state()
    assert _after(state, FailureKind.REFUSED) == Renew()
    decision = _after(state, FailureKind.REFUSED, 2.0, lease_age_s=0.2)
    assert isinstance(decision, GiveUp)
    assert decision.error_class is AccessRefusedError
    assert "why" in decision.message


def test_without_ages_the_second_refusal_is_real() -> None:
    """An engine that does not know how old its URL is gets one renewal."""
    state = _state()
    assert _after(state, FailureKind.REFUSED) == Renew()
    assert isinstance(_after(state, FailureKind.REFUSED, 2.0), GiveUp)


def test_a_url_minted_for_this_flight_is_not_renewed_again() -> None:
    """Also when the renewal came from expiry and not from a refusal."""
    assert isinstance(_after(_state(), FailureKind.REFUSED, 2.0, lease_age_s=1.5), GiveUp)


def test_a_url_minted_for_somebody_else_is_renewed() -> None:
    """It may have died early, as those of temporary credentials do."""
    state = _state()
    assert _after(state, FailureKind.REFUSED, 2.0, lease_age_s=900.0) == Renew()
    assert isinstance(_after(state, FailureKind.REFUSED, 3.0, lease_age_s=0.5), GiveUp)


def test_old_urls_do_not_renew_for_ever() -> None:
    """Three renewals in a row are the most, whatever the ages say."""
    state = _state()
    decisions = [_after(state, FailureKind.REFUSED, 2.0, lease_age_s=900.0) for _ in range(4)]
    assert decisions[:3] == [Renew()] * 3
    assert isinstance(decisions[3], GiveUp)


def test_progress_permits_another_renewal() -> None:
    """A URL that died after it had served bytes was good."""
    state = _state()
    assert _after(state, FailureKind.REFUSED) == Renew()
    state.progressed(elapsed_s=60.0)
    assert _after(state, FailureKind.REFUSED, 61.0, lease_age_s=60.0) == Renew()


def test_transient_backs_off_and_ends_by_the_deadline() -> None:
    """The limit doubles up to 15 s; the last pause is cut so that there is a try just before the end; the error names its cause."""
    state, elapsed_s, delays = _state(), 0.0, []
    while isinstance(decision := _after(state, FailureKind.TRANSIENT, elapsed_s), RetryAfter):
        delays.append(decision.delay_s)
        elapsed_s += decision.delay_s
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert max(delays) == 7.5
    assert 299 <= elapsed_s <= 300
    assert isinstance(decision, GiveUp)
    assert decision.error_class is DeadlineExceededError
    assert "why" in decision.message


def test_the_limit_fits_a_short_deadline() -> None:
    """With five seconds in all no single pause takes more than half a second."""
    state = RetryState(random=lambda: 0.999)
    for _ in range(12):
        decision = state.after(FetchFailed(FailureKind.TRANSIENT, "why"), elapsed_s=0.0, deadline_s=5.0)
        assert isinstance(decision, RetryAfter)
        assert decision.delay_s <= 0.5


def test_retry_after_is_honoured_and_capped() -> None:
    """Not before the store said, with a little jitter on top; never more than a minute for that."""
    decision = _after(_state(), FailureKind.THROTTLED, retry_after_s=7.0)
    assert decision == RetryAfter(7.5)
    assert _after(_state(), FailureKind.THROTTLED, retry_after_s=86400.0) == RetryAfter(60.5)


def test_retry_after_beyond_the_deadline_gives_up_now() -> None:
    """There is no use in asking before the store wants to be asked."""
    decision = _after(_state(), FailureKind.THROTTLED, 280.0, retry_after_s=30.0)
    assert isinstance(decision, GiveUp)
    assert decision.error_class is DeadlineExceededError


@pytest.mark.parametrize(
    ("kind", "retries", "error"),
    [
        (FailureKind.PROTOCOL, 3, StoreUnavailableError),
        (FailureKind.WORKER_LOST, 5, ReadError),
        (FailureKind.DISK, 4, ReadError),
    ],
)
def test_what_may_be_the_orders_own_fault_is_repeated_a_few_times(
    kind: FailureKind, retries: int, error: type[ValohaiFuseError]
) -> None:
    """And begins anew when bytes have landed."""
    state = _state()
    for _ in range(2):
        decisions = [_after(state, kind) for _ in range(retries + 1)]
        assert all(isinstance(decision, RetryAfter) for decision in decisions[:-1])
        assert isinstance(decisions[-1], GiveUp)
        assert decisions[-1].error_class is error
        state.progressed(elapsed_s=1.0)


@pytest.mark.parametrize("kind", [FailureKind.WORKER_LOST, FailureKind.DISK])
def test_our_own_failures_are_repeated_at_once(kind: FailureKind) -> None:
    """The store has nothing to recover from."""
    assert _after(_state(), kind) == RetryAfter(0.0)


def test_errors_of_the_leases() -> None:
    """Valohai's API being down is waited for; a dead token is not."""
    down = _state().after(StoreUnavailableError("api down"), elapsed_s=1.0, deadline_s=300.0)
    assert down == RetryAfter(0.1)
    dead = _state().after(ConfigurationError("no api.json", hint="h"), elapsed_s=1.0, deadline_s=300.0)
    assert dead == GiveUp(ConfigurationError, "no api.json", "h")
    assert isinstance(dead.error(), ConfigurationError)
    assert dead.error().hint == "h"


@given(
    st.lists(st.tuples(st.sampled_from(FailureKind), st.one_of(st.none(), st.floats(-5, 1e6))), max_size=60),
    st.floats(0.1, 1000),
    st.integers(0, 2**32),
)
def test_delays_stay_within_the_deadline(
    failures: list[tuple[FailureKind, float | None]], deadline_s: float, seed: int
) -> None:
    """For any failures in any order, every kind is decided, and a pause never ends after the deadline."""
    state, elapsed_s = RetryState(random=random.Random(seed).random), 0.0
    for kind, retry_after_s in failures:
        decision = state.after(
            FetchFailed(kind, "why", retry_after_s=retry_after_s), elapsed_s=elapsed_s, deadline_s=deadline_s
        )
        if isinstance(decision, RetryAfter):
            assert decision.delay_s >= 0
            elapsed_s += decision.delay_s
            assert elapsed_s <= deadline_s
        elif isinstance(decision, GiveUp):
            assert issubclass(decision.error_class, ReadError)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7.0),
        (" 120 ", 120.0),
        ("Sat, 01 Nov 2025 10:00:07 GMT", 7.0),
        ("Sat, 01 Nov 2025 09:00:00 GMT", 0.0),
        ("-1", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_in_both_forms(value: str | None, expected: float | None) -> None:
    """Seconds or a date by the server's clock."""
    assert parse_retry_after(value, 1761991200.0) == expected


@given(st.text(max_size=60))
def test_http_dates_never_raise(text: str) -> None:
    """Whatever a server sends as its Date."""
    assert parse_http_date(text) is None or isinstance(parse_http_date(text), float)
