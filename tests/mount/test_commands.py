"""The commands as a person uses them, on real mounts."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mounts import MountedSandbox, run_cli, wait_until
from valohai_fuse.mount import table
from valohai_fuse.obs.runtime_dir import process_start
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile, SandboxInput
from valohai_fuse.sandbox.valohai import Sandbox

pytestmark = pytest.mark.mount


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    inputs = {
        "train": SandboxInput([SandboxFile("a.bin", ramp(300_000)), SandboxFile("d/b.txt", b"hello\n")]),
        "labels": SandboxInput([SandboxFile("l.csv", b"x,y\n1,2\n")]),
        "ready": SandboxInput([SandboxFile("r.txt", b"on the disk", intent="always")]),
        "nothing": SandboxInput([]),
    }
    with Sandbox(inputs) as made:
        yield made


@pytest.fixture
def places(sandbox: Sandbox) -> list[str]:
    return MountedSandbox(sandbox).places


def _mounted(sandbox: Sandbox) -> list[str]:
    base = sandbox.root + "/"
    return sorted(e.mountpoint.removeprefix(base) for e in table.entries() if e.mountpoint.startswith(base))


def _records(sandbox: Sandbox) -> list[Path]:
    return sorted(Path(sandbox.root, "run").glob("*.json"))


def _no_traceback(outcome: subprocess.CompletedProcess[str]) -> bool:
    return "Traceback" not in outcome.stderr + outcome.stdout


# --- mount and unmount ------------------------------------------------------------------------------------------------


def test_mount_shows_each_on_demand_input_at_its_place_and_unmount_leaves_nothing(
    sandbox: Sandbox, places: list[str]
) -> None:
    """`mount` mounts each on-demand input at its place, making the directory where it is missing, and returns when it answers."""
    outcome = run_cli("mount", *places)
    try:
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout == ""
        assert _mounted(sandbox) == ["inputs/labels", "inputs/nothing", "inputs/train"]
        assert re.search(r"mounted train at \S+/inputs/train \(2 files, 293 KiB\)", outcome.stderr)
        assert Path(sandbox.inputs_dir, "train/d/b.txt").read_bytes() == b"hello\n"
        assert os.listdir(Path(sandbox.inputs_dir, "nothing")) == []
        again = run_cli("mount", *places, "train")
        assert again.returncode == 5
        assert "mounted already by valohai-fuse (pid " in again.stderr
        assert "hint: valohai-fuse unmount" in again.stderr
    finally:
        gone = run_cli("unmount", *places)
    assert gone.returncode == 0, gone.stderr
    assert _mounted(sandbox) == []
    assert sorted(os.listdir(sandbox.inputs_dir)) == ["ready"]
    assert _records(sandbox) == []
    nothing = run_cli("unmount", *places)
    assert (nothing.returncode, nothing.stderr) == (0, "nothing is mounted\n")


def test_mount_of_named_inputs_and_all(sandbox: Sandbox, places: list[str]) -> None:
    """`mount INPUT...` mounts just those named; `--all` also shows `always` inputs; `unmount INPUT` just that."""
    with MountedSandbox(sandbox, options=["labels"]) as one:
        assert _mounted(sandbox) == ["inputs/labels"]
        assert one.mount("--all", "ready").returncode == 5  # labels is mounted already: all or nothing
        assert _mounted(sandbox) == ["inputs/labels"]
        assert run_cli("mount", *places, "ready").returncode == 0
        assert Path(sandbox.inputs_dir, "ready/r.txt").read_bytes() == b"on the disk"
        assert run_cli("unmount", *places, "ready").returncode == 0
        assert _mounted(sandbox) == ["inputs/labels"]
        assert run_cli("unmount", *places, str(Path(sandbox.inputs_dir, "labels"))).returncode == 0
        assert _mounted(sandbox) == []


def test_root_shows_every_input_in_one_tree(sandbox: Sandbox, places: list[str]) -> None:
    """`--root DIR` mounts one tree with every input as a top directory."""
    root = Path(sandbox.root, "deep", "tree")
    outcome = run_cli("mount", *places, "--root", str(root))
    try:
        assert outcome.returncode == 0, outcome.stderr
        assert sorted(os.listdir(root)) == ["labels", "nothing", "train"]
        assert (root / "labels/l.csv").read_bytes() == b"x,y\n1,2\n"
        known = json.loads(run_cli("info", *places, "--json", str(root / "train/d/b.txt"), str(root)).stdout)
        assert known[0]["name"] == "d/b.txt"
        assert (known[1]["type"], known[1]["files"]) == ("directory", 3)
    finally:
        run_cli("unmount", *places, str(root))
    assert not root.parent.exists(), "directories that the mount made go with it"


def test_an_input_that_does_not_exist_is_refused_with_those_that_do(sandbox: Sandbox, places: list[str]) -> None:
    outcome = run_cli("mount", *places, "train", "typo")
    assert outcome.returncode == 2
    assert outcome.stderr == "error: no input named 'typo'\nhint: inputs that exist: labels, nothing, ready, train\n"
    assert _mounted(sandbox) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "inputs.json"),
        ("{", "inputs.json"),
        ("[]", "inputs.json"),
        ('{"train": {"files": [{"name": 5, "download_intent": "on-demand"}]}}', "$"),
        ("[" * 100_000, "inputs.json"),
    ],
)
def test_a_bad_inputs_json_is_a_configuration_error(
    sandbox: Sandbox, places: list[str], content: str | None, said: str
) -> None:
    """Exit code 3 with the file named, nothing mounted, no traceback."""
    path = Path(sandbox.config_dir, "inputs.json")
    path.unlink()
    if content is not None:
        path.write_text(content)
    outcome = run_cli("mount", *places)
    assert outcome.returncode == 3, outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert str(path) in outcome.stderr
    assert said in outcome.stderr
    assert _no_traceback(outcome)
    assert _mounted(sandbox) == []


def test_locations_that_cannot_be_fetched_are_told_upon_mount(sandbox: Sandbox, places: list[str]) -> None:
    """A warning names input, file and scheme, the rest works; with an api.json Valohai may have another URL: no warning."""
    path = Path(sandbox.config_dir, "inputs.json")
    manifest = json.loads(path.read_bytes())
    file = next(file for file in manifest["train"]["files"] if file["name"] == "a.bin")
    file["storage_uri"] = "s3://bucket/a.bin?token=S3CR3T"
    path.write_text(json.dumps(manifest))
    assert "cannot be read" not in run_cli("mount", *places, "train").stderr
    assert run_cli("unmount", *places).returncode == 0
    Path(sandbox.config_dir, "api.json").unlink()
    outcome = run_cli("mount", *places, "train")
    try:
        assert outcome.returncode == 0, outcome.stderr
        assert "warning: " in outcome.stderr
        assert "input 'train': 'a.bin' cannot be read unless cached: its location is s3:, which" in outcome.stderr
        assert "api.json to ask Valohai for another" in outcome.stderr
        assert "S3CR3T" not in outcome.stderr
        assert Path(sandbox.inputs_dir, "train/d/b.txt").read_bytes() == b"hello\n"
        with pytest.raises(OSError, match="Input/output error"):
            Path(sandbox.inputs_dir, "train/a.bin").read_bytes()
    finally:
        run_cli("unmount", *places)


def test_a_mount_point_that_cannot_be_is_refused(sandbox: Sandbox, places: list[str]) -> None:
    """Exit code 5; what was mounted or made for the other inputs is taken back."""
    Path(sandbox.inputs_dir, "train").write_text("in the way")
    outcome = run_cli("mount", *places)
    assert outcome.returncode == 5
    assert "is not a directory" in outcome.stderr
    assert sorted(os.listdir(sandbox.inputs_dir)) == ["ready", "train"]
    other = run_cli("mount", *places, "labels", "--root", "/proc/1/nowhere")
    assert other.returncode == 5
    assert "cannot make the mount point" in other.stderr
    busy = run_cli("mount", *places, "labels", "--root", "/proc")
    assert busy.returncode == 5
    assert "/proc is a mount point already, of proc" in busy.stderr
    assert _mounted(sandbox) == []


def test_what_is_not_ours_is_not_unmounted(sandbox: Sandbox, places: list[str]) -> None:
    outcome = run_cli("unmount", *places, "/proc")
    assert outcome.returncode == 2
    assert "/proc is not a mount of valohai-fuse but of proc" in outcome.stderr
    assert run_cli("unmount", *places, "nothing-here").returncode == 2


def test_a_dead_mount_stays_is_told_and_is_mended_by_mounting_anew(sandbox: Sandbox, places: list[str]) -> None:
    """After a crash the dead mount stays (ENOTCONN); `status` says so; `mount` mends it, `unmount` removes it."""
    expected = ["ended unexpectedly: killed by signal 9"]
    with MountedSandbox(sandbox, options=["train"], expected_warnings=expected) as mounted:
        for round_number in range(2):
            (record,) = (json.loads(path.read_bytes()) for path in _records(sandbox))
            os.kill(record["pid"], signal.SIGKILL)
            wait_until("the mount is dead", lambda: table.answers(f"{sandbox.inputs_dir}/train") is False)
            with pytest.raises(OSError, match="not connected"):
                os.listdir(f"{sandbox.inputs_dir}/train")
            status = mounted.cli("status", "--json")
            assert status.returncode == 1
            assert json.loads(status.stdout)["mounts"][0]["state"] == "dead"
            assert "is dead" in mounted.cli("status").stderr
            if round_number == 0:
                mended = run_cli("mount", *places, "train")
                assert mended.returncode == 0, mended.stderr
                assert "removed the dead mount" in mended.stderr
                assert Path(sandbox.inputs_dir, "train/d/b.txt").read_bytes() == b"hello\n"
        assert mounted.unmount().returncode == 0
        assert _mounted(sandbox) == []
        assert not Path(sandbox.inputs_dir, "train").exists()


def test_unmount_works_without_a_supervisor(sandbox: Sandbox, places: list[str]) -> None:
    """The daemons do not depend on the supervisor: killed, they go on, and `unmount` does without it."""
    with MountedSandbox(sandbox, options=["train"]) as mounted:
        (record,) = (json.loads(path.read_bytes()) for path in _records(sandbox))
        os.kill(record["supervisor_pid"], signal.SIGKILL)
        assert Path(sandbox.inputs_dir, "train/d/b.txt").read_bytes() == b"hello\n"
        assert mounted.unmount().returncode == 0
        assert _mounted(sandbox) == []
        assert _records(sandbox) == []
        assert not Path(sandbox.inputs_dir, "train").exists()


def test_an_unmount_of_a_busy_mount_waits_and_then_detaches(sandbox: Sandbox, places: list[str]) -> None:
    """Files that are open have the grace period; then the mount is detached, said so, and it is gone."""
    expected = ["is busy"]
    with MountedSandbox(sandbox, options=["train", "--grace-period=1.5"], expected_warnings=expected) as mounted:
        with Path(sandbox.inputs_dir, "train/a.bin").open("rb") as held:
            assert held.read(10) == bytes(range(10))
            outcome = mounted.unmount()
        assert outcome.returncode == 0
        assert "still busy after the grace period" in outcome.stderr
        assert _mounted(sandbox) == []


@pytest.mark.parametrize(("held_s", "grace_s"), [(3.0, 20), (60.0, 2)])
def test_a_mount_of_another_runtime_directory_is_unmounted_as_gently(
    sandbox: Sandbox,
    places: list[str],
    own_directories: Path,
    monkeypatch: pytest.MonkeyPatch,
    held_s: float,
    grace_s: int,
) -> None:
    """Which knows of it; ours does not, and does not take it for dead: its readers have the grace period, and its daemon ends."""
    elsewhere = [*places, "--runtime-dir", str(own_directories / "another")]
    with MountedSandbox(sandbox, options=["train"]):
        (record,) = (json.loads(path.read_bytes()) for path in _records(sandbox))
        with Path(sandbox.inputs_dir, "train/a.bin").open("rb") as held:
            closing = threading.Timer(held_s, held.close)
            closing.start()
            monkeypatch.setenv("VALOHAI_FUSE_GRACE_PERIOD", str(grace_s))
            outcome = run_cli("unmount", *elsewhere, "train")
            closing.cancel()
            assert held.closed == (held_s < grace_s)
        assert outcome.returncode == 0, outcome.stderr
        assert f"is busy: waiting up to {grace_s} s" in outcome.stderr
        assert ("train: unmounted" if held_s < grace_s else "still busy after the grace period") in outcome.stderr
        assert _mounted(sandbox) == []
        wait_until("its daemon has ended", lambda: process_start(record["pid"]) is None)


def test_foreground_tells_systemd_and_unmounts_upon_sigterm(
    sandbox: Sandbox, places: list[str], own_directories: Path
) -> None:
    """`--foreground` stays, says READY=1 when every mount answers, and ends with exit code 0 upon SIGTERM."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(own_directories / "notify"))
        systemd.settimeout(20)
        process = subprocess.Popen(
            [sys.executable, "-m", "valohai_fuse", "mount", *places, "--foreground"],
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, NOTIFY_SOCKET=str(own_directories / "notify")),
        )
        try:
            assert systemd.recv(1000).startswith(b"READY=1")
            assert _mounted(sandbox) == ["inputs/labels", "inputs/nothing", "inputs/train"]
            process.terminate()
            assert systemd.recv(1000) == b"STOPPING=1"
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, said
    assert "mounted train at" in said
    assert _mounted(sandbox) == []
    assert sorted(os.listdir(sandbox.inputs_dir)) == ["ready"]


# --- run --------------------------------------------------------------------------------------------------------------


def _run_command(places: list[str], *command: str) -> list[str]:
    return [sys.executable, "-m", "valohai_fuse", "run", *places, "--", *command]


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("cat $VH_INPUTS_DIR/train/d/b.txt", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 128 + signal.SIGTERM),
        ("kill -KILL $$", 128 + signal.SIGKILL),
    ],
)
def test_run_exits_with_the_commands_own_status(sandbox: Sandbox, places: list[str], command: str, status: int) -> None:
    """`run -- CMD` mounts, runs CMD, unmounts, and exits with CMD's status."""
    outcome = run_cli("run", *places, "--", "sh", "-c", command)
    assert outcome.returncode == status, outcome.stderr
    assert outcome.stdout == ("hello\n" if status == 0 else "")
    assert _mounted(sandbox) == []
    assert _records(sandbox) == []


@pytest.mark.parametrize(("command", "status"), [("no-such-command", 127), ("/etc/passwd", 126)])
def test_run_says_what_cannot_be_run(sandbox: Sandbox, places: list[str], command: str, status: int) -> None:
    outcome = run_cli("run", *places, "--", command)
    assert outcome.returncode == status
    assert f"error: {'no such command' if status == 127 else 'cannot run'}" in outcome.stderr
    assert _mounted(sandbox) == []


def test_run_passes_signals_on_once_and_cleans_up(sandbox: Sandbox, places: list[str]) -> None:
    """A signal sent to `run` reaches CMD, once; the mounts go when CMD has gone."""
    code = (
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})\n"
        "print('up', flush=True)\n"
        "print(*(signal.sigwait({signal.SIGUSR1, signal.SIGTERM}).name for _ in range(2)), flush=True)\n"
        "print(signal.sigpending(), flush=True)\n"
        "sys.exit(5)\n"
    )
    with subprocess.Popen(
        _run_command(places, sys.executable, "-c", code), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        wait_until("USR1 has been passed on", lambda: not _pending(process.pid, signal.SIGUSR1))
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "SIGUSR1 SIGTERM\nset()\n"
        assert process.wait(20) == 5
    assert _mounted(sandbox) == []


def test_ctrl_c_reaches_the_command_once_and_run_survives_it(sandbox: Sandbox, places: list[str]) -> None:
    """The terminal's Ctrl-C goes to CMD, which shares our process group; `run` stays to clean up and adds no second one."""
    code = (
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "print('up', flush=True)\n"
        "signal.sigwait({signal.SIGINT})\n"
        "print('second:', signal.sigtimedwait({signal.SIGINT}, 0.5), flush=True)\n"
        "print(len(open(sys.argv[1], 'rb').read()), flush=True)\n"
        "sys.exit(6)\n"
    )
    terminal, side = pty.openpty()
    try:
        path = os.path.join(sandbox.inputs_dir, "train/a.bin")
        command = ["setsid", "--ctty", *_run_command(places, sys.executable, "-c", code, path)]
        with subprocess.Popen(
            command, stdin=side, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            os.write(terminal, b"\x03")
            assert process.stdout.read() == "second: None\n300000\n"
            assert process.wait(20) == 6
    finally:
        os.close(terminal)
        os.close(side)
    assert _mounted(sandbox) == []


def test_mount_that_is_interrupted_takes_everything_back(sandbox: Sandbox, places: list[str]) -> None:
    """SIGTERM while `mount` waits for its daemons: nothing stays mounted, running or made."""
    with subprocess.Popen(
        [sys.executable, "-m", "valohai_fuse", "mount", *places], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until("a daemon has been started", lambda: bool(_records(sandbox)))
        daemon = json.loads(_records(sandbox)[0].read_bytes())["pid"]
        os.kill(daemon, signal.SIGSTOP)  # so that the mounts cannot be ready before the signal has come through
        process.terminate()
        wait_until("the daemon has been told", lambda: _was_told(daemon))
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon, signal.SIGCONT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert _mounted(sandbox) == []
    assert _records(sandbox) == []
    assert sorted(os.listdir(sandbox.inputs_dir)) == ["ready"]


def test_two_mounts_at_once_do_not_cover_each_other(sandbox: Sandbox, places: list[str]) -> None:
    """Of two `mount` of the same input at the same moment one mounts, the other is refused."""
    command = [sys.executable, "-m", "valohai_fuse", "mount", *places, "train"]
    with MountedSandbox(sandbox, options=["labels"]):
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=30)[1] for process in both]
        assert sorted(process.returncode for process in both) == [0, 5], said
        assert _mounted(sandbox) == ["inputs/labels", "inputs/train"]


def _was_told(pid: int) -> bool:
    """SIGTERM is pending, or has ended it already."""
    try:
        return process_start(pid) is None or _pending(pid, signal.SIGTERM)
    except FileNotFoundError:
        return True


def _pending(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in lines if line.startswith(("SigPnd", "ShdPnd")))


def test_run_that_is_killed_still_unmounts(sandbox: Sandbox, places: list[str]) -> None:
    """Whatever happens to `run`, the supervisor notices that it is gone and unmounts."""
    with subprocess.Popen(
        _run_command(places, "sh", "-c", "echo up; exec cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert len(_mounted(sandbox)) == 3
        process.kill()
        process.wait(20)
    wait_until("all is unmounted", lambda: _mounted(sandbox) == [] and _records(sandbox) == [], timeout_s=20)


def test_run_without_anything_on_demand_just_runs(sandbox: Sandbox, places: list[str]) -> None:
    Path(sandbox.config_dir, "inputs.json").write_text("{}")
    outcome = run_cli("run", *places, "--", "echo", "ran")
    assert (outcome.returncode, outcome.stdout) == (0, "ran\n")


# --- status, info, doctor, mount(8) -----------------------------------------------------------------------------------


def test_status_counts_what_was_read(sandbox: Sandbox) -> None:
    """`status --json` shows per mount files, bytes, hit rate, renewals, errors and all counters."""
    with MountedSandbox(sandbox) as mounted:
        assert mounted.path("train", "a.bin").read_bytes() == sandbox.expected_bytes("train", "a.bin")
        by_input = {entry["inputs"][0]: entry for entry in mounted.status()["mounts"]}
        train = by_input["train"]
        assert set(by_input) == {"train", "labels", "nothing"}
        assert (train["state"], train["files"], train["bytes"]) == ("mounted", 2, 300_006)
        assert (train["errors"], train["renewals"]) == (0, 0)
        assert train["metrics"]["read_bytes"] >= 300_000
        assert train["metrics"]["fetched_bytes"] >= 300_000
        people = mounted.cli("status")
        assert people.returncode == 0
        assert re.search(r"train\s+mounted\s+2\s+293 KiB", people.stdout)


def test_info_says_what_valohai_knows(sandbox: Sandbox) -> None:
    """`info` shows uri, datum, input id, size and how much is cached; for a directory the sums; no URL's query."""
    with MountedSandbox(sandbox) as mounted:
        path = mounted.path("train", "a.bin")
        before = json.loads(mounted.cli("info", "--json", str(path)).stdout)[0]
        path.read_bytes()
        after = json.loads(mounted.cli("info", "--json", str(path)).stdout)[0]
        assert (before["size"], before["cached_bytes"], after["cached_bytes"]) == (300_000, 0, 300_000)
        assert before["uri"].startswith("datum://")
        people = mounted.cli("info", str(path), str(mounted.path("train")))
        assert "cached    293 KiB (100%)" in people.stdout
        assert "?" not in people.stdout
        missing = mounted.cli("info", str(mounted.path("train", "nope")))
        assert missing.returncode == 2
        assert "no such file or directory" in missing.stderr


def test_doctor_finds_this_machine_fit(sandbox: Sandbox, places: list[str]) -> None:
    """`doctor` says ok, warn or FAIL for each thing, with a hint; 3 when the configuration is missing."""
    fit = run_cli("doctor", *places)
    assert fit.returncode == 0, fit.stdout
    assert "ok   inputs: 2 of 4 inputs have files on demand (3 files)" in fit.stdout
    Path(sandbox.config_dir, "api.json").write_text("{}")
    Path(sandbox.config_dir, "inputs.json").unlink()
    unfit = run_cli("doctor", *places, "--json")
    assert unfit.returncode == 3
    verdicts = {finding["check"]: finding for finding in json.loads(unfit.stdout)}
    assert verdicts["inputs"]["verdict"] == verdicts["api.json"]["verdict"] == "FAIL"
    assert verdicts["inputs"]["hint"]


def test_the_convention_of_mount_8(sandbox: Sandbox) -> None:
    """`mount -t fuse.valohai-fuse CONFIG_DIR DIR -o ...` arrives as `valohai-fuse CONFIG_DIR DIR -o ...`."""
    root = os.path.join(sandbox.root, "fstab")
    run, cache = f"{sandbox.root}/run", f"{sandbox.root}/cache"
    options = f"rw,noauto,_netdev,runtime_dir={run},cache_dir={cache},inputs_dir={sandbox.inputs_dir},input=train"
    outcome = run_cli(sandbox.config_dir, root, "-o", options)
    try:
        assert outcome.returncode == 0, outcome.stderr
        assert os.listdir(root) == ["train"]
    finally:
        run_cli("unmount", f"--runtime-dir={sandbox.root}/run", root)
    assert _mounted(sandbox) == []


def test_the_demo_shows_it_all_and_cleans_up(own_directories: Path) -> None:
    """`demo`: the tree, `ls -l`, `head` with how few bytes, a read after expiry, one without the store, the unmount."""
    outcome = run_cli("demo", timeout_s=60)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    for said in (
        "model-500gb",
        "000000000,00:00:00,station-000",
        "1 renewal",
        "out of the cache",
        "directories are gone",
    ):
        assert said in outcome.stdout, said
    fetched = re.search(r"([\d.]+) ([KM])iB fetched of 191 MiB", outcome.stdout)
    assert fetched
    assert float(fetched[1]) * {"K": 1, "M": 1024}[fetched[2]] <= 1280
    random = re.search(r"([\d.]+) KiB fetched of 466 GiB", outcome.stdout)
    assert random
    assert float(random[1]) <= 256


def test_a_kept_demo_can_be_played_with_and_stopped(own_directories: Path) -> None:
    """`demo --keep` leaves it mounted, `status` shows it, `demo --stop` takes it down."""
    kept = run_cli("demo", "--keep", timeout_s=60)
    try:
        assert kept.returncode == 0, kept.stderr
        assert "valohai-fuse demo --stop" in kept.stdout
        assert len(json.loads(run_cli("status", "--json").stdout)["mounts"]) == 3
        assert run_cli("demo", "--keep").returncode == 2
        path = re.search(r"valohai-fuse info (\S+)", kept.stdout)
        assert path
        with open(shlex.split(path[1])[0], "rb") as file:
            assert file.read(8) == b"reading,"
    finally:
        stopped = run_cli("demo", "--stop")
    assert stopped.returncode == 0
    assert "the demo is gone" in stopped.stderr
    assert run_cli("demo", "--stop").stderr == "no demo is up\n"
