"""Turns trials into what people read: medians, ratios, verdicts; a table for the terminal, a page and a picture for docs/.

The page is generated from the stored results alone, so a run of a few workloads renews their rows and keeps the others.
A trial that failed stays in the report with its reason: a peer that cannot do a thing is a result too.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.sax.saxutils import escape

from benchmarks import profiling
from benchmarks.limits import LIMITS
from benchmarks.peers import OURS, PEERS, PLAIN
from benchmarks.workloads import OWN, UNITS, WORKLOADS, Target, Workload

Trials = dict[str, list[dict[str, Any]]]
"""Peer -> its trials of one workload: metrics, or {"error": reason}."""

_KINDS = {peer.name: peer.kind for peer in PEERS}
_ROUNDS_MIN = 2
"""So often a peer is asked before anything is concluded from it."""
_CACHING = {peer.name for peer in PEERS if peer.caches}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target beside what was measured. `reached` is None where there is nothing to compare with."""

    text: str
    measured: str
    reached: bool | None

    @property
    def mark(self) -> str:
        """One word."""
        return {True: "yes", False: "NO", None: "-"}[self.reached]


def median(trials: Iterable[Mapping[str, Any]], metric: str) -> float | None:
    """Of the trials that have it; None when none has."""
    values = [t[metric] for t in trials if metric in t]
    return statistics.median(values) if values else None


def best_other(trials: Trials, metric: str, *, kind: str = "mount") -> tuple[str, float] | None:
    """The best peer of this kind beside ours, and its median."""
    more_is_better = UNITS[metric][1]
    found = [
        (name, value)
        for name, runs in trials.items()
        if name != OURS and _KINDS.get(name, kind) == kind and (value := median(runs, metric)) is not None
    ]
    if not found:
        return None
    return (max if more_is_better else min)(found, key=lambda pair: pair[1])


def is_far_behind(trials: Trials, peer: str) -> bool:
    """Whether a peer is no candidate for the best other mount any more: of two rounds at least its quickest took more than twice as
    long as another mount's slowest."""
    others = [name for name in trials if _KINDS.get(name) == "mount" and name not in {OURS, peer}]
    took_s = {name: [t["elapsed_s"] for t in trials[name] if "elapsed_s" in t] for name in (peer, *others)}
    return len(took_s[peer]) >= _ROUNDS_MIN and any(
        len(took_s[name]) >= _ROUNDS_MIN and min(took_s[peer]) > 2 * max(took_s[name]) for name in others
    )


def judge(target: Target, trials: Trials, others: Mapping[str, Trials] = MappingProxyType({})) -> Verdict:
    """Whether ours reaches the target in these trials; `others` are those of other workloads, by name."""
    unit, more_is_better = UNITS[target.metric]
    word = "at least" if more_is_better else "at most"
    ours = median(trials.get(OURS, []), target.metric)
    if target.versus is None:
        text = f"{word} {_number(target.value)} {unit}"
        reached = None if ours is None else _reaches(ours, target.value, more_is_better)
        return Verdict(text, "-" if ours is None else f"{_number(ours)} {unit}", reached)
    text = f"{unit} {word} {_number(target.value)} x {target.versus}"
    reference = _reference(target, trials, others)
    if ours is None or reference is None or not reference[1]:
        return Verdict(text, "-", None)
    ratio = ours / reference[1]
    return Verdict(text, f"{ratio:.2f} x {reference[0]}", _reaches(ratio, target.value, more_is_better))


def _reference(target: Target, trials: Trials, others: Mapping[str, Trials]) -> tuple[str, float] | None:
    if (target.versus or "").startswith(OWN):
        value = median(others.get((target.versus or "").removeprefix(OWN), {}).get(OURS, []), target.metric)
        return None if value is None else (target.versus or "", value)
    if target.versus == "best":
        return best_other(trials, target.metric)
    if target.versus == "leanest cache":
        return best_other({name: runs for name, runs in trials.items() if name in _CACHING}, target.metric)
    value = median(trials.get(target.versus or "", []), target.metric)
    return None if value is None else (target.versus or "", value)


def _reaches(value: float, bound: float, more_is_better: bool) -> bool:
    return value >= bound if more_is_better else value <= bound


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


_COLUMNS: tuple[tuple[str, str], ...] = (
    ("CPU s/GiB", "cpu_s_gib"),
    ("CPU s", "cpu_s"),
    ("reader s", "reader_cpu_s"),
    ("MiB", "pss_mib"),
    ("GETs", "requests"),
    ("conns", "connections"),
    ("fetched/read", "amplification"),
    ("p50 ms", "p50_ms"),
    ("p99 ms", "p99_ms"),
)


def rows(workload: Workload, trials: Trials) -> tuple[list[str], list[list[str]], list[str]]:
    """Header and rows of one workload's table, best first; then a sentence for each peer that failed every time."""
    unit, more_is_better = UNITS[workload.metric]
    best = best_other(trials, workload.metric)
    extra = [
        c for c in _COLUMNS if c[1] != workload.metric and any(c[1] in t for runs in trials.values() for t in runs)
    ]
    header = ["", unit, "min-max", "x best mount", *(title for title, _ in extra)]
    done, failed = [], []
    rounds = max((len(runs) for runs in trials.values()), default=0)
    for name, runs in trials.items():
        value = median(runs, workload.metric)
        errors = [t["error"] for t in runs if "error" in t]
        if value is None:
            failed.append(f"{name} failed: {errors[0] if errors else 'no trial'}")
            continue
        values = [t[workload.metric] for t in runs if workload.metric in t]
        ratio = f"{value / best[1]:.2f}" if best and best[1] else "-"
        note = f" ({len(errors)} failed)" if errors else f" ({len(values)} of {rounds})" if len(values) < rounds else ""
        shown = [_number(median(runs, metric)) for _, metric in extra]
        row = [name + note, _number(value), f"{_number(min(values))}-{_number(max(values))}", ratio, *shown]
        done.append((value, row))
    done.sort(key=lambda pair: pair[0], reverse=more_is_better)
    return header, [row for _, row in done], failed


def table(header: list[str], lines: list[list[str]]) -> str:
    """Plain text, columns aligned; the first is left-aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    widths = [min(width, 44) for width in widths]
    out = []
    for name, *cells in (header, *lines):
        aligned = [cell[:width].rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        out.append("  ".join([name[: widths[0]].ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(out)


def text_of(workload: Workload, trials: Trials) -> str:
    """One workload for the terminal."""
    header, lines, failed = rows(workload, trials)
    parts = [f"== {workload.name}: {workload.title}", table(header, lines), *(f"   {reason}" for reason in failed)]
    for target in workload.targets:
        verdict = judge(target, trials)
        if verdict.reached is not None:
            parts.append(f"   target {verdict.text}: {verdict.measured}  [{verdict.mark}]")
    return "\n".join(parts)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Any]) -> str:
    """docs/benchmarks.md from the stored results (see `__main__` for their shape)."""
    workloads = [w for w in WORKLOADS if w.name in results["workloads"]]
    shown = "![the main numbers](benchmarks.svg)\n"
    parts = [_preamble(results), shown, "## Targets\n", _targets(workloads, results), *_missed(workloads, results)]
    for workload in workloads:
        entry = results["workloads"][workload.name]
        header, lines, failed = rows(workload, entry["trials"])
        parts.append(f"## {workload.title}\n")
        rounds = max(len(runs) for runs in entry["trials"].values())
        how = f"store {workload.profile.text}, {workload.state}, {rounds} rounds, {_dates(entry)}"
        parts.append(f"`{workload.name}`, {how}.\n")
        parts.append(_markdown(header, lines))
        parts += [f"{reason}\n" for reason in failed]
    if "cache" in results:
        parts.append(_cache(results["cache"]))
    parts += _profiles(results)
    parts.append(_commands(results))
    return "\n".join(parts)


_PROFILES = """\
Sampled by `scripts/bench profile --write`: one trial of ours on each workload, by process and by what the innermost
function does; where next to nothing is ours, the same reader in the local directory beside it (`plain`). An interrupt counts
for whoever it interrupts. The *floor* is what the kernel alone costs, whoever asks it: sockets, copies in and out, page
cache, names, FUSE, disk.
"""


def _profiles(results: Mapping[str, Any]) -> list[str]:
    """Where ours spends its processor time; see `benchmarks.profiling`."""
    found = results.get("profiles", {})
    if not found:
        return []
    parts = ["## Where the processor time goes\n", _PROFILES]
    for workload in [w for w in WORKLOADS if w.name in found]:
        parts.append(f"### {workload.title}\n")
        for peer, profile in found[workload.name].items():
            parts += [f"`{workload.name}`, {peer}, {profile['date']}.\n", _markdown(*profiling.rows(profile))]
    return parts


def _preamble(results: Mapping[str, Any]) -> str:
    versions = "\n".join(f"- {name}: {text}" for name, text in sorted(results["versions"].items()))
    return f"""# Benchmarks

Generated by `scripts/bench --write`; do not edit. Repeat all of it with that command, a part of it with
`scripts/bench --only seq-region,small-order-1 --runs 3`, and measure any directory with `scripts/bench --target DIR`.

Medians of interleaved rounds (A B C, B C A, ...; a peer was asked no more when it had used up four minutes, or when its quicker
round of two had taken more than twice as long as another mount's slowest) on
{results["machine"]}. The store is nginx on loopback. Distance is a delay before
the first byte of each response; a new connection is charged one more, over TLS two more, less the time since it was
opened. *Mounts* are compared
with the best other mount; the downloads (curl, aria2c, requests, valohai-utils) fetch each file whole to the disk first and
read it there, and no warm or random workload is theirs. `plain` is the same reads on the local directory that nginx serves.

CPU is that of the mount's whole process tree (the reader's own stands apart), MiB its peak PSS, GETs, connections and bytes come
from nginx's log. The other mounts get unsigned URLs and a listing, because none of them mounts a signed URL; s3fs gets each
input as a public bucket of the same nginx. mountpoint-s3 is in no package index that the bench installs from. httpdirfs is
Debian's; its newest version waits less per request.

{versions}
"""


def _targets(workloads: list[Workload], results: Mapping[str, Any]) -> str:
    lines = []
    for workload in workloads:
        for target in workload.targets:
            verdict = judge(target, results["workloads"][workload.name]["trials"], _trials_by_workload(results))
            lines.append([f"`{workload.name}`", verdict.text, verdict.measured, verdict.mark])
    return _markdown(["workload", "target", "measured", "reached"], lines)


def _trials_by_workload(results: Mapping[str, Any]) -> dict[str, Trials]:
    return {name: entry["trials"] for name, entry in results["workloads"].items()}


def _dates(entry: Mapping[str, Any]) -> str:
    """When it was measured; peers whose trials are of another day are named."""
    newest: str = entry["date"]
    older: dict[str, list[str]] = {}
    for peer, date in sorted(entry.get("dates", {}).items()):
        if date != newest:
            older.setdefault(date, []).append(peer)
    return "; ".join([newest, *(f"{', '.join(peers)}: {date}" for date, peers in sorted(older.items()))])


_MISSED = """\
## What was not reached, and why

Mount, reader and store share the processors. *Busy* is the rate at which all of them would be busy all the time, by the
profiles below: more is not to be had without less CPU. *Floor* is the same if daemon and workers cost nothing but the floor,
which no Python does. `plain` is the local directory, read by the same reader.
"""


def _missed(workloads: list[Workload], results: Mapping[str, Any]) -> list[str]:
    """A row for each workload with a target that was not reached, and its reason."""
    lines, reasons = [], []
    for workload in workloads:
        entry = results["workloads"][workload.name]
        verdicts = [judge(target, entry["trials"], _trials_by_workload(results)) for target in workload.targets]
        missed = [verdict for verdict in verdicts if verdict.reached is False]
        if missed:
            shown = [_ceiling(results, workload, floor=floor) for floor in (False, True)]
            plain = _number(median(entry["trials"].get(PLAIN, []), workload.metric))
            wanted = "; ".join(f"{verdict.text} (has {verdict.measured})" for verdict in missed)
            lines.append([f"`{workload.name}`", wanted, *shown, plain])
            reasons.append(f"- `{workload.name}`: {LIMITS[workload.name]}\n")
    if not lines:
        return []
    return [_MISSED, _markdown(["workload", "wanted", "busy", "floor", "`plain`"], lines), "".join(reasons)]


def _ceiling(results: Mapping[str, Any], workload: Workload, *, floor: bool) -> str:
    """MB/s with all processors busy throughout, where there is a profile that tells."""
    profile = results.get("profiles", {}).get(workload.name, {}).get(OURS)
    if profile is None or workload.metric != "mb_s":
        return "-"
    cores = int(results["machine"].split()[0])
    return f"{cores * 2**30 / 1e6 / profiling.busy_and_floor(profile)[floor]:,.0f} MB/s"


def _cache(kept: Mapping[str, Any]) -> str:
    figures = _markdown(["", "measured", "promised"], kept["rows"])
    return f"## The block cache by itself\n\n`scripts/bench cache`: without mount and network, {kept['date']}.\n\n{figures}"


def _commands(results: Mapping[str, Any]) -> str:
    lines = "\n".join(f"{name:18} {command}" for name, command in results["commands"].items())
    return f"## Command lines\n\n```text\n{lines}\n```\n"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    out = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    out += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(out) + "\n"


# --- the picture ------------------------------------------------------------------------------------------------------

_PICTURED = (
    "seq-region",
    "seq-capped",
    "seq-warm-dropped",
    "random-4k-8",
    "small-order-1",
    "small-shuffled-8",
    "find-cold",
)
_BAR_PX, _LINE_PX, _LEFT_PX, _WIDTH_PX = 14, 18, 150, 760
_COLOURS = {"ours": "#0b6e4f", "mount": "#8a9ba8", "download": "#c9b458", "plain": "#d0d0d0"}


def picture(results: Mapping[str, Any]) -> str:
    """An SVG of horizontal bars, one group per workload that has a rate; longer is better."""
    body: list[str] = []
    y = 10
    for workload in WORKLOADS:
        entry = results["workloads"].get(workload.name)
        if workload.name not in _PICTURED or entry is None:
            continue
        bars = [(name, value) for name, runs in entry["trials"].items() if (value := median(runs, workload.metric))]
        if not bars:
            continue
        unit = UNITS[workload.metric][0]
        body.append(f'<text x="0" y="{y + 12}" font-weight="bold">{escape(workload.title)} ({unit})</text>')
        y += _LINE_PX + 4
        longest = max(value for _, value in bars)
        for name, value in sorted(bars, key=lambda pair: -pair[1]):
            body.append(_bar(name, value, longest, y))
            y += _LINE_PX
        y += 14
    style = "font-family:sans-serif;font-size:12px"
    inside = "\n".join(body)
    size = f'width="{_WIDTH_PX}" height="{y}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style};background:#fff">\n{inside}\n</svg>\n'


def _bar(name: str, value: float, longest: float, y: int) -> str:
    colour = _COLOURS["ours" if name == OURS else "plain" if name == PLAIN else _KINDS.get(name, "mount")]
    width = max(1.0, value / longest * (_WIDTH_PX - _LEFT_PX - 70))
    return (
        f'<text x="{_LEFT_PX - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="{_LEFT_PX}" y="{y}" width="{width:.0f}" height="{_BAR_PX}" fill="{colour}"/>'
        f'<text x="{_LEFT_PX + width + 5:.0f}" y="{y + 11}">{_number(value)}</text>'
    )


def write(results: Mapping[str, Any], docs: Path) -> list[Path]:
    """The page, the picture and the numbers behind them; returns what was written."""
    docs.mkdir(exist_ok=True)
    written = [docs / "benchmarks.md", docs / "benchmarks.svg", docs / "benchmarks.json"]
    written[0].write_text(page(results))
    written[1].write_text(picture(results))
    written[2].write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return written
