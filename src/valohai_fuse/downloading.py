"""Composition of a plain download: the same manifest, leases, fetcher and verification as a mount, but the bytes end in ordinary
files. For machines without FUSE; in this process, no daemon.

Every piece lands in a private block store below the target first, is read back verified, written into its file (`store.copies`)
and dropped from the store, which so holds no more than what is under way. What a run leaves behind when it is interrupted is
exactly what the next one goes on from; when nothing is missing any more, nothing of it is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import trio

from valohai_fuse import errors
from valohai_fuse.assembly import open_fetching, open_workers
from valohai_fuse.engine.objects import Handle
from valohai_fuse.engine.prefetch import Progress
from valohai_fuse.inspection import Catalogue
from valohai_fuse.model.extents import Extent
from valohai_fuse.model.tree import ROOT, Inode, Tree, build
from valohai_fuse.obs.metrics import Counts
from valohai_fuse.ports import NotHere, Priority
from valohai_fuse.settings import Settings
from valohai_fuse.sources import manifest_file
from valohai_fuse.sources.local_files import LocalFiles
from valohai_fuse.store import copies
from valohai_fuse.store.segments import SegmentStore

log = logging.getLogger(__name__)

PARTIAL: Final = ".valohai-fuse-partial"
"""Below the target directory: what is not complete yet."""
SHOWN_EVERY_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went. `warnings` are those of the tree: names that cannot be, duplicates."""

    progress: Progress
    interrupted: bool
    warnings: tuple[str, ...]


class IntoFiles:
    """`engine.prefetch.Keep`: pieces go from the store into files below a directory."""

    in_cache = False

    def __init__(self, catalogue: Catalogue, store: SegmentStore, target_fd: int, partial_dir: str) -> None:
        self._catalogue = catalogue
        self._store = store
        self._target_fd = target_fd
        self._partial_dir = partial_dir
        self._copies: dict[Inode, copies.Copy] = {}
        """Files on their way; those that were complete already are not in it."""

    async def begin(self, inode: Inode, size: int) -> tuple[Iterable[Extent], int]:
        """What a former run has not written yet."""
        key, _ref, label = self._catalogue.object(inode)
        copy = copies.Copy(key, label, self._target_fd, self._partial_dir)
        with _told_as_read_errors(label):
            missing = await trio.to_thread.run_sync(copy.missing_unless_complete)
        if missing is None:
            return (), size
        self._copies[inode] = copy
        return missing, size - sum(map(len, missing))

    async def landed(self, handle: Handle, piece: Extent) -> None:
        """Copies the piece, and drops it from the store."""
        obj = handle.object
        copy, version = self._copies[obj.inode], obj.version
        if version is None:
            raise errors.ObjectChangedError(f"{obj.label}: the object has changed in its store")
        data = self._store.read_nowait(obj.key, version, piece)  # it has just been written: no disk to wait for
        if isinstance(data, NotHere):
            data = await self._store.read(obj.key, version, piece)
        if isinstance(data, NotHere):
            raise errors.ReadError(f"{obj.label}: what has landed cannot be read back", hint="is the disk full?")

        def write() -> None:
            copy.write(piece, data, version)
            self._store.discard(obj.key, piece.start)

        try:
            with _told_as_read_errors(obj.label):
                await trio.to_thread.run_sync(write)
        except copies.OtherVersionError:
            await trio.to_thread.run_sync(copy.discard)
            raise errors.ObjectChangedError(
                f"{obj.label}: the object has changed in its store since its download began", hint="download it again"
            ) from None

    async def complete(self, inode: Inode, size: int) -> None:  # noqa: ARG002 - the protocol's shape
        """Verifies the file and gives it its name."""
        copy = self._copies.pop(inode, None)
        if copy is None:
            return
        tree, manifest = self._catalogue.tree, self._catalogue.manifest
        checksums = manifest.record(tree.file_index(inode)).checksums
        with _told_as_read_errors(copy.path):
            await trio.to_thread.run_sync(copy.complete, checksums, tree.mtime_ns(inode))


@contextlib.contextmanager
def _told_as_read_errors(label: str) -> Iterator[None]:
    try:
        yield
    except copies.InTheWayError as error:
        raise errors.ReadError(f"{label}: {error.args[0]}", hint="remove it, or choose another directory") from None
    except copies.ChecksumError as error:
        raise errors.ObjectChangedError(f"{label}: its {error.args[0]} is not the one that Valohai knows") from None
    except OSError as error:
        raise errors.ReadError(f"{label}: cannot be written: {error.strerror}") from None


def download(settings: Settings, inputs: Sequence[str], target: str, *, show: Callable[[Progress], None]) -> Outcome:
    """Downloads every file of the inputs to `target`/<input>/<name>; `show` is told now and then how far it is.

    SIGINT and SIGTERM stop it in order. Raises ConfigurationError, UsageError, ValohaiFuseError (no room, no access).
    """
    return trio.run(_download, settings, tuple(inputs), target, show)


async def _download(
    settings: Settings, inputs: tuple[str, ...], target: str, show: Callable[[Progress], None]
) -> Outcome:
    async with AsyncExitStack() as stack:
        manifest = manifest_file.load(settings.config_dir, inputs)
        stack.callback(manifest.close)
        tree = build(manifest, as_root=True, local={}, inputs_dir=settings.inputs_dir)
        target_fd = _open_target(target)
        stack.callback(os.close, target_fd)
        partial_dir = os.path.join(target, PARTIAL)
        lock_fd = _lock(partial_dir)
        stack.callback(os.close, lock_fd)
        _check_room(tree, target, inputs, partial_dir)
        catalogue = Catalogue(manifest, tree)
        store = SegmentStore(os.path.join(partial_dir, "blocks"))
        stack.callback(store.close)
        metrics = Counts()
        pool = await open_workers(settings, metrics, stack)
        fetching, _ = await open_fetching(settings, catalogue, store, pool, metrics, stack)
        prefetch = fetching.prefetch(IntoFiles(catalogue, store, target_fd, partial_dir), Priority.DEMAND)
        interrupted = await _until_done_or_told(
            lambda: prefetch.run(tree.walk_files(ROOT)), lambda: show(prefetch.progress())
        )
        progress = prefetch.progress()
        for name, _inode in tree.children(ROOT):  # an empty input is an empty directory
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=target_fd)
        if not interrupted and not progress.files_failed:
            shutil.rmtree(partial_dir, ignore_errors=True)
        return Outcome(progress, interrupted, tree.warnings)


async def _until_done_or_told(work: Callable[[], Awaitable[None]], show: Callable[[], None]) -> bool:
    """Runs the work, showing it; True when a signal ended it before."""
    told = False
    async with trio.open_nursery() as nursery:

        async def watch(task_status: trio.TaskStatus[None]) -> None:
            nonlocal told
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for _number in signals:
                    told = True
                    nursery.cancel_scope.cancel()

        async def show_on() -> None:
            while True:
                show()
                await trio.sleep(SHOWN_EVERY_S)

        await nursery.start(watch)
        nursery.start_soon(show_on)
        await work()
        nursery.cancel_scope.cancel()
    return told


def _open_target(target: str) -> int:
    try:
        os.makedirs(target, exist_ok=True)
        return os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.ValohaiFuseError(
            f"cannot write to {target}: {error.strerror}", hint="name another directory with --to"
        ) from None


def _lock(partial_dir: str) -> int:
    """A descriptor that holds the partial directory for us alone."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(partial_dir, 0o700)
        descriptor = os.open(partial_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise errors.ValohaiFuseError(
            f"cannot write to {partial_dir}: {error.strerror}", hint="name another directory with --to"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        target = os.path.dirname(partial_dir)
        if isinstance(error, BlockingIOError):
            raise errors.ValohaiFuseError(f"another download is writing to {target}") from None
        raise errors.ValohaiFuseError(
            f"{target} cannot be locked: {error.strerror}", hint="name another directory with --to"
        ) from None
    return descriptor


def _check_room(tree: Tree, target: str, inputs: tuple[str, ...], partial_dir: str) -> None:
    """Raises ValohaiFuseError when what is to come cannot fit, as far as sizes are known."""
    there = LocalFiles(target, only=inputs)
    there.close()
    known = sum(tree.size(inode) or 0 for inode in tree.walk_files(ROOT))
    with os.scandir(partial_dir) as entries:
        begun = sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    missing = known - sum(file.size for file in there.files.values()) - begun
    free = shutil.disk_usage(target).free
    if missing > free:
        raise errors.ValohaiFuseError(
            f"{target} has {free:,} bytes free, {missing:,} are to be downloaded",
            hint="name a directory on a larger disk with --to; a mount needs no room for what is not read",
        )
