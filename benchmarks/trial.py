"""One peer on one workload, once: start, bring into the state asked for, read, count, take away.

The clock runs in the reader, around its reads only; a download's clock also holds the download. Counters are read again
after the store has gone quiet, so what a peer fetches behind the reader's back is on its bill.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import meters, peers
from benchmarks.dataset import DataFile
from benchmarks.meters import AccessLog, PeakMemory, Traffic, Tree, percentile
from benchmarks.peers import Peer, PeerFailedError, Place
from benchmarks.provision import Tools
from benchmarks.store import Store
from benchmarks.workloads import DROPPED, KEPT, NAMES_ONLY, NEEDS_PYARROW, Selection, Workload

Metrics = dict[str, float]

_READER = Path(__file__).with_name("reader.py")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all trials share."""

    tools: Tools
    store: Store
    selection: Selection
    inputs: dict[str, tuple[DataFile, ...]]
    work: Path
    quick: bool = False


def applies(workload: Workload, peer: Peer) -> bool:
    """Whether this peer can and should run this workload."""
    pattern = workload.task["pattern"]
    if pattern == "mount":
        return peer.name == peers.OURS
    if peer.only is not None and not peer.only.search(workload.name):
        return False
    if peer.kind == "download":
        return workload.downloads
    if peer.kind == "plain":
        return workload.state != "cold" or pattern in NAMES_ONLY
    return workload.state != DROPPED or os.geteuid() == 0


Watch = Callable[[Tree], AbstractContextManager[object]]
"""Entered around the reads whose figures count."""


def run(bench: Bench, workload: Workload, peer: Peer, *, watch: Watch = contextlib.nullcontext) -> Metrics:
    """One trial. Raises PeerFailedError; nothing of it is left behind either way."""
    root = bench.work / "trial"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    try:
        if workload.task["pattern"] == "mount":
            return _mount_trial(bench, workload, root)
        place = Place(
            tools=bench.tools,
            store=bench.store,
            profile=workload.profile,
            input_name=workload.input_name,
            files=bench.inputs[workload.input_name],
            root=root,
            threads=workload.task["threads"],
        )
        bench.store.warm(workload.files(bench.selection))
        meters.wait_disks_quiet()
        if peer.kind == "download":
            return _download_trial(bench, workload, peer, place)
        if peer.kind == "plain":
            return _read_trial(bench, workload, bench.store.data, Tree([]), watch)
        with peers.running(peer, place) as tree:
            return _read_trial(bench, workload, place.inputs_dir, tree, watch)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run_target(bench: Bench, workload: Workload, target: Path) -> Metrics:
    """The same reads on a directory that is there already; only the reader's side can be measured."""
    if workload.state != KEPT and os.geteuid() == 0:
        meters.drop_page_cache()
    return _read_trial(bench, workload, target, Tree([]))


def task_for(bench: Bench, workload: Workload, base: Path) -> dict[str, Any]:
    """The reader's task, with paths below `base`."""
    task = dict(workload.task)
    selection = bench.selection
    if task["pattern"] in NEEDS_PYARROW:
        task["python"] = str(bench.tools.peers_python or sys.executable)
    if task["pattern"] in NAMES_ONLY:
        task["files"] = [[str(base / selection.names_path), selection.name_count, None]]
        return task
    files = [[str(base / f.path), f.size, f.phase] for f in workload.files(selection)]
    if task.pop("shuffle", False):
        random.Random(7).shuffle(files)
    if task["count"] == -1:
        task["count"] = selection.reads
    if task["pattern"] == "first" and not task.get("primed"):
        files = files[:1]
    task["files"] = files
    return task


def _read(task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [task.get("python", sys.executable), "-I", str(_READER)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerFailedError(f"the reader was not done within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise PeerFailedError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _read_trial(
    bench: Bench, workload: Workload, base: Path, tree: Tree, watch: Watch = contextlib.nullcontext
) -> Metrics:
    task = task_for(bench, workload, base)
    if workload.listed:
        for path, size, _ in task["files"]:
            if os.stat(path).st_size != size:
                raise PeerFailedError(f"{Path(path).name}: size {os.stat(path).st_size} instead of {size}")
    if workload.state in {KEPT, DROPPED}:
        _read(task, workload.timeout_s)
    if workload.state == KEPT:
        # The kernel moves a page to its active list when it is read the second time, once and for a quarter of that reading's
        # time; the plain file's pages have been there since the store served them.
        _read(task, workload.timeout_s)
    bench.store.wait_quiet()
    if workload.state == DROPPED:
        meters.wait_disks_quiet()
        meters.drop_page_cache()
        bench.store.warm(workload.files(bench.selection) if tree.roots else ())
    log, cpu_before_s = AccessLog(bench.store.log_path), tree.cpu_s()
    with PeakMemory(tree) as memory, watch(tree):
        answer = _read(task, workload.timeout_s)
        bench.store.wait_quiet()
    cpu_s = tree.cpu_s() - cpu_before_s
    return metrics_of(answer, log.traffic(), cpu_s=cpu_s, peak_bytes=memory.peak_bytes)


def _download_trial(bench: Bench, workload: Workload, peer: Peer, place: Place) -> Metrics:
    log = AccessLog(bench.store.log_path)
    began_s, process = peers.download(peer, place, timeout_s=workload.timeout_s)
    try:
        with PeakMemory(Tree([process.pid])) as memory:
            _, status, usage = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - began_s
    finally:
        process.returncode = 0  # reaped above, with its resource usage
    if status != 0:
        raise PeerFailedError(
            f"status {os.waitstatus_to_exitcode(status)}: {peers.last_words(place.root / 'peer.log')}"
        )
    answer = _read(task_for(bench, workload, place.inputs_dir), workload.timeout_s)
    answer["elapsed_s"] += elapsed_s
    answer["latencies_s"] = []  # of local files: not the peer's
    return metrics_of(
        answer,
        log.traffic(),
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=max(memory.peak_bytes, usage.ru_maxrss * 1024),
    )


def metrics_of(answer: dict[str, Any], traffic: Traffic, *, cpu_s: float, peak_bytes: int) -> Metrics:
    """Everything that one trial says, by metric name (see `workloads.UNITS`)."""
    elapsed_s, read_bytes = answer["elapsed_s"], answer["bytes"]
    latencies_s: Sequence[float] = answer["latencies_s"]
    found: Metrics = {
        "elapsed_s": elapsed_s,
        "files_s": answer["files"] / elapsed_s,
        "cpu_s": cpu_s,
        "reader_cpu_s": answer["cpu_s"],
        "pss_mib": peak_bytes / 2**20,
        "requests": traffic.requests,
        "connections": traffic.connections,
        "refused": traffic.refused,
        "fetched_kib": traffic.body_bytes / 1024,
    }
    if read_bytes:
        found["mb_s"] = read_bytes / 1e6 / elapsed_s
        found["cpu_s_gib"] = cpu_s / (read_bytes / 2**30)
        found["amplification"] = traffic.body_bytes / read_bytes
    if latencies_s:
        found["reads_s"] = len(latencies_s) / elapsed_s
        found["fetched_per_read_kib"] = traffic.body_bytes / 1024 / len(latencies_s)
        for share, name in ((0.5, "p50_ms"), (0.9, "p90_ms"), (0.99, "p99_ms"), (1.0, "max_ms")):
            found[name] = percentile(latencies_s, share) * 1000
    return found


# --- mounting many files ----------------------------------------------------------------------------------------------


def _mount_trial(bench: Bench, workload: Workload, root: Path) -> Metrics:
    """Time until `mount` has answered, memory that the files cost, and CPU while nothing happens."""
    count = workload.task["files"] // (100 if bench.quick else 1)
    few = _mounted(bench, workload, root / "few", 1, idle_s=0)
    many = _mounted(bench, workload, root / "many", count, idle_s=1 if bench.quick else workload.task["idle_s"])
    many["bytes_per_file"] = (many["pss_mib"] - few["pss_mib"]) * 2**20 / count
    return many


def _mounted(bench: Bench, workload: Workload, root: Path, count: int, *, idle_s: float) -> Metrics:
    root.mkdir()
    files = tuple(DataFile("names", f"part-{i // 1000:03}/{i:06}.bin", 100 * 1024, None) for i in range(count))
    place = Place(bench.tools, bench.store, workload.profile, "names", files, root)
    place.mountpoint.mkdir(parents=True)
    command = peers.valohai_fuse(place)
    _pad_urls(root / "config" / "inputs.json")
    began_s = time.perf_counter()
    with (root / "peer.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        peers.wait_mounted(place.mountpoint, process, root / "peer.log")
        ready_s = time.perf_counter() - began_s
        tree = Tree([process.pid])
        # What a start leaves behind is over: a parser's memory going back, and the first worker's start, a third of a second.
        time.sleep(1)
        before_s = tree.run_s()
        time.sleep(idle_s)  # the idle time itself is what is measured
        return {
            "ready_s": ready_s,
            "idle_cpu_s": tree.run_s() - before_s,
            "pss_mib": tree.pss_bytes() / 2**20,
            "files": count,
            "json_mb": (root / "config" / "inputs.json").stat().st_size / 1e6,
        }
    finally:
        peers.stop(process, place.mountpoint)


def _pad_urls(path: Path) -> None:
    """nginx's signatures are short; those of S3 with temporary credentials make about 700 bytes a file."""
    document = json.loads(path.read_text())
    for entry in document.values():
        for file in entry["files"]:
            lacking = 700 - len(json.dumps(file))
            file["storage_uri"] += "&X-Amz-Security-Token=" + "A" * max(0, lacking - 24)
    path.write_text(json.dumps(document))
