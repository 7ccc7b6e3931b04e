"""The supervisor over daemons that behave, fail, die and hang; no FUSE needed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from valohai_fuse.handshake import MountSpec, Report
from valohai_fuse.obs.runtime_dir import RuntimeDir, is_running, mount_id, process_start
from valohai_fuse.settings import as_dict, resolve
from valohai_fuse.supervisor import Plan, PlannedMount, child_environment, in_memory

FAKE_DAEMON = """
import os, signal, sys, msgspec
from valohai_fuse.errors import FuseUnavailableError
from valohai_fuse.handshake import MountSpec, Report, failed
with open(int(sys.argv[1]), "rb") as pipe:
    spec = msgspec.json.decode(pipe.read(), type=MountSpec)
kind = spec.inputs[0]
mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
if kind == "dies":
    sys.exit("ValueError: https://h/p?sig=abc")
if kind != "mute":
    report = failed(FuseUnavailableError("no fuse", hint="ask")) if kind == "fails" else Report(pid=os.getpid(), files=2, bytes=10)
    with open(int(sys.argv[2]), "wb") as pipe:
        pipe.write(msgspec.json.encode(report) + b"\\n")
if kind == "fails":
    sys.exit(1)
while True:
    got = signal.sigwait({signal.SIGTERM, signal.SIGUSR1})
    if got == signal.SIGUSR1:
        os._exit(9)
    if kind != "stubborn":
        break
"""
DRIVER = """
import os, signal, sys, msgspec
from valohai_fuse import supervisor
from valohai_fuse.obs.runtime_dir import RuntimeDir
plan = msgspec.json.decode(open(int(sys.argv[1]), "rb").read(), type=supervisor.Plan)
def tell(reports):
    sys.stdout.buffer.write(msgspec.json.encode(reports) + b"\\n")
    sys.stdout.flush()
def kill_the_doomed():
    for record in RuntimeDir(plan.runtime_dir).records():
        if record.inputs == ("doomed",):
            os.kill(record.pid, signal.SIGKILL)
            os.waitid(os.P_PID, record.pid, os.WEXITED | os.WNOWAIT)
given = dict(on_start=tell, on_stop=kill_the_doomed, lifeline=int(sys.argv[2]), daemon_command=[sys.executable, sys.argv[3]])
sys.exit(supervisor.Supervisor(plan, **given).run())
"""


class Supervised:
    def __init__(self, process: subprocess.Popen[bytes], runtime: RuntimeDir) -> None:
        self.process = process
        self.runtime = runtime

    def reports(self) -> list[Report]:
        assert self.process.stdout is not None
        return msgspec.json.decode(self.process.stdout.readline(), type=list[Report])

    def end(self) -> int:
        return self.process.wait(20)


@contextmanager
def supervised(
    tmp_path: Path, *kinds: str, timeout_s: float = 20, grace_s: float = 5, lifeline: int = -1
) -> Iterator[Supervised]:
    runtime = RuntimeDir(str(tmp_path / "run"))
    runtime.ensure()
    mounts = []
    for kind in kinds:
        place = tmp_path / "inputs" / kind
        place.mkdir(parents=True)
        settings = as_dict(resolve({"runtime_dir": runtime.path, "log_file": str(tmp_path / f"{kind}.log")}, {}))
        spec = MountSpec(
            settings=settings,
            mountpoint=str(place),
            inputs=(kind,),
            control_path=runtime.file(mount_id(str(place)), "sock"),
        )
        mounts.append(PlannedMount(spec=spec, made_directories=(str(tmp_path / "inputs"), str(place))))
    plan = Plan(runtime_dir=runtime.path, mount_timeout_s=timeout_s, grace_period_s=grace_s, mounts=tuple(mounts))
    (tmp_path / "fake.py").write_text(FAKE_DAEMON)
    plan_fd = in_memory(msgspec.json.encode(plan))
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(plan_fd), str(lifeline), str(tmp_path / "fake.py")],
        stdout=subprocess.PIPE,
        pass_fds=(plan_fd, *([lifeline] if lifeline >= 0 else [])),
        env=child_environment(),
    )
    os.close(plan_fd)
    try:
        yield Supervised(process, runtime)
    finally:
        for record in runtime.records():
            if is_running(record):
                os.kill(record.pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _nothing_left(tmp_path: Path) -> bool:
    left = {path.name for path in (tmp_path / "run").iterdir()} - {"lock"}
    return not left and not (tmp_path / "inputs").exists()


def test_each_mount_gets_a_record_and_sigterm_takes_everything_down(tmp_path: Path) -> None:
    with supervised(tmp_path, "a", "b") as running:
        assert [(r.error, r.files) for r in running.reports()] == [("", 2), ("", 2)]
        records = running.runtime.records()
        assert [r.inputs for r in records] == [("a",), ("b",)]
        assert all(is_running(r) and r.supervisor_pid == running.process.pid for r in records)
        running.process.terminate()
        assert running.end() == 0
        assert not any(is_running(r) for r in records)
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("fails", "FuseUnavailableError", "no fuse"),
        ("dies", "MountFailedError", "ended before its mount answered (ValueError: https://h/p?***)"),
        ("mute", "MountFailedError", "no answer within 0.5 s"),
    ],
)
def test_when_one_fails_all_are_taken_back(tmp_path: Path, bad: str, error: str, message: str) -> None:
    with supervised(tmp_path, "a", bad, timeout_s=0.5 if bad == "mute" else 20) as running:
        reports = running.reports()
        assert running.end() == 1
        assert reports[0].error == ""
        assert reports[1].error == error
        assert message in reports[1].message
    assert _nothing_left(tmp_path)


def test_a_daemon_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with supervised(tmp_path, "stubborn", grace_s=1) as running:
        running.reports()
        running.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(0.5)
        running.process.terminate()  # asked again: it waits for nobody
        assert running.end() == 1
    assert "did not end in time; killed" in (tmp_path / "stubborn.log").read_text()
    assert _nothing_left(tmp_path)


def test_a_crash_is_told_in_the_log_and_leaves_the_others_alone(tmp_path: Path) -> None:
    with supervised(tmp_path, "a", "b") as running:
        running.reports()
        first, second = running.runtime.records()
        os.kill(first.pid, signal.SIGUSR1)
        log = tmp_path / "a.log"
        watch = select.poll()
        for _ in range(200):
            if "ended unexpectedly: exit status 9" in log.read_text():
                break
            watch.poll(50)
        else:
            pytest.fail("the crash was not told")
        assert is_running(second)
        running.process.terminate()
        assert running.end() == 1


def test_a_crash_in_the_moment_of_the_stop_is_told_too(tmp_path: Path) -> None:
    """The daemon dies after the supervisor has looked and before it has asked it to end."""
    with supervised(tmp_path, "doomed", "a") as running:
        running.reports()
        running.process.terminate()
        assert running.end() == 1
    assert "ended unexpectedly: killed by signal 9" in (tmp_path / "doomed.log").read_text()
    assert _nothing_left(tmp_path)


def test_the_end_of_the_lifeline_takes_everything_down(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with supervised(tmp_path, "a", lifeline=reader) as running:
        os.close(reader)
        running.reports()
        os.close(writer)
        assert running.end() == 0
    assert _nothing_left(tmp_path)


def test_daemons_survive_their_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path, "a") as running:
        running.reports()
        (record,) = running.runtime.records()
        running.process.kill()
        running.process.wait()
        assert is_running(record)


def test_the_supervisor_is_light() -> None:
    code = "import sys, valohai_fuse.supervisor; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert not {"trio", "httpx", "pyfuse3", "pycurl", "rich", "click"} & set(loaded.stdout.split())


def test_records_are_only_taken_from_a_directory_that_is_ours(tmp_path: Path) -> None:
    runtime = RuntimeDir(str(tmp_path / "run"))
    assert runtime.records() == []
    os.symlink(tmp_path, tmp_path / "link")
    assert RuntimeDir(str(tmp_path / "link")).records() == []
    runtime.ensure()
    (tmp_path / "run" / "x.json").write_text("nonsense")
    assert runtime.records() == []
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_a_process_is_told_from_a_later_one_of_its_number_and_from_its_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    assert process_start(child.pid) is not None
    assert process_start(os.getpid()) != process_start(child.pid)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None
    child.wait()


def test_mount_ids_are_file_names_and_tell_mounts_apart() -> None:
    ids = [mount_id(p) for p in ("/valohai/inputs/a b", "/valohai/inputs/a/b", "/", "/x/" + "ö" * 300, "/y/..x")]
    assert len(set(ids)) == len(ids)
    assert all("/" not in i and len(i) < 60 and not i.startswith(".") for i in ids)


def test_a_spec_larger_than_a_pipe_arrives() -> None:
    content = json.dumps(list(range(100_000))).encode()
    with open(in_memory(content), "rb") as file:
        assert file.read() == content
