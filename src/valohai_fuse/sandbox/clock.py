"""The sandbox's wall clock: the real one plus an offset that tests move.

Store, API and signatures share one, so that a jump expires URLs at once and shows in the `Date` header, as it would with
a server whose clock is ahead of ours.
"""

from __future__ import annotations

import time


class SandboxClock:
    """Seconds since the epoch by the sandbox's clock. Any thread."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self._offset_s = skew_s

    def __call__(self) -> float:
        return time.time() + self._offset_s

    def advance(self, seconds: float) -> None:
        """Jumps; URLs whose lifetime ends within the jump are expired from now on."""
        self._offset_s += seconds
