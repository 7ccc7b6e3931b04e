"""Prefetch jobs of one mount, asked for over its control socket: `prefetch`, `prefetch_progress`, `prefetch_cancel`.

A job is named first and begun last: paths come in as many requests as they need (a request is bounded), all of them are looked
up before anything is fetched, and only the request without `more` starts the job. Whoever began a job must go on asking how
far it is: after `SILENCE_S` without a question the job is cancelled, so that a client that was killed leaves nothing running.

All on the trio thread; `_jobs` changes in functions that do not await in between.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import trio

from valohai_fuse import errors
from valohai_fuse.engine.prefetch import Prefetch
from valohai_fuse.model.tree import Inode, Tree
from valohai_fuse.obs.control import Handler

log = logging.getLogger(__name__)

JOBS_MAX: Final = 16
SILENCE_S: Final = 30.0
UNKNOWN_NAMED_MAX: Final = 3
FILES_PER_BREATH: Final = 1000


@dataclass(slots=True)
class _Job:
    kept: trio.CancelScope
    """Cancelled by its deadline, which each question moves on."""
    wanted: bytearray
    """By inode: 1 where it is to be fetched already."""
    inodes: array[int] = field(default_factory=lambda: array("I"))
    bytes: int = 0
    """Of those whose size is known."""
    prefetch: Prefetch | None = None
    """Set when the job begins."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    finished: bool = False
    error: str = ""


class Warming:
    """The jobs; `make` gives a fresh Prefetch for each. More than `bytes_max` is not begun: its beginning would be evicted
    before its end has come."""

    def __init__(
        self, nursery: trio.Nursery, tree: Tree, mountpoint: str, make: Callable[[], Prefetch], *, bytes_max: int
    ) -> None:
        self._nursery = nursery
        self._tree = tree
        self._mountpoint = mountpoint
        self._make = make
        self._bytes_max = bytes_max
        self._jobs: dict[str, _Job] = {}

    @property
    def handlers(self) -> dict[str, Handler]:
        """For the control socket."""
        return {
            "prefetch": self._on_prefetch,
            "prefetch_progress": self._on_progress,
            "prefetch_cancel": self._on_cancel,
        }

    async def _on_prefetch(self, request: dict[str, Any]) -> dict[str, Any]:
        """`job` (a name that the client makes up), `paths` relative to the mount point, `more`: the job is not to begin yet.

        Raises UsageError for names that are not there, and for more than the cache holds.
        """
        name = str(request.get("job", ""))
        job = self._jobs.get(name)
        if job is None:
            if not name or len(self._jobs) >= JOBS_MAX:
                raise errors.UsageError(f"{len(self._jobs)} prefetches are under way already" if name else "no job")
            job = self._jobs[name] = _Job(trio.CancelScope(), bytearray(self._tree.inode_count + 1))
            self._nursery.start_soon(self._carry_out, name, job)
        if job.prefetch is not None:
            raise errors.UsageError("this job has begun already")
        job.kept.deadline = trio.current_time() + SILENCE_S
        try:
            await self._add(job, [str(path) for path in request.get("paths", [])])
        except errors.UsageError:
            job.scope.cancel()
            raise
        if not request.get("more"):
            self._check_fits(job)
            job.prefetch = self._make()
            self._nursery.start_soon(self._fetch, job)
        return {"files": len(job.inodes)}

    async def _add(self, job: _Job, paths: list[str]) -> None:
        found = [(path, self._tree.find(path.strip("/"))) for path in paths]
        unknown = [path for path, inode in found if inode is None]
        if unknown:
            named = ", ".join(unknown[:UNKNOWN_NAMED_MAX])
            others = f" and {len(unknown) - UNKNOWN_NAMED_MAX} more" if len(unknown) > UNKNOWN_NAMED_MAX else ""
            raise errors.UsageError(f"no such file or directory in {self._mountpoint}: {named}{others}")
        for _path, inode in found:
            if inode is None:
                continue
            files = self._tree.walk_files(inode) if self._tree.is_dir(inode) else iter([inode])
            for position, file in enumerate(files):
                if not job.wanted[file]:
                    job.wanted[file] = 1
                    job.inodes.append(file)
                    job.bytes += self._tree.size(file) or 0
                if position % FILES_PER_BREATH == FILES_PER_BREATH - 1:
                    await trio.lowlevel.checkpoint()

    def _check_fits(self, job: _Job) -> None:
        if job.bytes > self._bytes_max:
            job.scope.cancel()
            raise errors.UsageError(
                f"{job.bytes:,} bytes are to be fetched, the cache of {self._mountpoint} holds {self._bytes_max:,} at the most",
                hint="name less, or mount with a larger --cache-max-size or --cache-dir",
            )

    async def _on_progress(self, request: dict[str, Any]) -> dict[str, Any]:
        """How far `job` is; `finished` once nothing of it is under way. Raises UsageError for a job that is not known."""
        job = self._known(request)
        progress = asdict(job.prefetch.progress()) if job.prefetch is not None else {}
        return {**progress, "finished": job.finished, "error": job.error}

    async def _on_cancel(self, request: dict[str, Any]) -> dict[str, Any]:
        """Stops `job`; what has landed stays. It answers at once: the end shows in its progress."""
        self._known(request).scope.cancel()
        return {}

    def _known(self, request: dict[str, Any]) -> _Job:
        job = self._jobs.get(str(request.get("job", "")))
        if job is None:
            raise errors.UsageError("no such prefetch, or nobody asked for it in time")
        job.kept.deadline = trio.current_time() + SILENCE_S
        return job

    async def _carry_out(self, name: str, job: _Job) -> None:
        """Keeps the job until nobody asks for it any more."""
        try:
            with job.kept:
                await trio.sleep_forever()
        finally:
            job.scope.cancel()
            del self._jobs[name]

    async def _fetch(self, job: _Job) -> None:
        assert job.prefetch is not None, "set by whoever starts this"
        try:
            with job.scope:
                await job.prefetch.run(map(Inode, job.inodes))
        except Exception as bug:  # this edge absorbs bugs: one failed prefetch, not a dead mount
            log.exception("a prefetch failed for an unforeseen reason")
            job.error = f"internal: {type(bug).__name__}"
        finally:
            job.finished = True
