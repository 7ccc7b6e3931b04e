"""Decides whether new segments go to the disk or to memory, and how often a sick disk is talked about.

    well --failed--> sick (memory only) --backoff over--> on trial --quiet for PROOF_S--> well
                      ^                                      |
                      +------------failed, backoff doubled---+

A disk is tried by handing out a path on it again: the next landing is the probe, so no thread of ours can hang on it. One
WARNING per illness and one INFO when it is over. Used on the event loop's thread only; the clock is injected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("valohai_fuse.store")

BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 60.0
PROOF_S = 10.0
"""On trial for this long without a complaint: well. Landings take milliseconds, so a failure would be known by then."""
WARNING_INTERVAL_S = 60.0

PACE_SHARE = 0.1
PACE_SAVED_MAX_S = 0.5
"""A disk that hesitates now and then, as all do that write back, is not slow."""
PACE_DEBT_MAX_S = 10.0


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """A moment of the store; `blocks_distrusted` and `disk_errors` count from the start."""

    open_segments: int
    memory_segments: int
    memory_bytes: int
    blocks_distrusted: int
    disk_well: bool
    """False: new data goes to memory, of which there is little; reading far ahead only pushes out what is needed."""
    disk_errors: int = 0


class RateLimitedLog:
    """Warns once per topic and interval; the next warning says how many were held back."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._quiet_until_s: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def warn(self, topic: str, message: str) -> None:
        """Logs `message` as a WARNING, unless `topic` was warned of less than WARNING_INTERVAL_S ago."""
        now_s = self._monotonic()
        if now_s < self._quiet_until_s.get(topic, now_s):
            self._held_back[topic] = self._held_back.get(topic, 0) + 1
            return
        self._quiet_until_s[topic] = now_s + WARNING_INTERVAL_S
        held_back = self._held_back.pop(topic, 0)
        log.warning("%s%s", message, f" ({held_back} more like this before)" if held_back else "")


class DiskPace:
    """How much of the fetches' time the disk may take: what waits for it lets the network wait.

    An account in seconds of waiting. It fills with PACE_SHARE of the time that passes, up to PACE_SAVED_MAX_S, and pays for
    what fetches waited; fetches under way are paid for in advance, by what the last ones cost. A disk that takes what comes
    costs nothing and is always affordable. Of a slower one so much is used as this share allows, and the rest of what is
    fetched goes to memory only: the network's rate is kept, and part of the data is cached all the same.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._saved_s = PACE_SAVED_MAX_S
        self._filled_at_s = monotonic()
        self._cost_s_per_byte = 0.0
        self._told = False

    def affordable(self) -> bool:
        """Whether the next fetch may land on the disk."""
        now_s = self._monotonic()
        self._saved_s = min(PACE_SAVED_MAX_S, self._saved_s + (now_s - self._filled_at_s) * PACE_SHARE)
        self._filled_at_s = now_s
        if self._saved_s < 0:
            self.tell_once()
        return self._saved_s >= 0

    def tell_once(self) -> None:
        """Says in the log that the disk is too slow for the network."""
        if not self._told:
            self._told = True
            log.info("the cache disk holds fetches up: only part of what is fetched is written there from now on")

    def begin(self, byte_count: int) -> float:
        """A fetch begins to land on the disk; returns what it was charged in advance."""
        charged_s = byte_count * self._cost_s_per_byte
        self._saved_s -= charged_s
        return charged_s

    def end(self, charged_s: float) -> None:
        """It is over; what it has really cost was or will be told to `waited`."""
        self._saved_s += charged_s

    def waited(self, byte_count: int, disk_wait_s: float) -> None:
        """Landing that many bytes waited that long."""
        self._saved_s = max(-PACE_DEBT_MAX_S, self._saved_s - disk_wait_s)
        cost = disk_wait_s / byte_count
        self._cost_s_per_byte += (cost - self._cost_s_per_byte) / 4


class DiskHealth:
    """The state above. `takes_writes()` before every landing, `failed()` after one that the disk refused."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._warnings = RateLimitedLog(monotonic)
        self._sick_until_s: float | None = None
        self._trial_since_s: float | None = None
        self._backoff_s = BACKOFF_FIRST_S
        self.failures = 0

    @property
    def well(self) -> bool:
        """Neither sick nor on trial."""
        return self._sick_until_s is None and self._trial_since_s is None

    def takes_writes(self) -> bool:
        """Whether the next landing should go to the disk. True for a disk that is on trial."""
        now_s = self._monotonic()
        if self._sick_until_s is not None:
            if now_s < self._sick_until_s:
                return False
            self._sick_until_s, self._trial_since_s = None, now_s
        elif self._trial_since_s is not None and now_s >= self._trial_since_s + PROOF_S:
            self._trial_since_s = None
            self._backoff_s = BACKOFF_FIRST_S
            log.info("the cache directory takes writes again")
        return True

    def failed(self, detail: str) -> None:
        """The disk refused a write. Several landings fail at once when a disk does: they count as one."""
        self.failures += 1
        if self._sick_until_s is not None:
            return
        if self._trial_since_s is None:
            self._warnings.warn(
                "sick", f"the cache directory takes no writes ({detail}); new data is kept in memory meanwhile"
            )
        else:
            self._trial_since_s = None
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
        self._sick_until_s = self._monotonic() + self._backoff_s
