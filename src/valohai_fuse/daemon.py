"""The composition root: one process that serves one mount. `python -m valohai_fuse.daemon SPEC_FD REPORT_FD` (`handshake`).

Start: spec -> manifest -> tree -> store -> nursery(engine) -> FUSE session -> one answered `stat` -> control socket -> report.
End (SIGTERM, SIGINT, an `unmount` over the control socket, or somebody's umount): unmount while reads go on being answered,
then cancel what is left, then close. Everything that was built is closed in reverse, whatever happened.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import trio

from valohai_fuse import errors
from valohai_fuse.allocator import keep_freed_memory
from valohai_fuse.assembly import Fetching, open_fetching, open_workers
from valohai_fuse.descriptors import expand_descriptor_table
from valohai_fuse.engine.fill import FillLimits
from valohai_fuse.engine.prefetch import InCache
from valohai_fuse.engine.siblings import SiblingAhead
from valohai_fuse.fetch.pool import BEHIND_BYTES
from valohai_fuse.handshake import MountSpec, Report, failed
from valohai_fuse.inspection import Catalogue, Facts, Inspection
from valohai_fuse.model.eviction import Budget
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.model.manifest import Manifest
from valohai_fuse.model.tree import Tree, build
from valohai_fuse.mount import kernel
from valohai_fuse.mount.operations import Operations, Ownership
from valohai_fuse.mount.session import Session
from valohai_fuse.obs import control, logs
from valohai_fuse.obs.metrics import Counts
from valohai_fuse.obs.watchdog import Watchdog, block_signal
from valohai_fuse.occupancy import Occupancy
from valohai_fuse.ports import Priority
from valohai_fuse.settings import Settings, parse_bytes
from valohai_fuse.sources import api_file, manifest_file
from valohai_fuse.sources.local_files import LocalFiles
from valohai_fuse.store import directory
from valohai_fuse.store.calls import DiskCalls
from valohai_fuse.store.evictor import Evictor
from valohai_fuse.store.room import Room
from valohai_fuse.store.segments import MEMORY_BYTES_MAX, SegmentStore
from valohai_fuse.warming import Warming

log = logging.getLogger(__name__)

WARNINGS_REPORTED_MAX = 20

STAGED_BEHIND_BYTES = BEHIND_BYTES + 3 * (SEGMENT_BYTES + 64 * 1024)
"""Room for what is written to the disk, or being read, beside what is fetched ahead. With half of that a
slow disk had so much of it waiting that the stream found no memory to land in, and ran at the disk's pace; without the three
segments, what had been fetched ahead and not read yet had to go for what came behind it, and was fetched again."""


FILL_SHARE_OF_CACHE = 4
"""A file is completed behind a reader only as far as most of the cache still belongs to what was read."""


class Daemon:
    """One mount, built from its spec."""

    def __init__(self, spec: MountSpec) -> None:
        self.spec = spec
        self.settings = Settings(**spec.settings)
        self.metrics = Counts()
        self._ending = trio.Event()
        self._lazily = False

    async def run(self, report: ReportPipe) -> None:
        """Mounts, reports, serves until it is told to end or the mount is gone."""
        settings, spec = self.settings, self.spec
        async with AsyncExitStack() as stack:
            disk = DiskCalls(may_hang=directory.may_hang(settings.cache_dir))
            pool = await open_workers(settings, self.metrics, stack, disk_may_hang=disk.may_hang)
            if spec.starts_worker or disk.may_hang:
                # Beside all that follows, which takes as long; and on a disk that may hang before there is a file open on it,
                # which a new process would have to close first.
                pool.prewarm()
            catalogue, local = self._read_manifest(stack)
            budget = _budget(settings)
            room = Room(settings.cache_dir, budget, disk=disk)
            memory_bytes_max = max(MEMORY_BYTES_MAX, settings.readahead_total + STAGED_BEHIND_BYTES)
            store = SegmentStore(settings.cache_dir, room=room, disk=disk, memory_bytes_max=memory_bytes_max)
            stack.callback(store.close)
            fill = FillLimits(
                min(settings.background_fill, _cache_bytes_max(settings, budget) // FILL_SHARE_OF_CACHE),
                settings.connections,
                is_kept=lambda: store.statistics().disk_well,
            )
            fetching, nursery = await open_fetching(settings, catalogue, store, pool, self.metrics, stack, fill=fill)
            evictor = Evictor(
                settings.cache_dir, budget, room=room, touch_used=store.touch_used, in_use=store.being_read
            )
            nursery.start_soon(evictor.run)
            self.warming = Warming(
                nursery,
                self.tree,
                spec.mountpoint,
                lambda: fetching.prefetch(InCache(), Priority.AHEAD),
                bytes_max=_cache_bytes_max(settings, budget),
            )
            facts = Facts(catalogue, store, spec.mountpoint)
            self.inspection = self._inspection(nursery, facts, fetching, store)
            self.operations = self._operations(facts, fetching, local, fill)
            await self._serve(nursery, report)

    def _read_manifest(self, stack: AsyncExitStack) -> tuple[Catalogue, LocalFiles | None]:
        """What is to be shown, as a tree, and what of it lies on the disk already."""
        settings, spec = self.settings, self.spec
        manifest = manifest_file.load(settings.config_dir, spec.inputs)
        stack.callback(manifest.close)
        local = _local_files(settings.inputs_dir if spec.as_root else spec.mountpoint, spec)
        if local is not None:
            stack.callback(local.close)
        self.tree = build(
            manifest,
            as_root=spec.as_root,
            local=local.files if local is not None else {},
            inputs_dir=settings.inputs_dir,
        )
        _warn(self.tree, manifest, api_file.path_in(settings.config_dir))
        gc.collect()
        gc.freeze()  # the tree lives as long as we do: no collection needs to walk it again
        return Catalogue(manifest, self.tree), local

    def _inspection(self, nursery: trio.Nursery, facts: Facts, fetching: Fetching, store: SegmentStore) -> Inspection:
        """What `status` and `info` ask."""
        occupancy = Occupancy(
            nursery, self.tree, facts.wait_cached_bytes, lambda: self.metrics.snapshot()["fetched_bytes"]
        )
        return Inspection(
            self.spec,
            self.tree,
            facts,
            occupancy,
            fetching.reader,
            fetching.leases,
            self.metrics,
            store=store.statistics,
            requests_under_way=lambda: len(self.operations.under_way),
            began_at_s=time.time(),
        )

    def _operations(self, facts: Facts, fetching: Fetching, local: LocalFiles | None, fill: FillLimits) -> Operations:
        """What the kernel asks."""
        settings = self.settings
        siblings = SiblingAhead(
            self.tree,
            fetching.reader.fetch_ahead,
            requests_ahead=lambda: fetching.reader.statistics().flights_ahead,
            fill=fill,
        )
        return Operations(
            tree=self.tree,
            reader=fetching.reader,
            sizing=fetching.sizing,
            siblings=siblings,
            metrics=self.metrics,
            owner=Ownership(settings.uid, settings.gid),
            open_local=local.open if local is not None else _no_local_file,
            attributes_of=facts.attributes if settings.xattrs else None,
            get_ready=fetching.get_ready,
        )

    async def _serve(self, nursery: trio.Nursery, report: ReportPipe) -> None:
        settings, spec = self.settings, self.spec
        session = Session(self.operations, spec.mountpoint)
        source = "valohai" if spec.as_root else f"valohai:{spec.inputs[0]}"
        session.mount(source=source, allow_other=settings.allow_other)
        try:
            nursery.start_soon(session.serve)
            await session.wait_answering(settings.mount_timeout)
            if not kernel.tune(spec.mountpoint, readahead_bytes=settings.kernel_readahead):
                log.info("the kernel's readahead could not be raised: large sequential reads cost more CPU")
            if spec.control_path:
                handlers = {
                    "status": self.inspection.status,
                    "info": self.inspection.info,
                    "unmount": self._on_unmount,
                    **self.warming.handlers,
                }
                await nursery.start(control.serve, spec.control_path, handlers)
            await nursery.start(self._watch_signals)
            watchdog = Watchdog(
                requests=self.operations.under_way,
                deadline_s=settings.read_timeout,
                metrics=self.metrics,
                state=self.inspection.state,
            )
            await nursery.start(watchdog.run)
            files, size, _ = self.tree.totals()
            log.info("mounted at %s: %d files, %d bytes", spec.mountpoint, files, size)
            report.send(
                Report(
                    pid=os.getpid(),
                    files=files,
                    bytes=size,
                    warnings=self.tree.warnings[:WARNINGS_REPORTED_MAX],
                )
            )
            await self._wait_ending(session)
        finally:
            with trio.CancelScope(shield=True):
                self._lazily = await session.unmount(grace_s=settings.grace_period)
                session.terminate()
                await session.ended.wait()
                session.close()
            log.info("unmounted %s", spec.mountpoint)
        nursery.cancel_scope.cancel()

    async def _wait_ending(self, session: Session) -> None:
        """Until we are told to end, or the mount is gone."""
        async with trio.open_nursery() as nursery:

            async def told() -> None:
                await self._ending.wait()
                nursery.cancel_scope.cancel()

            async def gone() -> None:
                await session.ended.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(told)
            nursery.start_soon(gone)

    async def _watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                log.info("%s: unmounting", signal.Signals(number).name)
                self._ending.set()

    async def _on_unmount(self, request: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - a handler's shape
        self._ending.set()
        return {"pid": os.getpid()}


def _local_files(base: str, spec: MountSpec) -> LocalFiles | None:
    try:
        return LocalFiles(base, only=spec.inputs if spec.as_root else None)
    except OSError as error:
        if spec.as_root:
            return None  # exploring with --root on a machine without an inputs directory
        raise errors.MountFailedError(f"{base}: {error.strerror}") from error


def _warn(tree: Tree, manifest: Manifest, api_path: str) -> None:
    """Logs what cannot be shown, or not read."""
    if not os.path.exists(api_path):
        tree.tell_unreachable(manifest, f"there is no {api_path} to ask Valohai for another")
    for warning in tree.warnings:
        log.warning("%s", warning)


def _budget(settings: Settings) -> Budget:
    wanted = settings.cache_min_free
    if wanted.endswith("%"):
        return Budget(bytes_max=settings.cache_max_size, free_min_share=float(wanted[:-1]) / 100)
    return Budget(bytes_max=settings.cache_max_size, free_min_bytes=parse_bytes(wanted))


def _cache_bytes_max(settings: Settings, budget: Budget) -> int:
    """What the cache can hold at the very most: its own bound, or its file system without what is to stay free."""
    try:
        found = os.statvfs(settings.cache_dir)
    except OSError:
        return budget.bytes_max or MEMORY_BYTES_MAX
    disk = found.f_blocks * found.f_frsize
    room = disk - max(budget.free_min_bytes, int(disk * budget.free_min_share))
    return max(0, min(room, budget.bytes_max or room))


def _no_local_file(path: str) -> int:
    raise FileNotFoundError(path)


class ReportPipe:
    """Says how the start went, once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def send(self, report: Report) -> None:
        """Writes the line and closes the pipe; a second report is nobody's business any more."""
        if self._descriptor is None:
            return
        line = msgspec.json.encode(report) + b"\n"
        try:
            os.write(self._descriptor, line)
        except BrokenPipeError:
            log.warning("whoever started this mount is gone")
        finally:
            os.close(self._descriptor)
            self._descriptor = None


def _read_spec(descriptor: int) -> MountSpec:
    with os.fdopen(descriptor, "rb") as pipe:
        return msgspec.json.decode(pipe.read(), type=MountSpec)


def _first(error: BaseException) -> BaseException:
    """The cause worth reporting: trio wraps what its tasks raise in groups."""
    while isinstance(error, BaseExceptionGroup):
        error = next((e for e in error.exceptions if isinstance(e, errors.ValohaiFuseError)), error.exceptions[0])
    return error


def main() -> int:
    """Runs the daemon; 0 after an unmount, 1 after anything else (the report or the log says what)."""
    spec = _read_spec(int(sys.argv[1]))
    os.set_inheritable(int(sys.argv[2]), False)
    report = ReportPipe(int(sys.argv[2]))
    settings = Settings(**spec.settings)
    subject = ",".join(spec.inputs) if not spec.as_root else "root"
    log_file = None if spec.log_to_stderr else settings.log_file
    logs.configure(settings.log_level, log_file=log_file, subject=subject, echo_level=spec.echo_level)
    block_signal()
    keep_freed_memory()
    expand_descriptor_table()
    daemon = Daemon(spec)
    try:
        trio.run(daemon.run, report)
    except BaseException as error:  # the last edge: whatever ended the daemon is reported and logged
        cause = _first(error)
        if isinstance(cause, errors.ValohaiFuseError):
            log.error("%s", cause)  # noqa: TRY400 - an error of ours explains itself, a traceback would hide it
        else:
            log.critical("the daemon ended", exc_info=error)
        report.send(failed(cause))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
