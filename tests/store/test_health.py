"""When new data goes to the disk and when to memory, and what is said about it: `store.health`."""

from __future__ import annotations

import logging

import pytest

from valohai_fuse.store import health
from valohai_fuse.store.health import DiskHealth, RateLimitedLog

pytestmark = pytest.mark.expect_warnings("the cache directory takes no writes")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_sick_disk_is_tried_again_ever_more_rarely() -> None:
    clock = Clock()
    disk = DiskHealth(clock)
    pauses = []
    disk.failed("No space left on device")
    for _ in range(9):
        start_s = clock.now_s
        while not disk.takes_writes():
            clock.now_s += 0.5
        pauses.append(clock.now_s - start_s)
        disk.failed("No space left on device")
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_disk_that_behaves_on_trial_is_well_again(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    disk = DiskHealth(clock)
    caplog.set_level(logging.INFO)
    disk.failed("Input/output error")
    clock.now_s += health.BACKOFF_FIRST_S
    assert disk.takes_writes()
    assert [disk.well] == [False]
    clock.now_s += health.PROOF_S
    assert disk.takes_writes()
    assert [disk.well] == [True]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_many_failures_of_one_illness_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Landings under way when the disk fails all fail; trials fail; the log says it once."""
    clock = Clock()
    disk = DiskHealth(clock)
    for _ in range(100):
        disk.failed("No space left on device")
        disk.takes_writes()
        clock.now_s += 0.9
    assert [record.getMessage() for record in caplog.records] == [
        "the cache directory takes no writes (No space left on device); new data is kept in memory meanwhile"
    ]


def test_failures_at_once_do_not_lengthen_the_pause() -> None:
    clock = Clock()
    disk = DiskHealth(clock)
    for _ in range(16):
        disk.failed("x")
    clock.now_s += health.BACKOFF_FIRST_S
    assert disk.takes_writes()


def test_warnings_are_limited_per_topic(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    warnings = RateLimitedLog(clock)
    for _ in range(3):
        warnings.warn("a", "first topic")
    warnings.warn("b", "second topic")
    clock.now_s += health.WARNING_INTERVAL_S
    warnings.warn("a", "first topic")
    assert [record.getMessage() for record in caplog.records] == [
        "first topic",
        "second topic",
        "first topic (2 more like this before)",
    ]
