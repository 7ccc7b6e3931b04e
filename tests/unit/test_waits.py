"""`fetch.waits` tells waiting from working."""

from __future__ import annotations

import os
import threading
import time

import pytest

from valohai_fuse.fetch import waits


def test_waiting_is_counted() -> None:
    """A thread that stands still for a while has waited for that while, and no longer than the clock says."""
    began_s, began_waiting_s = time.monotonic(), waits.waited_s()
    threading.Event().wait(0.1)
    waited_s = waits.waited_s() - began_waiting_s
    assert 0.09 <= waited_s <= time.monotonic() - began_s + 0.001


def test_working_is_not() -> None:
    """Nor is standing in line for a processor, on a machine that is busy."""
    began_s, began_waiting_s = time.monotonic(), waits.waited_s()
    while time.monotonic() - began_s < 0.1:
        pass
    assert waits.waited_s() - began_waiting_s < 0.05


def test_a_kernel_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str, flags: int) -> int:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "open", missing)
    monkeypatch.setattr(waits, "_state", threading.local())
    assert waits.waited_s() == waits.waited_s() == 0.0
