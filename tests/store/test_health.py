"""When new data goes to the disk and when to memory, and what is said about it: `store.health`."""

from __future__ import annotations

import logging

import pytest

from valohai_fuse.store import health
from valohai_fuse.store.health import DiskHealth, DiskPace, RateLimitedLog

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


class Pace:
    """A disk of a given speed below a network of a given speed, one fetch of 8 MiB after the other."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pace = DiskPace(lambda: self.now_s)

    def on_disk(self, fetches: int, *, disk_s: float, network_s: float = 0.02) -> int:
        """How many of that many went to the disk; each takes the network's time, and on the disk the disk's as well."""
        count = 0
        for _ in range(fetches):
            if self.pace.affordable():
                charged_s = self.pace.begin(8 << 20)
                self.now_s += disk_s
                self.pace.waited(8 << 20, disk_s)
                self.pace.end(charged_s)
                count += 1
            self.now_s += network_s
        return count


def test_a_disk_that_keeps_up_takes_everything() -> None:
    assert Pace().on_disk(1000, disk_s=0.001) == 1000


def test_a_slow_disk_takes_what_the_network_can_spare() -> None:
    """50 MB/s under 400 MB/s: the stream keeps nine tenths of its rate, and some of it is cached all the same."""
    rig = Pace()
    began_s = rig.now_s
    count = rig.on_disk(1000, disk_s=0.16)
    assert 5 < count < 40
    assert 1000 * 0.02 / (rig.now_s - began_s) > 0.8


def test_a_disk_that_recovers_takes_everything_again() -> None:
    rig = Pace()
    rig.on_disk(100, disk_s=1.0)
    rig.now_s += 100
    assert rig.on_disk(500, disk_s=0.001) == 500


def test_fetches_under_way_are_paid_in_advance() -> None:
    """Else all that begin before the first one ends would be free."""
    rig = Pace()
    rig.pace.waited(1 << 20, 0.1)
    begun = 0
    while rig.pace.affordable():
        rig.pace.begin(8 << 20)
        begun += 1
    assert begun <= 4
