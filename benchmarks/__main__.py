"""`scripts/bench`: sets up what is missing, runs peers interleaved on workloads, prints tables, with --write renews docs/.

Results are kept in the work directory after every round, so an interrupted run loses one round, and `--write` renders all
that is kept: {"machine", "versions", "commands", "profiles", "cache",
"workloads": {name: {"date", "dates": {peer: date}, "trials": {peer: [metrics]}}}}.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import fcntl
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import cache, found, profiling, provision, report, trial
from benchmarks.dataset import FULL, QUICK, Dataset
from benchmarks.peers import OURS, PEERS, PLAIN, Peer, PeerFailedError, Place
from benchmarks.say import say
from benchmarks.store import REGION, Store
from benchmarks.trial import Bench
from benchmarks.workloads import NEEDS_PYARROW, WORKLOADS, Selection, Workload, select

_QUICK_PEERS = ("valohai-fuse", "rclone", "curl", "plain")
_WORK_DIR = Path("/var/tmp/valohai-fuse-bench")  # noqa: S108 - on a disk, shared by all checkouts; holds nothing secret
_KEPT = "results.json"
_DOCS_DIR = Path(__file__).parents[1] / "docs"
_PEER_BUDGET_S = 240
"""A peer that has spent this on one workload is not asked again: some need minutes for 2,000 reads. Ours has no budget."""
_READS, _QUICK_READS = 2000, 64


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: scripts/bench --only seq-region,random-4k-1 --peers valohai-fuse,rclone --runs 3",
    )
    parser.add_argument(
        "--only", metavar="WORKLOAD,...", help="those whose names begin with one of these; `list` lists"
    )
    parser.add_argument("--peers", metavar="PEER,...", help="default: all that are installed")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds per workload (default 5, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few peers: does it work, not how fast is it")
    parser.add_argument(
        "--target", type=Path, metavar="DIR", help="read what is below DIR instead: any mount, any disk"
    )
    parser.add_argument(
        "--write", action="store_true", help="renew docs/benchmarks.md, .svg and .json from all results kept"
    )
    parser.add_argument("--work-dir", type=Path, default=_WORK_DIR, metavar="DIR")
    parser.add_argument("--docs-dir", type=Path, default=_DOCS_DIR, metavar="DIR")
    return parser.parse_args(argv)


def _chosen_workloads(only: str | None) -> list[Workload]:
    if only is None:
        return list(WORKLOADS)
    wanted = tuple(only.split(","))
    chosen = [w for w in WORKLOADS if w.name.startswith(wanted)]
    if not chosen:
        raise SystemExit(f"error: no such workload: {only}\nhint: {', '.join(w.name for w in WORKLOADS)}")
    return chosen


def _chosen_peers(arguments: argparse.Namespace, tools: provision.Tools) -> list[Peer]:
    names = arguments.peers.split(",") if arguments.peers else list(_QUICK_PEERS) if arguments.quick else None
    unknown = set(names or ()) - {peer.name for peer in PEERS}
    if unknown:
        raise SystemExit(f"error: no such peer: {', '.join(sorted(unknown))}\nhint: {', '.join(p.name for p in PEERS)}")
    chosen = [peer for peer in PEERS if names is None or peer.name in names]
    for peer in chosen:
        if not tools.has(peer.needs):
            say(f"{peer.name} is left out: no {peer.needs} here")
    return [peer for peer in chosen if tools.has(peer.needs)]


def _measure(bench: Bench, workload: Workload, chosen: list[Peer], runs: int) -> report.Trials:
    """Round after round, one trial of each peer, each round beginning with another one, for what a trial leaves to the disk is the
    next one's burden. A peer that failed twice in a row, is over its budget or far behind is not asked again."""
    spent_s = dict.fromkeys((peer.name for peer in chosen), 0.0)
    trials: report.Trials = {peer.name: [] for peer in chosen if trial.applies(workload, peer)}
    for number in range(runs):
        first = number % len(chosen)
        for peer in chosen[first:] + chosen[:first]:
            done = trials.get(peer.name)
            if done is None or [set(t) for t in done[-2:]] == [{"error"}, {"error"}]:
                continue
            if peer.name != OURS and (spent_s[peer.name] > _PEER_BUDGET_S or report.is_far_behind(trials, peer.name)):
                continue
            began_s = time.monotonic()
            try:
                metrics: dict[str, Any] = dict(trial.run(bench, workload, peer))
                said = f"{metrics.get(workload.metric, 0):.4g} {workload.metric}"
            except (PeerFailedError, OSError) as error:
                metrics = {"error": str(error)}
                said = f"failed: {error}"
            done.append(metrics)
            took_s = time.monotonic() - began_s
            spent_s[peer.name] += took_s
            say(f"{workload.name} {number + 1}/{runs} {peer.name}: {said} ({took_s:.1f} s)")
    return trials


def _commands(bench: Bench, chosen: list[Peer]) -> dict[str, str]:
    """Each peer's command line as it was run, with short names for what differs from machine to machine."""
    shown = {}
    for peer in chosen:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            place = Place(bench.tools, bench.store, REGION, "big", bench.selection.big, root)
            place.mountpoint.mkdir(parents=True)
            text = " ".join(peer.command(place))
            here = str(Path(__file__).parent)
            peers_bin = str(bench.tools.peers_python.parent) + "/" if bench.tools.peers_python else "/"
            for long, short in ((name, "RUN"), (sys.executable, "python"), (peers_bin, ""), (here, "benchmarks")):
                text = text.replace(long, short)
            shown[peer.name] = text
    return {name: text for name, text in shown.items() if text}


def _run_target(
    arguments: argparse.Namespace, bench_work: Path, chosen: list[Workload], peers_python: Path | None
) -> int:
    """Measures a directory as it stands. Prints, keeps nothing."""
    target = arguments.target.resolve()
    selection = found.below(target, reads=_QUICK_READS if arguments.quick else _READS)
    with Store(bench_work / "nginx", target) as store:
        tools = provision.Tools(None, peers_python)
        bench = Bench(tools, store, selection, {}, bench_work, arguments.quick)
        for workload in chosen:
            if workload.task["pattern"] == "mount" or not found.suits(workload, selection):
                continue
            if workload.task["pattern"] in NEEDS_PYARROW and peers_python is None:
                continue
            if workload.profile is not found.representative(workload):
                continue
            done = [trial.run_target(bench, workload, target) for _ in range(arguments.runs)]
            shown = replace(workload, title=found.title(workload, selection))
            sys.stdout.write(report.text_of(shown, {str(target): [dict(m) for m in done]}) + "\n\n")
    return 0


@contextlib.contextmanager
def _alone(work_dir: Path) -> Iterator[None]:
    """Two benches at once would measure each other, and write over each other's results."""
    with (work_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(argv: list[str]) -> int:
    """Returns 1 when a trial of ours failed, so that a quick run is a test. `cache` and `profile` are benches of their own."""
    if argv[:1] == ["cache"]:
        kept_path = _WORK_DIR / "full" / _KEPT
        kept_path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(_WORK_DIR):
            return cache.main(argv[1:], kept_path)
    if argv[:1] == ["profile"]:
        return _profile(profiling.arguments(argv[1:]))
    arguments = _arguments(argv)
    arguments.runs = arguments.runs or (1 if arguments.quick else 5)
    if arguments.quick and arguments.write and arguments.docs_dir == _DOCS_DIR:
        raise SystemExit("error: --quick measures nothing worth documenting\nhint: add --docs-dir DIR to see the page")
    if arguments.only == "list":
        sys.stdout.write("".join(f"{w.name:18} {w.title}\n" for w in WORKLOADS))
        return 0
    workloads = _chosen_workloads(arguments.only)
    work = arguments.work_dir / ("quick" if arguments.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    provision.spread(work)
    with _alone(arguments.work_dir):
        tools = provision.provision(arguments.work_dir)
        if arguments.target:
            return _run_target(arguments, work, workloads, tools.peers_python)
        return _run_peers(arguments, work, tools, workloads)


def _profile(arguments: argparse.Namespace) -> int:
    """One profiled trial of ours on each of `profiling.PROFILED`, and of the local directory on some."""
    work = _WORK_DIR / ("quick" if arguments.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    by_name = {peer.name: peer for peer in PEERS}
    provision.spread(work)
    with _alone(_WORK_DIR):
        tools = provision.provision(_WORK_DIR, extra=("perf",))
        dataset = Dataset(work / "data", QUICK if arguments.quick else FULL, tools.peers_python)
        dataset.make()
        selection = select(dataset, _QUICK_READS if arguments.quick else _READS)
        kept_path = work / _KEPT
        results: dict[str, Any] = json.loads(kept_path.read_text()) if kept_path.exists() else {"workloads": {}}
        with Store(work / "nginx", dataset.root) as store:
            bench = Bench(tools, store, selection, dataset.inputs(), work, arguments.quick)
            for workload in [w for w in WORKLOADS if w.name in profiling.PROFILED]:
                for peer in (OURS, *([PLAIN] if workload.name in profiling.BESIDE else [])):
                    profiler = profiling.Profiler()
                    metrics = trial.run(bench, workload, by_name[peer], watch=profiler.watch)
                    profile = profiling.per_unit(profiler.shares, metrics, metric=workload.metric)
                    profile["date"] = dt.datetime.now(dt.UTC).date().isoformat()
                    results.setdefault("profiles", {}).setdefault(workload.name, {})[peer] = profile
                    header, lines = profiling.rows(profile)
                    sys.stdout.write(f"== {workload.name}, {peer}\n{report.table(header, lines)}\n\n")
        if arguments.write:
            kept_path.write_text(json.dumps(results))
            for path in report.write(results, _DOCS_DIR):
                say(f"wrote {path}")
    return 0


def _run_peers(arguments: argparse.Namespace, work: Path, tools: provision.Tools, workloads: list[Workload]) -> int:
    chosen = _chosen_peers(arguments, tools)
    if not arguments.quick:
        say("touching the memory of this machine")
        provision.settle_memory()
    say("making the data set")
    dataset = Dataset(work / "data", QUICK if arguments.quick else FULL, tools.peers_python)
    dataset.make()
    selection: Selection = select(dataset, _QUICK_READS if arguments.quick else _READS)
    kept_path = work / _KEPT
    results: dict[str, Any] = json.loads(kept_path.read_text()) if kept_path.exists() else {"workloads": {}}
    failed = False
    with Store(work / "nginx", dataset.root) as store:
        bench = Bench(tools, store, selection, dataset.inputs(), work, arguments.quick)
        commands = results.get("commands", {}) | _commands(bench, chosen)
        results |= {"machine": provision.machine(), "versions": provision.versions(tools), "commands": commands}
        for workload in workloads:
            if workload.task["pattern"] in NEEDS_PYARROW and not selection.table:
                say(f"{workload.name} is left out: no pyarrow here")
                continue
            trials = _measure(bench, workload, chosen, arguments.runs)
            if not trials:
                continue
            failed |= any("error" in t for t in trials.get(OURS, []))
            kept = results["workloads"].setdefault(workload.name, {"trials": {}})
            today = dt.datetime.now(dt.UTC).date().isoformat()
            before = dict.fromkeys(kept["trials"], kept.get("date")) | kept.get("dates", {})
            kept |= {"date": today, "dates": before | dict.fromkeys(trials, today), "trials": kept["trials"] | trials}
            kept_path.write_text(json.dumps(results))
            sys.stdout.write(report.text_of(workload, trials) + "\n\n")
            sys.stdout.flush()
    if arguments.write:
        for path in report.write(results, arguments.docs_dir):
            say(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
