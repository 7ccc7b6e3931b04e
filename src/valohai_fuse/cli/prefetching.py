"""`valohai-fuse prefetch`: has the daemons of the mounts fetch whole files into the cache, and shows how far they are.

The work is the daemons' (`warming`); we name the files, ask, and show. Ctrl-C and SIGTERM ask them to stop and wait until they
have; a daemon stops by itself when we are killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

import click

from valohai_fuse.cli import mounted_paths, progress
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import MountFailedError, UsageError
from valohai_fuse.obs.control_client import NoAnswerError, ask
from valohai_fuse.obs.runtime_dir import MountRecord, RuntimeDir
from valohai_fuse.settings import Settings

POLL_S: Final = 0.2
STOP_S: Final = 10.0
"""For a daemon to stop after an interruption."""
REQUEST_BYTES: Final = 256 * 1024
"""Paths in one request; as JSON it may take six times that at the worst. The socket takes 1 MiB."""
_ANSWER_S: Final = 130.0


@dataclass(slots=True)
class _Job:
    """What one mount is to fetch."""

    record: MountRecord
    name: str
    paths: list[str] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)
    """The latest."""

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        try:
            return ask(self.record.control_path, op, timeout_s=_ANSWER_S, job=self.name, **fields)
        except NoAnswerError as error:
            hint = f"valohai-fuse status; its log: {self.record.log_path}" if self.record.log_path else None
            raise MountFailedError(f"{self.record.mountpoint}: {error.message}", hint=hint) from None

    @property
    def failures(self) -> list[tuple[str, str]]:
        base = self.record.mountpoint
        return [(os.path.join(base, path), why) for path, why in self.answer.get("failures", [])]


@verb(
    "prefetch",
    example="valohai-fuse prefetch /valohai/inputs/train/images",
    help="Fetch each PATH below a mount, files or whole directories, into the cache, and wait until it is there.\n\n"
    "Readers that come meanwhile go first. Ctrl-C stops it; what has landed stays. "
    "Exit code: 0 all there, 1 a file failed, 2 no such path (then nothing is fetched), 130 interrupted.",
)
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--from-file", metavar="LIST", help="Also the paths in this file, one a line; - reads them from stdin.")
@click.option("--json", "for_programs", is_flag=True, help="For programs: a summary at the end.")
def prefetch(settings: Settings, paths: tuple[str, ...], from_file: str | None, for_programs: bool) -> int:
    """Fetches; the exit code as the help says."""
    jobs = _jobs(RuntimeDir(settings.runtime_dir).records(), [*paths, *(_listed(from_file) if from_file else ())])
    interrupted = False
    with progress.Shown("prefetch") as shown, _terminated_like_ctrl_c():
        try:
            _begin(jobs)
            while not _poll(jobs, shown):
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            interrupted = True
            _stop(jobs, shown)
        except BaseException:
            _stop(jobs, shown)
            raise
    totals = _totals(jobs)
    failures = [failure for job in jobs for failure in job.failures]
    for job in jobs:
        if job.answer.get("error"):
            raise MountFailedError(f"{job.record.mountpoint}: the prefetch ended: {job.answer['error']}")
    return progress.conclude(
        "prefetch",
        totals,
        failures,
        elapsed_s=shown.elapsed_s,
        interrupted=interrupted,
        for_programs=for_programs,
    )


def _listed(path: str) -> list[str]:
    """The lines of a file as paths; names may hold anything but a line's end. Raises UsageError."""
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
            return [os.fsdecode(line) for line in file.read().split(b"\n") if line]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _jobs(records: Sequence[MountRecord], paths: Sequence[str]) -> list[_Job]:
    """One for each mount that holds some of the paths. Raises UsageError for a path that no mount holds."""
    if not paths:
        raise UsageError("nothing to fetch", hint="name files or directories, or a list of them with --from-file")
    jobs: dict[str, _Job] = {}
    for path in paths:
        found = mounted_paths.find(records, path)
        if found is None:
            raise mounted_paths.not_ours(path)
        record, inside = found
        job = jobs.setdefault(record.id, _Job(record, f"{os.getpid()}-{time.monotonic_ns()}"))
        job.paths.append(inside)
    return list(jobs.values())


def _begin(jobs: Sequence[_Job]) -> None:
    """Names everything to every daemon before the first one begins. Raises what a daemon says against it."""
    last: list[tuple[_Job, list[str]]] = []
    for job in jobs:
        *first, rest = _portions(job.paths)
        for portion in first:
            job.ask("prefetch", paths=portion, more=True)
        if len(jobs) > 1:
            job.ask("prefetch", paths=rest, more=True)
            rest = []
        last.append((job, rest))
    for job, rest in last:
        job.ask("prefetch", paths=rest)


def _portions(paths: Sequence[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    length = 0
    for path in paths:
        if length > REQUEST_BYTES - len(path) * 2:
            yield portion
            portion, length = [], 0
        portion.append(path)
        length += len(path) + 4
    yield portion


def _poll(jobs: Sequence[_Job], shown: progress.Shown) -> bool:
    """Asks everyone; whether all are done."""
    for job in jobs:
        if not job.answer.get("finished"):
            job.answer = job.ask("prefetch_progress")
    shown.update(_totals(jobs))
    return all(job.answer["finished"] for job in jobs)


def _totals(jobs: Sequence[_Job]) -> progress.Totals:
    totals = progress.Totals()
    for job in jobs:
        totals.add(job.answer)
    return totals


def _stop(jobs: Sequence[_Job], shown: progress.Shown) -> None:
    """Cancels what goes on, and waits a while for the daemons to say that it has ended."""
    deadline_s = time.monotonic() + STOP_S
    going = [job for job in jobs if not job.answer.get("finished")]
    for job in going:
        with contextlib.suppress(MountFailedError, UsageError):
            job.ask("prefetch_cancel")
    with contextlib.suppress(MountFailedError, UsageError, KeyboardInterrupt):
        while not _poll(going, shown) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
