"""The command `valohai-fuse`: finds the verb, runs it, and is the last edge: whatever happens becomes one `error:` line and
an exit code, never a traceback (but with `--log-level DEBUG`).

Imports nothing heavy: a verb's module is loaded when that verb is used, so that `--help` and completion are instant.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from valohai_fuse import __version__
from valohai_fuse.cli import mount_helper, options, output
from valohai_fuse.errors import (
    ConfigurationError,
    FuseUnavailableError,
    MountFailedError,
    UsageError,
    ValohaiFuseError,
)

EXIT_CODES: Final[tuple[tuple[type[ValohaiFuseError], int], ...]] = (
    (UsageError, 2),
    (ConfigurationError, 3),
    (FuseUnavailableError, 4),
    (MountFailedError, 5),
)
EXIT_OTHER: Final = 1
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141

VERBS: Final = {
    "mount": ("mounting:mount", "Mount on-demand inputs as ordinary files."),
    "run": ("running:run", "Mount, run a command, unmount."),
    "unmount": ("unmounting:unmount", "Unmount inputs, also dead ones."),
    "status": ("status:status", "Show what is mounted and how it is doing."),
    "info": ("info:info", "Show what Valohai knows of a file and how much of it is cached."),
    "prefetch": ("prefetching:prefetch", "Fetch files or directories into the cache."),
    "download": ("downloading:download", "Download inputs as ordinary files, without FUSE."),
    "cache": ("cache:cache", "Look after the block cache: info, verify, prune, clear, export."),
    "doctor": ("doctor:doctor", "Say what is missing on this machine, and how to get it."),
    "demo": ("demo:demo", "See it work without a Valohai account."),
}


class _Verbs(click.Group):
    """Loads a verb's module when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(f"valohai_fuse.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="valohai-fuse")
def cli() -> None:
    """Valohai on-demand inputs as ordinary read-only files, fetched when something first reads them.

    \b
    Example:
      valohai-fuse mount            every on-demand input, at its place
      valohai-fuse run -- python train.py

    Each command has --help with an example. Settings: flag, then environment, then default.
    """


def exit_code_of(error: ValohaiFuseError) -> int:
    """The exit code that the class of an error stands for."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_OTHER)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns its exit code and raises nothing."""
    try:
        result = cli.main(mount_helper.translate(arguments, VERBS), prog_name="valohai-fuse", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as usage:
        print(usage.ctx.get_help(), file=sys.stderr)
        return 2
    except click.ClickException as usage:
        where = usage.ctx.command_path if isinstance(usage, click.UsageError) and usage.ctx else "valohai-fuse"
        output.error(usage.format_message(), hint=f"{where} --help")
        return 2
    except (click.Abort, KeyboardInterrupt):
        output.error("interrupted")
        return EXIT_INTERRUPTED
    except ValohaiFuseError as error:
        output.error(error.message, error.hint)
        return exit_code_of(error)
    except (BrokenPipeError, SystemExit):  # click makes the latter, and nothing else, of the former
        return EXIT_BROKEN_PIPE  # whoever read our output has had enough (`| head`)
    except Exception as error:  # noqa: BLE001 - the last edge
        return _internal(error)
    return result if isinstance(result, int) else 0


def _internal(error: Exception) -> int:
    settings = options.effective_settings()
    if settings is not None and settings.log_level == "DEBUG":
        import traceback

        from valohai_fuse.obs.redaction import redact

        print(redact(traceback.format_exc()), file=sys.stderr)
    logs = f"; the logs of mounts are in {settings.runtime_dir}" if settings is not None else ""
    output.error(f"internal: {type(error).__name__}: {error}", hint=f"--log-level DEBUG shows where{logs}")
    return EXIT_OTHER


def main() -> NoReturn:
    """The entry point."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
