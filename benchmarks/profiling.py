"""`scripts/bench profile`: where the processor time of a mount goes, by process and by what it does.

perf samples all processors while the reader reads; each sample belongs to a process of the bench (the mount's daemon, its
workers, the store, the reader) and, by its symbol, to one of KINDS. Sums are CPU seconds per GiB, or per 10,000 files or
reads. What no implementation gets around on this kernel (sockets, copies in and out of the kernel, FUSE, the disk) is the *floor*.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.meters import Tree

RATE_HZ: Final = 1999
PROFILED: Final = (
    *("seq-region", "seq-capped", "seq-tls", "files-4", "seq-warm-kept", "seq-warm-dropped"),
    *("random-warm-1", "small-order-1", "find-warm"),
)
BESIDE: Final = ("seq-warm-kept", "find-warm")
"""Those where next to nothing is ours: the local directory is profiled, too, to show what the kernel asks for either."""
PER_UNIT: Final = 10_000
"""Files or reads."""
_UNITS: Final = {
    "mb_s": ("mb_s", 2**30 / 1e6, "GiB"),
    "files_s": ("files_s", PER_UNIT, f"{PER_UNIT:,} files"),
    "elapsed_s": ("reads_s", PER_UNIT, f"{PER_UNIT:,} reads"),
}
"""A workload's metric -> the rate that counts, what of it is one unit, its name."""
_READER: Final = "reader"

KINDS: Final[tuple[tuple[str, str, str], ...]] = (
    # (name, what its symbol looks like, what its object looks like); the first that fits
    (
        "kernel: sockets",
        r"^(__)?(tcp|sk|sock|skb|inet|ip|net|napi|dev|nf|loopback|ipt|__ip|__dev|process_backlog)_?",
        r"\[k",
    ),
    ("kernel: FUSE", r"^(__)?fuse_", r"\[k"),
    (
        "kernel: names",
        r"^(__)?(d_|dput|lookup|link_path|walk|path_|filename|getname|putname)|statx|getattr|getdents|readdir|filldir|permission|lockref",
        r"\[k",
    ),
    (
        "kernel: copies and pages",
        r"copy|memcpy|memset|clear_page|rep_movs|folio|filemap|page|shmem|lru_|xa[rs]_|__alloc|free_|iov_iter|zap_|vma",
        r"\[k",
    ),
    ("kernel: disk", r"^(__)?(blk|bio|submit_bio|virtio|virtqueue|ext4|xfs|jbd2|iomap|dio|nvme|scsi|vp_)", r"\[k"),
    ("kernel: rest", r"", r"\[k"),
    ("TLS", r"", r"lib(ssl|crypto)"),
    ("hashing", r"XXH|xxh", r""),
    ("copies", r"memmove|memcpy|memset", r""),
    ("libcurl", r"", r"curl"),
    ("libfuse", r"", r"fuse"),
    ("Python and extensions", r"", r"python|\.so|cpython|\[vdso"),
    ("other", r"", r""),
)
FLOOR: Final = ("kernel: sockets", "kernel: FUSE", "kernel: names", "kernel: copies and pages", "kernel: disk")

Shares = dict[str, dict[str, float]]
"""Process -> kind -> CPU seconds."""

_SAMPLE = re.compile(r"^\s*(?P<pid>\d+)\s+(?P<symbol>.+?)\s+\((?P<object>.*)\)$")


def kind_of(symbol: str, shared_object: str) -> str:
    """Which of KINDS a sample's innermost frame is."""
    return next(
        name
        for name, symbol_like, object_like in KINDS
        if re.search(symbol_like, symbol) and re.search(object_like, shared_object)
    )


def sums(script: str, roles: Mapping[int, str], older: Container[int]) -> Shares:
    """From `perf script -F pid,ip,sym,dso` without call chains; processes that have no role are left out, those that are not in
    `older` are the reader's."""
    counted: dict[str, Counter[str]] = {}
    for line in script.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        pid = int(match["pid"])
        role = roles.get(pid, None if pid in older else _READER)
        if role is None:
            continue
        symbol = match["symbol"].partition(" ")[2] or match["symbol"]
        counted.setdefault(role, Counter())[kind_of(symbol.partition("+")[0], match["object"])] += 1
    return {role: {kind: count / RATE_HZ for kind, count in kinds.most_common()} for role, kinds in counted.items()}


class Profiler:
    """Samples while `watch` lasts; then `shares` holds the sums. Roles are told by command lines."""

    def __init__(self) -> None:
        self.shares: Shares = {}

    @contextlib.contextmanager
    def watch(self, tree: Tree) -> Iterator[None]:
        """For `trial.run`. Raises RuntimeError where perf cannot sample."""
        with tempfile.TemporaryDirectory() as directory:
            data = os.path.join(directory, "perf.data")
            record = ["perf", "record", "-q", "-a", "-F", str(RATE_HZ), "-e", "cpu-clock", "-o", data]
            with subprocess.Popen([*record, "--", "sleep", "600"], stderr=subprocess.DEVNULL) as perf:
                time.sleep(0.5)  # until it samples; it does not say when
                roles: dict[int, str] = {}
                older = {0, *_pids()}
                try:
                    yield
                    roles = _roles(tree)
                finally:
                    perf.send_signal(signal.SIGINT)
                    perf.wait(60)
            fields = ["perf", "script", "-i", data, "-F", "pid,ip,sym,dso"]
            done = subprocess.run(fields, check=False, capture_output=True, text=True)
            if done.returncode != 0 or not done.stdout:
                raise RuntimeError("perf has no samples: run as root, with linux-perf installed")
            self.shares = sums(done.stdout, roles, older)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _roles(tree: Tree) -> dict[int, str]:
    """What the processes of the mount and of the store are, by process id."""
    roles = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
            if pid in tree.pids():
                roles[pid] = "worker" if "fetch.worker" in command else "daemon"
            elif command.startswith("nginx: worker"):
                roles[pid] = "store"
    return roles


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line of `scripts/bench profile`."""
    parser = argparse.ArgumentParser(prog="scripts/bench profile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work")
    parser.add_argument("--write", action="store_true", help="keep the result, and renew docs/benchmarks.md")
    return parser.parse_args(argv)


def per_unit(shares: Shares, metrics: Mapping[str, float], *, metric: str) -> dict[str, Any]:
    """CPU seconds per GiB, per 10,000 files or per 10,000 reads, by what the workload's `metric` is."""
    rate, per_unit, unit = _UNITS[metric]
    units = metrics[rate] * metrics["elapsed_s"] / per_unit
    return {
        "unit": unit,
        "shares": {role: {kind: s / units for kind, s in kinds.items()} for role, kinds in shares.items()},
    }


def rows(profile: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table: kinds down, processes across; the floor and the sum below."""
    shares: Shares = profile["shares"]
    roles = [role for role in ("daemon", "worker", "store", _READER) if role in shares]
    names = [name for name, _, _ in KINDS if any(name in shares[role] for role in roles)]
    lines = [[name, *(_seconds(shares[role].get(name, 0.0)) for role in roles)] for name in names]
    floor = [sum(shares[role].get(name, 0.0) for name in FLOOR) for role in roles]
    lines.append(["**floor**", *map(_seconds, floor)])
    lines.append(["**sum**", *(_seconds(sum(shares[role].values())) for role in roles)])
    return [f"CPU s per {profile['unit']}", *roles], lines


def busy_and_floor(profile: Mapping[str, Any]) -> tuple[float, float]:
    """CPU seconds per unit of all processes together, and what would be left if the mount's own were the floor."""
    shares: Shares = profile["shares"]
    busy = sum(sum(kinds.values()) for kinds in shares.values())
    above = sum(s for role in ("daemon", "worker") for kind, s in shares.get(role, {}).items() if kind not in FLOOR)
    return busy, busy - above


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.0005 else "-"
