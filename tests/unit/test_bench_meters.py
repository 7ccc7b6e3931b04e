"""The bench's meters count what they say, on processes and log lines made for it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from benchmarks.meters import (
    AccessLog,
    PeakMemory,
    Traffic,
    Tree,
    count_traffic,
    parse_stat,
    percentile,
    wait_disks_quiet,
)
from hypothesis import given
from hypothesis import strategies as st

_BURN = "import time\nwhile time.process_time() < 0.3: pass\n"
_CHILD_THAT_ENDS = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {_BURN!r}], check=True)
ballast = bytearray(60 * 1024 * 1024)
for i in range(0, len(ballast), 4096): ballast[i] = 1
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_command_with_blanks_and_parentheses_does_not_shift_the_fields() -> None:
    """/proc/PID/stat is parsed from the last parenthesis on."""
    text = "42 (a (odd) name) S 7 42 42 0 -1 4194560 1 2 3 4 100 50 30 20 20 0 1 0 5 6 7"
    parent, cpu_s = parse_stat(text)
    assert parent == 7
    assert cpu_s == pytest.approx(2.0)


def test_cpu_of_children_that_have_ended_is_on_the_bill() -> None:
    """A worker that came and went still counts, and so does the memory of those that stay."""
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD_THAT_ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        tree = Tree([process.pid])
        with PeakMemory(tree) as memory:
            assert tree.cpu_s() >= 0.29
        assert memory.peak_bytes >= 60 * 1024 * 1024
        process.stdin.close()
        process.wait(10)
    assert Tree([process.pid]).pids() == []


def test_next_to_nothing_is_measured_as_such() -> None:
    """A process that sleeps has run as long as before, to the microsecond; one that works has not."""
    code = "import sys;sys.stdin.readline();[n * n for n in range(300_000)];print(flush=True);sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        time.sleep(0.5)
        tree = Tree([process.pid])
        before_s = tree.run_s()
        time.sleep(0.2)
        assert 0 < before_s == tree.run_s()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        assert 0.001 < tree.run_s() - before_s < 5
        process.stdin.close()
        process.wait(10)


def test_a_tree_holds_grandchildren_and_no_strangers() -> None:
    """Membership follows parents, from the roots down."""
    code = (
        "import subprocess,sys;p=subprocess.Popen([sys.executable,'-c','import sys;sys.stdin.read()'],stdin=subprocess.PIPE);"
        "print(p.pid,flush=True);sys.stdin.read();p.stdin.close();p.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        grandchild = int(parent.stdout.readline())
        assert set(Tree([parent.pid]).pids()) == {parent.pid, grandchild}
        parent.stdin.close()
        parent.wait(10)


def test_traffic_is_counted_from_where_the_log_stood(tmp_path: Path) -> None:
    """Earlier peers' requests are not on this peer's bill."""
    path = tmp_path / "access.log"
    path.write_text('80 1 1 200 999 "-" GET\n')
    log = AccessLog(path)
    with path.open("a") as out:
        out.write('80 2 1 206 100 "bytes=0-99" GET\n80 2 2 403 7 "bytes=0-99" GET\n80 2 3 206 50 "bytes=100-149" GET\n')
    assert log.traffic() == Traffic(requests=3, connections=1, body_bytes=157, refused=1)


def test_no_lines_are_no_traffic() -> None:
    """A warm cache asks nothing."""
    assert count_traffic([]) == Traffic()


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_a_value_that_was_measured(values: list[float], share: float) -> None:
    """And at least that share of the values lies at or below it."""
    found = percentile(values, share)
    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-9


def test_percentiles_of_a_hundred() -> None:
    """The plain case, by hand."""
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, s) for s in (0.5, 0.99, 1.0)] == [50, 99, 100]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_trial_begins_when_no_disk_has_anything_to_do(tmp_path: Path) -> None:
    """Counters that go on changing are waited for, within reason."""
    diskstats, over = tmp_path / "diskstats", threading.Event()
    diskstats.write_text("0")

    def work() -> None:
        number = 0
        while not over.wait(0.05):
            number += 1
            diskstats.write_text(str(number))

    disk = threading.Thread(target=work)
    disk.start()
    try:
        assert not wait_disks_quiet(diskstats, within_s=1)
    finally:
        over.set()
        disk.join()
    assert wait_disks_quiet(diskstats, within_s=1)
