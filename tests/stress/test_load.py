"""A mount under load: thousands of waiting reads, hundreds of handles, readers that are killed, and dozens of processes that read
while things go wrong. The short forms run in CI; scripts/stress load runs them at full size: sizes
are parameters of the tests, the long ones marked slow."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from stress.load import crowd, memory_bytes, metrics, recover, start
from support import at_rest
from support.mounts import MountedSandbox, MountInputs, read_elsewhere, wait_until
from support.prober import Prober
from support.processes import daemon_pid, run_queue_wait_s
from valohai_fuse.model.retry import FRESH_URL_S
from valohai_fuse.mount import kernel
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp

MIB = 1024 * 1024
BLOCK = 256 * 1024
PATIENCE_S = 0.1
"""What a stat or a listing may take whatever the reads wait for."""
FIRST_EXPIRY_S = 2
EXPIRY_S = 3 * FRESH_URL_S
"""A URL that is refused while it is fresh is a real refusal; a fetch may have to queue for a while before it is sent."""

pytestmark = pytest.mark.mount

TRANSIENT = (
    faults.hang_up(),
    faults.reset_after(50_000),
    faults.truncate_after(70_000),
    faults.internal_error(),
    faults.bad_gateway(),
    faults.throttled(),
    faults.drip(100_000, 0.01),
    faults.chunked(),
    faults.wrong_range_start(),
    faults.ignore_range(),
)


def size_of(*, short: object, full: object) -> pytest.MarkDecorator:
    """One test at two sizes: for CI, and for scripts/stress."""
    return pytest.mark.parametrize(
        "size", [short, pytest.param(full, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
    )


def assert_at_rest(mounted: MountedSandbox, timeout_s: float = 45.0) -> None:
    """Nothing is left of the load: no task, descriptor, process, file, stall or overdue request."""
    assert at_rest.problems(mounted, timeout_s=timeout_s) == []


@size_of(short=500, full=5000)
def test_stat_and_ls_stay_fast_while_thousands_of_reads_wait(mount_inputs: MountInputs, size: int) -> None:
    """5,000 reads wait for a store that does not answer: stat and ls of names that nobody asked for before stay under 100 ms,
    99 of 100 whatever the machine does, and each of them but for what it waited for a processor. When the store is back every
    read gets its bytes, and nothing is left."""
    names = {f"d{i}/{j}.txt": b"x" for i in range(40) for j in range(10)}
    big = BLOCK * (size + 64)
    mounted = mount_inputs(
        {"data": {"big.bin": ramp(big), "warm.bin": ramp(MIB), **names}},
        options=("--stall-timeout=120", "--read-timeout=240"),
    )
    assert len(mounted.path("data", "warm.bin").read_bytes()) == MIB
    stall = mounted.sandbox.store.faults.add(faults.no_answer(), path="*big.bin", count=None)
    path = mounted.path("data", "big.bin")
    each = 250
    processes = [start("waiting", each, os.O_DIRECT, path, big, BLOCK * (1 + n)) for n in range(size // each)]
    with crowd(processes, mounted), Prober(30) as prober:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
        in_the_daemon = min(size, kernel.MAX_BACKGROUND) * 0.95  # the others wait in the kernel
        wait_until("they wait", lambda: metrics(mounted)["requests_under_way"] >= in_the_daemon, 60)
        # Not both of one directory: what a listing has brought is answered by the kernel.
        steps = [("listdir", f"d{i}") for i in range(0, 40, 2)]
        steps += [("stat", f"d{i}/{j}.txt") for i in range(1, 40, 2) for j in range(10)]
        at_work = (prober.pid, daemon_pid(mounted, "data"), os.getpid())
        took_s, own_s = [], []
        for op, name in steps:
            queued_s, began_s = run_queue_wait_s(*at_work), time.monotonic()
            prober.ask(op, path=str(mounted.path("data", name)))
            took_s.append(time.monotonic() - began_s)
            own_s.append(took_s[-1] - (run_queue_wait_s(*at_work) - queued_s))
        print(
            f"{size} reads wait: median {statistics.median(took_s):.4f} s, longest {max(took_s):.4f}, own {max(own_s):.4f}"
        )
        assert statistics.quantiles(took_s, n=100)[98] < PATIENCE_S, sorted(took_s)[-5:]
        assert max(own_s) < PATIENCE_S, sorted(own_s)[-5:]
        assert stall.hits > 0
        recover(mounted)
        for process in processes:
            out, _ = process.communicate(timeout=200)
            assert out == "0\n", f"{out} reads failed"
    assert_at_rest(mounted)


@size_of(short=200, full=500)
def test_hundreds_of_handles_within_a_memory_bound(mount_inputs: MountInputs, size: int) -> None:
    """500 open handles that all read in sequence: at most 128 KiB of the daemon's memory for each."""
    mounted = mount_inputs({"data": {"big.bin": ramp(size * MIB), "warm.bin": ramp(MIB)}})
    assert len(mounted.path("data", "warm.bin").read_bytes()) == MIB
    daemon = daemon_pid(mounted, "data")
    before = memory_bytes(daemon)
    with crowd([start("holding", size, mounted.path("data", "big.bin"), size * MIB)], mounted) as (process,):
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert metrics(mounted)["open_files"] == size
        assert memory_bytes(daemon) - before < size * 128 * 1024
    assert_at_rest(mounted)


@size_of(short=(2, 250), full=(40, 250))
def test_readers_that_are_killed_leave_nothing(mount_inputs: MountInputs, size: tuple[int, int]) -> None:
    """10,000 reads end by SIGKILL of their readers: these go at once, the mount is healthy, and nothing is left."""
    rounds, each = size
    big = 2 * BLOCK * rounds * each
    mounted = mount_inputs(
        {"data": {"big.bin": ramp(big), "warm.bin": ramp(MIB)}}, options=("--stall-timeout=3", "--read-timeout=20")
    )
    assert len(mounted.path("data", "warm.bin").read_bytes()) == MIB
    path = mounted.path("data", "big.bin")
    for number in range(rounds):
        mounted.sandbox.store.faults.add(faults.no_answer(), path="*big.bin", count=None)
        with crowd([start("waiting", each, 0, path, big, BLOCK * (2 * number + 1))], mounted) as (process,):
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            wait_until("reads wait", lambda: metrics(mounted)["requests_under_way"] > 0)
            process.send_signal(signal.SIGKILL)
            began_s = time.monotonic()
            process.wait(15)
            assert time.monotonic() - began_s < 5, "a killed reader goes at once"
        recover(mounted)
        # Else the kernel, congested with what the dead have asked for, would make the next ones wait unkillably.
        wait_until("what they asked for has ended", lambda: not metrics(mounted)["requests_under_way"], 60)
    assert_at_rest(mounted, timeout_s=90)
    assert read_elsewhere(path, 0, 1000) == mounted.sandbox.expected_bytes("data", "big.bin", 0, 1000)


@size_of(short=(16, 4.0), full=(64, 600.0))
def test_many_processes_read_while_things_go_wrong(mount_inputs: MountInputs, size: tuple[int, float]) -> None:
    """64 processes read at once, with faults sprinkled in, the URLs expiring and the cache evicted: every byte is compared, no read
    fails, and at the end nothing is left."""
    count, seconds = size
    files = {"a.bin": 40 * MIB + 3, "b.bin": 9 * MIB, "c.bin": 300_001, "d.bin": 70, "e.bin": 100 * MIB}
    mounted = mount_inputs(
        {"data": {name: ramp(bytes_) for name, bytes_ in files.items()} | {"warm.bin": ramp(MIB)}},
        options=("--stall-timeout=5", "--cache-max-size=64M"),
        expected_warnings=("cache",),
    )
    assert len(mounted.path("data", "warm.bin").read_bytes()) == MIB
    pairs = [word for name, bytes_ in files.items() for word in (mounted.path("data", name), bytes_)]
    dice = random.Random(251)
    seed = dice.randrange(10**9)
    with crowd([start("checking", seconds, seed + n, *pairs) for n in range(count)], mounted) as processes:
        happened = _sprinkle(mounted, dice, processes)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [out for process, out in zip(processes, outputs, strict=True) if process.returncode] == []
    reads, compared = (sum(int(out.split()[n]) for out in outputs) for n in (0, 1))
    print(
        f"{count} processes, {seconds:g} s: {reads} reads, {compared} bytes compared, {happened} faults, {metrics(mounted)}"
    )
    assert reads > count
    assert happened > seconds / 4, "hardly anything went wrong"
    assert metrics(mounted)["read_errors"] == 0
    assert_at_rest(mounted)


def _sprinkle(mounted: MountedSandbox, dice: random.Random, processes: list[subprocess.Popen[str]]) -> int:
    """Faults, expiries and evictions until the readers have ended; how many faults happened."""
    happened = 0
    expiry_s = time.monotonic() + FIRST_EXPIRY_S
    faulty = mounted.sandbox.store.faults
    last = faulty.add(TRANSIENT[0])
    while any(process.poll() is None for process in processes):
        # One at a time: a heap of them would be an outage, and one kind again and again no accident.
        if last.hits >= (last.count or 0):
            happened += last.hits
            last = faulty.add(
                dice.choice([fault for fault in TRANSIENT if fault is not last.fault]), count=dice.randrange(1, 3)
            )
        if time.monotonic() > expiry_s:
            mounted.sandbox.expire_urls()
            expiry_s = time.monotonic() + EXPIRY_S
        if dice.random() < 0.1:
            segments = [path for path in Path(mounted.cache_dir).rglob("*") if path.is_file()]
            if segments:
                dice.choice(segments).unlink(missing_ok=True)
        _pause(0.15)
    return happened


def _pause(seconds: float) -> None:
    """Between two faults; nothing is waited for."""
    time.sleep(seconds)
