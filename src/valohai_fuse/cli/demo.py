"""`valohai-fuse demo`: the whole of it in half a minute, without an account.

Starts a local Valohai (`sandbox`, in a process of its own), mounts its inputs with the real supervisor and daemons, and shows
real commands on real files. What it claims it measures: the numbers come from the store's and the daemons' own counters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Final, Self

import click
import msgspec

from valohai_fuse.cli import output, starting, unmounting
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import UsageError, ValohaiFuseError
from valohai_fuse.obs.runtime_dir import RuntimeDir, process_start
from valohai_fuse.sandbox.demo_data import CHECKPOINT_INPUT, CHECKPOINT_NAME, CSV_INPUT, CSV_NAME
from valohai_fuse.sandbox.remote import RemoteSandbox
from valohai_fuse.settings import Settings
from valohai_fuse.supervisor import Plan

_KEPT_NAME: Final = "demo-kept"
_FAR_OFFSET: Final = 250 * 1000**3
_EXPIRED_OFFSET: Final = 90 * 1000**2
_STOP_S: Final = 10.0
_SETTLE_S: Final = 5.0


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A demo that was left up, for `--stop` to find."""

    sandbox_pid: int
    sandbox_start: int
    directory: str
    mountpoints: tuple[str, ...]


@verb(
    "demo",
    example="valohai-fuse demo --keep",
    help="See it work without a Valohai account: a local Valohai on loopback, mounted, read, unmounted.",
)
@click.option("--keep", is_flag=True, help="Leave it mounted to play with.")
@click.option("--stop", is_flag=True, help="Take down what --keep left.")
def demo(settings: Settings, keep: bool, stop: bool) -> int:
    """Shows; 0 when everything that it shows was true."""
    runtime = RuntimeDir(settings.runtime_dir)
    if stop:
        return _stop(runtime)
    if keep and _kept(runtime) is not None:
        raise UsageError("a demo is up already", hint="valohai-fuse demo --stop")
    directory = tempfile.mkdtemp(prefix="valohai-fuse-demo-")
    try:
        if keep:
            _show_and_keep(settings, runtime, directory)
        else:
            _show(settings, directory)
    finally:
        if not keep or _kept(runtime) is None:
            shutil.rmtree(directory, ignore_errors=True)
    return 0


def _settings_for(settings: Settings, directory: str, sandbox: RemoteSandbox, *, keep: bool) -> Settings:
    """The user's settings with the demo's places; a kept demo is in the usual runtime directory, so that `status` finds it."""
    return dataclasses.replace(
        settings,
        config_dir=sandbox.config_dir,
        inputs_dir=sandbox.inputs_dir,
        cache_dir=os.path.join(directory, "cache"),
        runtime_dir=settings.runtime_dir if keep else os.path.join(directory, "run"),
    )


def _show(settings: Settings, directory: str) -> None:
    with RemoteSandbox(root=os.path.join(directory, "valohai")) as sandbox:
        own = _settings_for(settings, directory, sandbox, keep=False)
        with _Mounted(own, keep=False) as mounted:
            _tour(sandbox, own, mounted)
            _title("Unmount")
        output.data(f"$ ls {own.inputs_dir}")
        _clip(os.listdir(own.inputs_dir) or ["(nothing: the mounts and their directories are gone)"])


def _show_and_keep(settings: Settings, runtime: RuntimeDir, directory: str) -> None:
    sandbox = RemoteSandbox(root=os.path.join(directory, "valohai"), keep=True)
    sandbox.start()
    try:
        own = _settings_for(settings, directory, sandbox, keep=True)
        with _Mounted(own, keep=True) as mounted:
            _tour(sandbox, own, mounted)
            kept = Kept(
                sandbox_pid=sandbox.pid,
                sandbox_start=process_start(sandbox.pid) or 0,
                directory=directory,
                mountpoints=tuple(planned.spec.mountpoint for planned in mounted.plan.mounts),
            )
            _write(runtime, kept)
        sandbox.detach()
    finally:
        sandbox.close()
    _title("It is still mounted")
    output.data(f"look around      cd {own.inputs_dir} && ls -lR")
    output.data("how it is doing  valohai-fuse status --watch")
    output.data(f"what is known    valohai-fuse info {own.inputs_dir}/{CSV_INPUT}/{CSV_NAME}")
    output.data("stop             valohai-fuse demo --stop")


class _Mounted:
    """The demo's inputs, mounted; on leaving unmounted, unless they are to be kept and nothing went wrong."""

    def __init__(self, settings: Settings, *, keep: bool) -> None:
        self._settings = settings
        self._keep = keep

    def __enter__(self) -> Self:
        self._mount()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._keep and kind is None:
            self._running.let_go()
        else:
            self._unmount()

    def _mount(self) -> None:
        self.plan = _plan(self._settings)
        self._running = starting.start(self.plan, with_lifeline=not self._keep)

    def _unmount(self) -> None:
        if self._keep:
            self._running.hasten()
        self._running.stop()
        self._running.process.wait()

    def remount(self) -> None:
        """New daemons, that know nothing but what is on the disk."""
        self._unmount()
        self._mount()


def _plan(settings: Settings) -> Plan:
    plan = starting.make_plan(settings, (), show_all=False, root=None)
    assert plan is not None, "the demo's inputs are on demand"
    return plan


# --- what is shown ----------------------------------------------------------------------------------------------------


def _tour(sandbox: RemoteSandbox, settings: Settings, mounted: _Mounted) -> None:
    inputs = settings.inputs_dir
    table_file = os.path.join(inputs, CSV_INPUT, CSV_NAME)
    large_file = os.path.join(inputs, CHECKPOINT_INPUT, CHECKPOINT_NAME)
    _title("A local Valohai is up, and its inputs are mounted. Nothing has been downloaded")
    for planned in mounted.plan.mounts:
        output.data(f"  {planned.spec.inputs[0]:<14} {planned.spec.mountpoint}")
    _run("find", inputs, "-maxdepth", "3")
    _run("ls", "-l", os.path.dirname(table_file), os.path.dirname(large_file))
    _run("du", "-sh", "--apparent-size", inputs)
    output.data(f"So far the store has sent {_sent(sandbox)}.")

    _title("Reading fetches what is read, and no more")
    before = _fetched(sandbox)
    _run("head", "-n", "4", table_file)
    output.data(f"{_since(sandbox, before)} fetched of {output.bytes_shown(os.path.getsize(table_file))}.")
    before = _fetched(sandbox)
    _read(large_file, _FAR_OFFSET, 4096, "4 KiB from the middle")
    output.data(f"{_since(sandbox, before)} fetched of {output.bytes_shown(os.path.getsize(large_file))}.")

    _title("Every signed URL expires now. Reading goes on")
    renewals = sandbox.statistics()["renewals"]
    sandbox.expire_urls()
    _read(table_file, _EXPIRED_OFFSET, 64, "a place not read before")
    output.data(
        f"The store refused the old URL; {sandbox.statistics()['renewals'] - renewals} renewal, and the read never noticed."
    )

    _title("The store is switched off, and everything is unmounted and mounted anew. What was read is still there")
    sandbox.stop_store()
    try:
        mounted.remount()
        _run("head", "-n", "4", table_file)
        _read(table_file, _EXPIRED_OFFSET, 64, "the same place again")
    finally:
        sandbox.start_store()
    output.data("Both came out of the cache on the disk.")


def _title(text: str) -> None:
    bold, plain = ("\x1b[1m", "\x1b[0m") if output.has_color(sys.stdout) else ("", "")
    output.data(f"\n{bold}== {text} =={plain}")


def _run(*command: str) -> None:
    """A real command on real files; raises when it fails, for then the demo would be lying."""
    output.data(f"$ {' '.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    _clip(done.stdout.splitlines())
    if done.returncode != 0:
        raise ValohaiFuseError(f"{command[0]} failed in the demo: {done.stderr.strip()}")
    output.data("")


def _clip(lines: Sequence[str], lines_max: int = 18) -> None:
    for line in lines[:lines_max]:
        output.data(line)
    if len(lines) > lines_max:
        output.data(f"... and {len(lines) - lines_max} lines more")


def _read(path: str, offset: int, count: int, what: str) -> None:
    output.data(
        f'$ python -c \'f = open("{os.path.basename(path)}", "rb"); f.seek({offset}); f.read({count})\'   # {what}'
    )
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        began_s = time.monotonic()
        data = os.pread(descriptor, count, offset)
        took_ms = (time.monotonic() - began_s) * 1000
    finally:
        os.close(descriptor)
    if len(data) != count:
        raise ValohaiFuseError(f"a short read in the demo: {len(data)} bytes of {count}")
    output.data(f"{data[:32]!r}...  ({took_ms:.0f} ms)")


def _fetched(sandbox: RemoteSandbox) -> int:
    """Bytes that the store has sent, once what is under way (a little ahead of the reader) has arrived."""
    deadline_s = time.monotonic() + _SETTLE_S
    before = -1
    while True:
        statistics: dict[str, Any] = sandbox.statistics()["store"]
        sent = int(statistics["sent_bytes"])
        if (sent == before and not statistics["active_requests"]) or time.monotonic() >= deadline_s:
            return sent
        before = sent
        time.sleep(0.1)


def _sent(sandbox: RemoteSandbox) -> str:
    return output.bytes_shown(_fetched(sandbox))


def _since(sandbox: RemoteSandbox, before: int) -> str:
    return output.bytes_shown(_fetched(sandbox) - before)


# --- a demo that was kept ---------------------------------------------------------------------------------------------


def _kept(runtime: RuntimeDir) -> Kept | None:
    if not runtime.is_trusted():
        return None
    try:
        with open(runtime.file(_KEPT_NAME, "state"), "rb") as file:
            return msgspec.json.decode(file.read(), type=Kept)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(runtime: RuntimeDir, kept: Kept) -> None:
    runtime.ensure()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(runtime.file(_KEPT_NAME, "state"), flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(kept))


def _stop(runtime: RuntimeDir) -> int:
    kept = _kept(runtime)
    if kept is None:
        output.say("no demo is up")
        return 0
    for record in runtime.records():
        if record.mountpoint in kept.mountpoints:
            output.say(
                f"{record.mountpoint}: {unmounting.take_down(runtime, unmounting.Target(record.mountpoint, record))}"
            )
            with contextlib.suppress(OSError):
                os.unlink(record.log_path)
    if process_start(kept.sandbox_pid) == kept.sandbox_start:
        with contextlib.suppress(ProcessLookupError):
            os.kill(kept.sandbox_pid, signal.SIGTERM)
        deadline_s = time.monotonic() + _STOP_S
        while process_start(kept.sandbox_pid) == kept.sandbox_start and time.monotonic() < deadline_s:
            time.sleep(0.02)
    if os.path.basename(kept.directory).startswith("valohai-fuse-demo-"):
        shutil.rmtree(kept.directory, ignore_errors=True)
    os.unlink(runtime.file(_KEPT_NAME, "state"))
    output.say("the demo is gone")
    return 0
