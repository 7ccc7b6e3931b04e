"""The command line without a mount: help, refusals, exit codes, and the last edge."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from types import ModuleType

import click
import pytest

from support.mounts import run_cli
from valohai_fuse.cli import fuse_access, main, mount_helper, options, output, starting
from valohai_fuse.cli.cache import cache
from valohai_fuse.errors import (
    ConfigurationError,
    FuseUnavailableError,
    MountFailedError,
    ReadError,
    UsageError,
    ValohaiFuseError,
)
from valohai_fuse.mount import table
from valohai_fuse.settings import OPTIONS, Settings
from valohai_fuse.sources.manifest_file import InputSummary

LOCATIONS = ("--config-dir", "--inputs-dir", "--cache-dir")


COMMANDS = [verb for verb in main.VERBS if verb != "cache"] + [f"cache {name}" for name in cache.commands]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help_with_an_example_and_the_three_locations(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command has --help with an example, and takes the three location flags."""
    assert main.run([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example:\n  valohai-fuse {verb}" in shown
    assert all(flag in shown for flag in LOCATIONS)
    assert "VH_CONFIG_DIR" in shown


def test_mount_takes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["mount", "--help"])
    words = "".join(capsys.readouterr().out.split())
    assert all(option.flag in words and option.env in words for option in OPTIONS)


def test_help_loads_nothing_heavy() -> None:
    """`--help` is instant: no verb's module is loaded for it."""
    code = "import sys; from valohai_fuse.cli import main; main.run(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"trio", "httpx", "pyfuse3", "pycurl", "rich", "msgspec", "valohai_fuse.cli.mounting"} & set(
        done.stderr.split()
    )
    assert all(f"  {verb} " in done.stdout for verb in main.VERBS)


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["mount", "--nonsense"], ["run"], ["mount", "--read-timeout=x"], ["unmount", "--all", "x"], []],
)
def test_wrong_usage_is_exit_code_2_and_goes_to_stderr(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") if arguments else "Commands:" in said.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (ConfigurationError("x"), 3),
        (FuseUnavailableError("x"), 4),
        (MountFailedError("x"), 5),
        (ReadError("x"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (ZeroDivisionError("https://h/p?sig=abc"), 1),
    ],
)
def test_whatever_a_verb_raises_becomes_an_exit_code_and_one_line(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit codes as on the product page; never a traceback, never a secret."""
    _failing_verb(monkeypatch, error)
    assert main.run(["status"]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "abc" not in said
    if isinstance(error, ZeroDivisionError):
        assert said.startswith("error: internal: ZeroDivisionError: https://h/p?***\nhint: --log-level DEBUG")


def test_a_reader_who_has_had_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "valohai_fuse", "doctor"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (main.EXIT_BROKEN_PIPE, "")


def test_a_traceback_is_shown_to_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _failing_verb(monkeypatch, ZeroDivisionError("https://h/p?sig=abc"))
    assert main.run(["status", "--log-level", "DEBUG"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "abc" not in said


def _failing_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @options.verb("status", example="x", help="x")
    def fails(settings: Settings) -> int:
        raise error

    module = ModuleType("fake")
    module.status = fails  # type: ignore[attr-defined] # a module made here
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: module if name.endswith("cli.status") else real(name))


def test_a_hint_follows_its_error_and_nothing_forges_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.error("no such\nerror: file https://h/p?sig=abc", hint="look\x1b[31m")
    assert capsys.readouterr().err == "error: no such\\nerror: file https://h/p?***\nhint: look\\x1b[31m\n"


def test_only_the_first_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    output.warnings(f"w{number}" for number in range(25))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == output.WARNINGS_SHOWN_MAX + 1
    assert lines[-1] == "warning: and 15 more; the log has them"


@pytest.mark.parametrize(
    ("count", "shown"), [(None, "?"), (0, "0 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (5 << 60, "5120 PiB")]
)
def test_bytes_are_shown_short(count: int | None, shown: str) -> None:
    assert output.bytes_shown(count) == shown


# --- which inputs -----------------------------------------------------------------------------------------------------


def _inputs() -> list[InputSummary]:
    def summary(name: str, files: int, on_demand: int) -> InputSummary:
        return InputSummary(name=name, input_id=None, files=files, on_demand_files=on_demand, bytes_known=0)

    return [summary("lazy", 3, 3), summary("mixed", 3, 1), summary("ready", 2, 0), summary("empty", 0, 0)]


@pytest.mark.parametrize(
    ("names", "show_all", "chosen"),
    [
        ((), False, ["lazy", "mixed", "empty"]),
        ((), True, ["lazy", "mixed", "ready", "empty"]),
        (("ready", "lazy", "ready"), False, ["ready", "lazy"]),
    ],
)
def test_inputs_with_something_on_demand_are_chosen(names: tuple[str, ...], show_all: bool, chosen: list[str]) -> None:
    assert [s.name for s in starting.choose(_inputs(), names, show_all=show_all)] == chosen


def test_an_unknown_input_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match="'x', 'y'") as caught:
        starting.choose(_inputs(), ("x", "lazy", "y"), show_all=False)
    assert caught.value.hint == "inputs that exist: empty, lazy, mixed, ready"


# --- mount(8) ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "translated"),
    [
        (["status", "-o", "x", "y"], ["status", "-o", "x", "y"]),
        (
            ["/cfg", "/mnt", "-o", "rw,nosuid,cache_dir=/c,allow_other,input=a,input=b"],
            ["mount", "--root", "/mnt", "--config-dir", "/cfg", "--cache-dir", "/c", "--allow-other", "--", "a", "b"],
        ),
        (
            ["valohai", "/mnt", "-n", "-o", "x-systemd.automount,xattrs=0,all"],
            ["mount", "--root", "/mnt", "--no-xattrs", "--all", "--"],
        ),
    ],
)
def test_mount_8_is_translated(arguments: list[str], translated: list[str]) -> None:
    assert mount_helper.translate(arguments, main.VERBS) == translated


@pytest.mark.parametrize(
    ("option", "said"), [("sise=3", "unknown mount option 'sise'"), ("cache_dir", "needs a value")]
)
def test_mount_8_options_that_make_no_sense(option: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        mount_helper.translate(["x", "/mnt", "-o", option], main.VERBS)
    outcome = run_cli("x", "/mnt", "-o", option)
    assert (outcome.returncode, "Traceback" in outcome.stderr) == (2, False)


# --- FUSE that cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (FileNotFoundError(2, "x"), "/dev/fuse does not exist"),
        (PermissionError(1, "Operation not permitted"), "may not be opened"),
        (OSError(19, "No such device"), "cannot be opened: No such device"),
    ],
)
def test_the_device_that_is_missing_is_told_apart(failure: OSError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise failure

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FuseUnavailableError, match=said) as caught:
        fuse_access.check_device()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("uid", "program", "said"),
    [
        (0, "/usr/bin/fusermount3", "root without CAP_SYS_ADMIN"),
        (1000, None, "neither CAP_SYS_ADMIN nor fusermount3"),
        (1000, "/bin/true", "is not setuid root"),
    ],
)
def test_the_privilege_that_is_missing_is_told_apart(
    uid: int, program: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "has_admin_capability", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(shutil, "which", lambda _name: program)
    with pytest.raises(FuseUnavailableError, match=said) as caught:
        fuse_access.check(allow_other=False)
    assert caught.value.hint


def test_every_error_class_that_ends_a_command_has_its_exit_code() -> None:
    codes = dict(main.EXIT_CODES)
    assert len(set(codes.values())) == len(codes)
    direct: Iterable[type] = ValohaiFuseError.__subclasses__()
    without = {kind.__name__ for kind in direct if kind.__module__ == "valohai_fuse.errors" and kind not in codes}
    assert without == {"ReadError"}, "reads fail inside a mount, they end no command"
    assert isinstance(main.cli, click.Group)
