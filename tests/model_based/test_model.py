"""The mount against its reference model. The short form always the same, for CI; the long one anew each time, by scripts/stress."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from model_based.machine import MountMachine

pytestmark = pytest.mark.mount

SHORT = settings(
    max_examples=5,
    stateful_step_count=22,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
LONG = settings(SHORT, max_examples=100, stateful_step_count=60, derandomize=False)


def machine_at(base: Path) -> type[MountMachine]:
    """The machine, with its sandboxes below `base`."""
    return type("MountMachine", (MountMachine,), {"base": str(base)})


@pytest.mark.expect_warnings
def test_the_mount_does_what_the_model_does(own_directories: Path) -> None:
    """In any order of reads, outages, renewals, damage, evictions and crashes: the bytes of one version, or an errno that the
    product page allows, in time."""
    run_state_machine_as_test(machine_at(own_directories), settings=SHORT)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.expect_warnings
def test_the_mount_does_what_the_model_does_for_long(own_directories: Path) -> None:
    """The same with many more and longer scenarios, other ones each time."""
    run_state_machine_as_test(machine_at(own_directories), settings=LONG)
