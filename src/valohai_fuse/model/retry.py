"""What to do after a failed fetch: wait and repeat, renew the URL, or give up, and with which error.

One `RetryState` belongs to one flight and is asked after each failure. Decides from the kind of the failure alone:

- TRANSIENT and THROTTLED end by the *deadline* of the read, never by a count: until then they are repeated with exponential
  backoff and full jitter (a delay drawn from [0, limit)), so that readers who failed together do not come back together.
- REFUSED asks for one renewal. A URL that was minted for this very flight and is refused too is a real refusal.
- WORKER_LOST and DISK are repeated at once, PROTOCOL after a pause; each a few times only, for the cause may be the order
  itself. MISSING, CHANGED and FORBIDDEN are final.

Invariants: no state outlives the flight; the same failures and the same random numbers give the same decisions; a delay never
reaches beyond the deadline. Must not know clocks, URLs or who reads: times come in as durations since the flight began.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from valohai_fuse.errors import (
    AccessRefusedError,
    DeadlineExceededError,
    ObjectChangedError,
    ObjectMissingError,
    ReadError,
    StoreUnavailableError,
    UnsupportedLocationError,
    ValohaiFuseError,
)
from valohai_fuse.model.failure import FailureKind, FetchFailed

LAST_TRY_S: Final = 1.0
"""A pause that would end after the deadline is cut to end this much before it: giving up there instead would tell the reader up to
a whole pause early, and the store may be back by then."""
RETRY_AFTER_MAX_S: Final = 60.0
"""A store that asks for more is asked again after this: hours in a Retry-After are a misconfiguration more often than not."""
FRESH_URL_S: Final = 30.0
"""A refused URL younger than this, and minted for the flight, is a denial; an older one may have died of age in a queue."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The figures. The first limit is small because most failures are a kept connection that the store closed meanwhile;
    the largest is 15 s (JuiceFS and mountpoint-s3 stop near there), or a tenth of the deadline where that is less."""

    transient_base_s: float = 0.2
    throttled_base_s: float = 1.0
    delay_max_s: float = 15.0
    renewals_max: int = 3
    protocol_retries_max: int = 3
    worker_lost_retries_max: int = 5
    disk_retries_max: int = 4


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Repeat the order after `delay_s` (0: at once)."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Renew:
    """Ask the leases for another URL, naming the refused one, and repeat the order at once."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the flight with this error."""

    error_class: type[ValohaiFuseError]
    message: str
    hint: str | None = None

    def error(self) -> ValohaiFuseError:
        """A new exception on each call: each waiter raises its own."""
        return self.error_class(self.message, hint=self.hint)


Decision = RetryAfter | Renew | GiveUp

_FINAL: Final[dict[FailureKind, type[ReadError]]] = {
    FailureKind.MISSING: ObjectMissingError,
    FailureKind.CHANGED: ObjectChangedError,
    FailureKind.FORBIDDEN: UnsupportedLocationError,
}


class RetryState:
    """The failures of one flight so far. Not shared between flights; `random` gives floats in [0, 1)."""

    def __init__(self, *, random: Callable[[], float], policy: RetryPolicy | None = None) -> None:
        self._random = random
        self._policy = policy or RetryPolicy()
        self._counts: dict[FailureKind, int] = {}
        self._since_s = 0.0

    def progressed(self, *, elapsed_s: float) -> None:
        """Bytes have landed since the last failure: what counts as "in a row" begins anew."""
        self._counts.clear()
        self._since_s = elapsed_s

    def after(
        self,
        failure: FetchFailed | ValohaiFuseError,
        *,
        elapsed_s: float,
        deadline_s: float,
        lease_age_s: float | None = None,
    ) -> Decision:
        """What to do now. `elapsed_s` and `deadline_s` count from the start of the flight.

        `lease_age_s` is the age of the URL that was used, None when it came from the manifest (or is not known). Errors of
        the leases may be passed as well: StoreUnavailableError is then as good as TRANSIENT, any other is final.
        """
        if isinstance(failure, ValohaiFuseError):
            if not isinstance(failure, StoreUnavailableError):
                return GiveUp(type(failure), failure.message, failure.hint)
            failure = FetchFailed(FailureKind.TRANSIENT, failure.message)
        kind = failure.kind
        final = _FINAL.get(kind)
        if final is not None:
            return GiveUp(final, failure.detail)
        attempt = self._counts.get(kind, 0)
        self._counts[kind] = attempt + 1
        if kind is FailureKind.REFUSED:
            return self._after_refusal(failure, attempt, elapsed_s, lease_age_s)
        if elapsed_s >= deadline_s:
            return _too_late(failure, elapsed_s)
        if kind in {FailureKind.WORKER_LOST, FailureKind.DISK}:
            return self._at_once(failure, attempt)
        if kind is FailureKind.PROTOCOL and attempt >= self._policy.protocol_retries_max:
            return GiveUp(StoreUnavailableError, f"{failure.detail} ({attempt + 1} times in a row)")
        return self._backed_off(failure, attempt, elapsed_s, deadline_s)

    def _after_refusal(
        self, failure: FetchFailed, renewals: int, elapsed_s: float, lease_age_s: float | None
    ) -> Decision:
        waited_s = elapsed_s - self._since_s
        denied = renewals >= 1 if lease_age_s is None else lease_age_s <= min(waited_s, FRESH_URL_S)
        if denied or renewals >= self._policy.renewals_max:
            return GiveUp(AccessRefusedError, f"{failure.detail}, with a URL that was renewed for this")
        return Renew()

    def _at_once(self, failure: FetchFailed, attempt: int) -> Decision:
        lost = failure.kind is FailureKind.WORKER_LOST
        if attempt >= (self._policy.worker_lost_retries_max if lost else self._policy.disk_retries_max):
            return GiveUp(ReadError, f"{failure.detail} ({attempt + 1} times in a row)")
        return RetryAfter(0.0)

    def _backed_off(self, failure: FetchFailed, attempt: int, elapsed_s: float, deadline_s: float) -> Decision:
        policy, remaining_s = self._policy, deadline_s - elapsed_s
        throttled = failure.kind is FailureKind.THROTTLED
        base_s = policy.throttled_base_s if throttled else policy.transient_base_s
        # A tenth of the deadline, so that a reader with little patience still gets its ten tries.
        limit_s = min(base_s * 2 ** min(attempt, 16), policy.delay_max_s, deadline_s / 10)
        delay_s = limit_s * self._random()
        if failure.retry_after_s is not None and failure.retry_after_s > 0:
            delay_s += min(failure.retry_after_s, RETRY_AFTER_MAX_S)
        elif remaining_s > LAST_TRY_S:
            delay_s = min(delay_s, remaining_s - LAST_TRY_S)
        if delay_s >= remaining_s:
            return _too_late(failure, elapsed_s)
        return RetryAfter(delay_s)


def _too_late(failure: FetchFailed, elapsed_s: float) -> GiveUp:
    return GiveUp(DeadlineExceededError, f"gave up after {elapsed_s:.0f} s; the last failure: {failure.detail}")


def parse_retry_after(value: str | None, now_s: float) -> float | None:
    """Seconds to wait by a Retry-After header, in either of its forms; None when there is none or it makes no sense.

    `now_s` should be the Date of the same response where it has one: the header's date is by the server's clock.
    """
    text = (value or "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    at_s = parse_http_date(text)
    return None if at_s is None else max(0.0, at_s - now_s)


def parse_http_date(value: str | None) -> float | None:
    """An HTTP date as seconds since the epoch; None when it is none."""
    try:
        parsed = email.utils.parsedate_tz(value or "")
        return None if parsed is None else float(email.utils.mktime_tz(parsed))
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
