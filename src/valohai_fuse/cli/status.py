"""`valohai-fuse status`: what is mounted, alive or dead, and how it is doing. The JSON's shape is documented in docs/status.md."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from valohai_fuse.cli import output
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import ValohaiFuseError
from valohai_fuse.mount import table
from valohai_fuse.obs.control_client import NoAnswerError, ask
from valohai_fuse.obs.metrics import hit_rate
from valohai_fuse.obs.runtime_dir import MountRecord, RuntimeDir, is_running
from valohai_fuse.settings import Settings

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

SAMPLE_S: Final = 0.25
"""Between the two answers that a throughput is taken from."""
WATCH_S: Final = 1.0
ASKED_AT_ONCE_MAX: Final = 16
_ANSWER_S: Final = 3.0


@dataclass(slots=True)
class Seen:
    """One mount at one moment."""

    mountpoint: str
    inputs: tuple[str, ...]
    as_root: bool
    state: str
    """mounted, dead (its daemon is gone), silent (its daemon does not answer), gone (unmounted behind its back)."""
    pid: int | None = None
    log: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)
    at_s: float = 0.0
    read_bytes_per_s: float | None = None
    fetched_bytes_per_s: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """All counters and gauges by name; empty when the daemon did not answer."""
        return dict(self.answer.get("metrics", {}))

    @property
    def errors(self) -> int:
        """Reads that failed, and unexpected errors."""
        return int(self.metrics.get("read_errors", 0) + self.metrics.get("handler_errors", 0))


def look(settings: Settings) -> list[Seen]:
    """All mounts of the runtime directory, and those in the inputs directory that no record tells of."""
    in_table = {entry.mountpoint: entry for entry in table.entries() if entry.is_ours}
    records = RuntimeDir(settings.runtime_dir).records()
    with ThreadPoolExecutor(ASKED_AT_ONCE_MAX) as pool:  # one daemon that hangs must not hold up the others' answers
        seen = list(pool.map(lambda record: _look_at(record, in_table.get(record.mountpoint)), records))
    for record in records:
        in_table.pop(record.mountpoint, None)
    base = table.resolve(settings.inputs_dir)
    for place in (place for place in in_table if place == base or place.startswith(base + "/")):
        alive = table.answers(place, timeout_s=1.0)
        state = {True: "mounted", False: "dead", None: "silent"}[alive]
        seen.append(Seen(place, (), as_root=False, state=state))
    return seen


def _look_at(record: MountRecord, entry: table.MountEntry | None) -> Seen:
    seen = Seen(record.mountpoint, record.inputs, record.as_root, "mounted", record.pid, record.log_path or None)
    if not is_running(record):
        seen.state = "dead" if entry is not None else "gone"
        seen.pid = None
        return seen
    try:
        seen.answer = ask(record.control_path, "status", timeout_s=_ANSWER_S)
        seen.at_s = time.monotonic()
    except NoAnswerError as error:
        seen.state = "starting" if error.refused else "silent"
    except ValohaiFuseError:
        seen.state = "silent"
    return seen


def with_rates(before: list[Seen], after: list[Seen]) -> list[Seen]:
    """`after` with the throughput since `before`."""
    earlier = {seen.mountpoint: seen for seen in before if seen.answer}
    for seen in after:
        old = earlier.get(seen.mountpoint)
        if old is None or not seen.answer or old.pid != seen.pid or seen.at_s <= old.at_s:
            continue
        elapsed_s = seen.at_s - old.at_s
        seen.read_bytes_per_s = (seen.metrics.get("read_bytes", 0) - old.metrics.get("read_bytes", 0)) / elapsed_s
        seen.fetched_bytes_per_s = (
            seen.metrics.get("fetched_bytes", 0) - old.metrics.get("fetched_bytes", 0)
        ) / elapsed_s
    return after


def as_json(seen: Seen) -> dict[str, Any]:
    """The documented shape; what is not known is null."""
    answer = seen.answer
    metrics = seen.metrics
    return {
        "mountpoint": seen.mountpoint,
        "inputs": list(seen.inputs),
        "as_root": seen.as_root,
        "state": seen.state,
        "pid": seen.pid,
        "log": seen.log,
        "since": answer.get("since"),
        "files": answer.get("files"),
        "bytes": answer.get("bytes"),
        "files_of_unknown_size": answer.get("files_of_unknown_size"),
        "cached_bytes": answer.get("cached_bytes"),
        "read_bytes_per_s": seen.read_bytes_per_s,
        "fetched_bytes_per_s": seen.fetched_bytes_per_s,
        "hit_rate": hit_rate(metrics),
        "renewals": metrics.get("renewals"),
        "errors": seen.errors if answer else None,
        "reading": answer.get("open_files", []),
        "metrics": metrics,
    }


def _rate(value: float | None) -> str:
    return "" if not value else f"{output.bytes_shown(value)}/s"


def _table(seen: list[Seen]) -> Table:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("INPUT", overflow="fold")
    made.add_column("STATE")
    for title in ("FILES", "SIZE", "CACHED", "READ", "FETCHED", "HITS", "NOW", "RENEWALS", "ERRORS"):
        made.add_column(title, justify="right")
    made.add_column("MOUNT POINT", overflow="fold")
    for one in seen:
        metrics, answer = one.metrics, one.answer
        share = hit_rate(metrics)
        style = {"mounted": "green", "dead": "red", "silent": "red", "gone": "yellow"}.get(one.state, "")
        numbers = (
            (
                f"{answer.get('files', 0):,}",
                output.bytes_shown(answer.get("bytes")),
                _cached(answer),
                output.bytes_shown(metrics.get("read_bytes", 0)),
                output.bytes_shown(metrics.get("fetched_bytes", 0)),
                "" if share is None else f"{share:.0%}",
                _rate(one.read_bytes_per_s),
                f"{metrics.get('renewals', 0):.0f}",
                str(one.errors),
            )
            if answer
            else ("",) * 9
        )
        made.add_row(
            ", ".join(one.inputs) or "?", f"[{style}]{one.state}[/]" if style else one.state, *numbers, one.mountpoint
        )
    return made


def _cached(answer: dict[str, Any]) -> str:
    cached, total = answer.get("cached_bytes"), answer.get("bytes")
    if cached is None:
        return ""
    return f"{output.bytes_shown(cached)} ({cached / total:.0%})" if total else output.bytes_shown(cached)


def _live(seen: list[Seen]) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    parts: list[RenderableType] = [_table(seen)]
    for one in seen:
        total, cached = one.answer.get("bytes"), one.answer.get("cached_bytes")
        if total and cached is not None:
            parts += [
                Text(f"\n{', '.join(one.inputs)}: {_cached(one.answer)} cached"),
                ProgressBar(total, cached, width=60),
            ]
        for reading in one.answer.get("open_files", [])[:10]:
            parts.append(Text(f"  reading {_reading(reading)}", style="dim"))
    return Group(*parts)


def _reading(entry: Any) -> str:
    return str(entry.get("path", entry)) if isinstance(entry, dict) else str(entry)


@verb(
    "status",
    example="valohai-fuse status --watch",
    help="Show each mount: files, bytes, how much is cached, throughput, hits, renewals, errors.",
)
@click.option("--json", "for_programs", is_flag=True, help="For programs; see docs/status.md.")
@click.option("--watch", is_flag=True, help="Go on showing it, with bars, until Ctrl-C.")
def status(settings: Settings, for_programs: bool, watch: bool) -> int:
    """Shows; 0 unless something is dead or silent, then 1."""
    first = look(settings)
    if for_programs and not watch:
        output.data_json({"mounts": [as_json(one) for one in first]})
        return _code(first)
    if not first and not watch:
        output.say("nothing is mounted")
        return 0
    if watch:
        return _watch(settings, first, for_programs=for_programs)
    time.sleep(SAMPLE_S)
    now = with_rates(first, look(settings))
    _console().print(_table(now))
    for one in now:
        if one.state in {"dead", "silent"}:
            hint = f"valohai-fuse unmount {one.mountpoint}, or mount it again"
            output.warning(f"{one.mountpoint} is {one.state}" + (f"; its log: {one.log}" if one.log else ""), hint)
        if trouble := _trouble(one):
            output.warning(f"{one.mountpoint}: {trouble}" + (f"; its log says where: {one.log}" if one.log else ""))
        for reading in one.answer.get("open_files", []):
            output.say(f"reading {one.mountpoint}: {_reading(reading)}")
    return _code(now)


def _trouble(one: Seen) -> str:
    """What the daemon's watchdog has seen, in words; empty when nothing."""
    overdue, stalls = (int(one.metrics.get(name, 0)) for name in ("requests_overdue", "loop_stalls"))
    longest_s = one.metrics.get("loop_stall_seconds_max", 0)
    said = [f"{overdue} requests outlived their deadline"] if overdue else []
    said += [f"it stood still {stalls} times, for {longest_s:.1f} s at the longest"] if stalls else []
    return ", ".join(said)


def _code(seen: list[Seen]) -> int:
    return int(any(one.state in {"dead", "silent"} for one in seen))


def _console() -> Any:
    import shutil
    import sys

    from rich.console import Console

    width = None if sys.stdout.isatty() else max(200, shutil.get_terminal_size().columns)
    return Console(no_color=not output.has_color(sys.stdout), highlight=False, width=width)


def _watch(settings: Settings, before: list[Seen], *, for_programs: bool) -> int:
    """Until Ctrl-C, which is how it is meant to end."""
    import json

    from rich.live import Live

    try:
        if for_programs:
            while True:
                time.sleep(WATCH_S)
                now = with_rates(before, look(settings))
                output.data(json.dumps({"mounts": [as_json(one) for one in now]}))
                before = now
        with Live(_live(before), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_S)
                now = with_rates(before, look(settings))
                live.update(_live(now), refresh=True)
                before = now
    except KeyboardInterrupt:
        return 0
