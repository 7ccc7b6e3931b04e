"""`scripts/simulate`: what the readahead planner makes of a trace of reads, on a line with this latency and bandwidth.

Runs the planner of `valohai_fuse.model.readahead` in virtual time, without a network or a mount (see `simulation` for what is
modelled). Prints for each trace the requests, the bytes fetched, modelled seconds and what readers waited.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.simulation import Line, Outcome, Simulation, default_of
from benchmarks.traces import MADE, Trace, dump, load
from valohai_fuse.errors import UsageError
from valohai_fuse.settings import parse_bytes

_HEAD = ("trace", "GETs", "conns", "MiB", "fetched/read", "seconds", "stalled s", "p50 ms", "p99 ms")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: scripts/simulate sequential skip-17m --latency-ms 100 --per-connection-mb-s 80",
    )
    parser.add_argument(
        "traces",
        nargs="*",
        metavar="TRACE",
        help="a name from --list, `all` of these, a file of JSON lines, or a mount's log written at --log-level DEBUG",
    )
    parser.add_argument("--list", action="store_true", help="the traces that need no file")
    parser.add_argument("--dump", action="store_true", help="print the reads as JSON lines instead of running them")
    parser.add_argument("--latency-ms", type=_number, default=20, metavar="MS", help="to a request's first byte (20)")
    parser.add_argument("--mb-s", type=_number, default=600, metavar="N", help="of all connections together (600)")
    parser.add_argument("--per-connection-mb-s", type=_number, default=math.inf, metavar="N", help="of each (no limit)")
    for flag, setting, parse in (
        ("--connections", "connections", int),
        ("--window", "readahead", _size),
        ("--window-total", "readahead_total", _size),
        ("--background-fill", "background_fill", _size),
    ):
        default = default_of(setting)
        text = f"as the setting --{setting.replace('_', '-')} ({default})"
        parser.add_argument(flag, type=parse, default=default, metavar="N" if parse is int else "SIZE", help=text)
    return parser.parse_args(argv)


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"not a number from 0 on: {text!r}")
    return value


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _trace(name: str) -> Trace:
    if name in MADE:
        return MADE[name][1]()
    try:
        return load(Path(name))
    except FileNotFoundError:
        raise SystemExit(f"error: no such trace: {name}\nhint: a file, or one of {', '.join(MADE)}") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def _row(name: str, outcome: Outcome) -> tuple[str, ...]:
    return (
        name,
        f"{outcome.gets}",
        f"{outcome.connections}",
        f"{outcome.fetched_bytes / 2**20:.1f}",
        f"{outcome.fetched_bytes / max(1, outcome.read_bytes):.2f}",
        f"{outcome.elapsed_s:.3f}",
        f"{outcome.stalled_s:.3f}",
        f"{outcome.p50_s * 1e3:.2f}",
        f"{outcome.p99_s * 1e3:.2f}",
    )


def _say(row: tuple[str, ...]) -> None:
    name, *figures = row
    sys.stdout.write(f"{name:<16}" + "".join(f"{figure:>13}" for figure in figures) + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _arguments(argv)
    if arguments.list or not arguments.traces:
        for name, (what, _) in MADE.items():
            sys.stdout.write(f"{name:<16}{what}\n")
        return 0
    if not arguments.mb_s or not arguments.per_connection_mb_s or arguments.connections < 1:
        raise SystemExit("error: nothing moves over a line without bandwidth or connections")
    line = Line(
        arguments.latency_ms / 1e3,
        arguments.mb_s * 1e6,
        arguments.per_connection_mb_s * 1e6,
        arguments.connections,
        arguments.window,
        arguments.window_total,
        arguments.background_fill,
    )
    names = [one for name in arguments.traces for one in (MADE if name == "all" else [name])]
    if not arguments.dump:
        _say(_HEAD)
    for name in names:
        trace = _trace(name)
        if arguments.dump:
            sys.stdout.write(dump(trace))
        else:
            _say(_row(Path(name).name, Simulation(trace, line).run()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
