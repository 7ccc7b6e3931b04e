"""The nets under all tests are nets: each is shown to catch what it is there for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.leftovers import Ours, Snapshot, left_since, mounts_below

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).resolve().parent.parent / "conftest.py"


def test_a_leaked_descriptor_is_seen(session_marks: Ours) -> None:
    """A file that is open now and was not before is named."""
    before = Snapshot.take(session_marks)
    descriptor = os.open(__file__, os.O_RDONLY)
    try:
        assert left_since(before, session_marks, patience_s=0) == [f"open descriptor: {__file__}"]
    finally:
        os.close(descriptor)
    assert left_since(before, session_marks) == []


def test_a_child_is_seen_until_it_is_reaped(session_marks: Ours) -> None:
    """A child process is named until somebody has waited for it."""
    before = Snapshot.take(session_marks)
    with subprocess.Popen(["sleep", "60"]) as child:
        left = left_since(before, session_marks, patience_s=0)
        child.kill()
    assert [line.partition(":")[0] for line in left] == [f"process {child.pid}"]
    assert left_since(before, session_marks) == []


def test_a_grandchild_in_a_session_of_its_own_is_seen(session_marks: Ours) -> None:
    """A daemon that nobody is the parent of is recognised by the environment that it inherited."""
    before = Snapshot.take(session_marks)
    code = "import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=2).pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=20, check=True).stdout)
    left = left_since(before, session_marks, patience_s=0)
    os.kill(pid, 9)
    assert [line.partition(":")[0] for line in left] == [f"process {pid}"]
    assert left_since(before, session_marks) == []


def test_mount_points_are_found_by_their_place() -> None:
    """`/proc` is a mount at or below `/proc`, and nothing of the kind is below a directory that does not exist."""
    assert "/proc" in mounts_below(("/proc",))
    assert mounts_below(("/proc/no-such-directory",)) == []


@pytest.mark.expect_warnings("strange .* happened")
def test_an_announced_warning_is_permitted() -> None:
    """The marker lets through what it names."""
    logging.getLogger("valohai_fuse.test").warning("strange %s happened", "things")


def test_an_unannounced_warning_fails_the_test(pytester: pytest.Pytester) -> None:
    """A run of its own: one test that warns, one that warns although it announced something else, one that is quiet."""
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makepyfile(
        """
        import logging, pytest
        def test_loud(): logging.getLogger("x").error("boom")
        @pytest.mark.expect_warnings("something else")
        def test_other(): logging.getLogger("x").warning("boom")
        def test_quiet(): logging.getLogger("x").info("fine")
        """
    )
    outcome = pytester.runpytest_subprocess(
        "-q", "-p", "no:cacheprovider", f"--override-ini=pythonpath={CONFTEST.parent}"
    )
    outcome.assert_outcomes(passed=3, errors=2)
    outcome.stdout.fnmatch_lines(["*logged unexpectedly*", "*ERROR x: boom*"])
