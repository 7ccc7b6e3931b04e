"""What a mount says of itself: the answers behind `status`, `info` and the user.valohai.* attributes.

Part of the composition: it sees the manifest, the tree and the store at once. `Facts` need no mount: `offline` finds them out
from inputs.json and the cache directory alone. No answer holds a secret: `uri` is what inputs.json names the file by, without
credentials and query.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import trio

from valohai_fuse import errors
from valohai_fuse.engine.leases import Leases
from valohai_fuse.engine.reader import Reader
from valohai_fuse.handshake import MountSpec
from valohai_fuse.model.identity import without_secrets
from valohai_fuse.model.manifest import Manifest, stable_id
from valohai_fuse.model.tree import Inode, Tree, build
from valohai_fuse.obs.metrics import Counts
from valohai_fuse.occupancy import Occupancy
from valohai_fuse.ports import BlockStore, FileRef, ObjectKey
from valohai_fuse.settings import Settings
from valohai_fuse.sources import manifest_file
from valohai_fuse.sources.local_files import LocalFiles
from valohai_fuse.store.health import StoreStatistics
from valohai_fuse.store.segments import SegmentStore

OPEN_FILES_SHOWN = 20
FILES_PER_BREATH = 200
"""A directory is summed up in pieces of this many files, so that reads are answered in between."""
COUNTED_IN_THREAD_BYTES_MIN = 256 * 1024 * 1024
COUNTED_WITHIN_S = 10.0


class Catalogue:
    """What the tree shows, in the engine's words: from an inode to the object's key, its FileRef and a name for messages."""

    def __init__(self, manifest: Manifest, tree: Tree) -> None:
        self.manifest = manifest
        self.tree = tree

    def file(self, inode: Inode) -> tuple[FileRef, str]:
        """For the size probe: the size is not known yet."""
        return self.manifest.record(self.tree.file_index(inode)).ref(), self.tree.path(inode)

    def object(self, inode: Inode) -> tuple[ObjectKey, FileRef, str]:
        """For the reader: a file whose size is known."""
        record = self.manifest.record(self.tree.file_index(inode))
        size = self.tree.size(inode)
        assert size is not None, "sized when it was looked up"
        return ObjectKey(stable_id(record), size), record.ref(), self.tree.path(inode)


class Facts:
    """Answers about the files of one tree."""

    def __init__(self, catalogue: Catalogue, store: BlockStore | None, where: str) -> None:
        """`store` None: there is no cache. `where` is the directory that paths are relative to, for messages."""
        self._manifest = catalogue.manifest
        self._tree = catalogue.tree
        self._store = store
        self._where = where

    async def info(self, path: str) -> dict[str, Any]:
        """What is known of the file or directory at `path`. Raises UsageError when there is no such name."""
        inode = self._tree.find(path)
        if inode is None:
            raise errors.UsageError(f"no such file or directory in {self._where}: {path}")
        if self._tree.is_dir(inode):
            return await self._of_directory(inode)
        return {**self._of_file(inode), "cached_bytes": await self.wait_cached_bytes(inode)}

    def attributes(self, inode: Inode) -> dict[bytes, bytes]:
        """The user.valohai.* attributes of a file."""
        if self._tree.is_dir(inode):
            return {}
        info = {**self._of_file(inode), "cached_bytes": self._cached_bytes(inode)}
        names = ("uri", "datum_id", "input_id", "cached_bytes", "metadata")
        return {
            f"user.valohai.{name}".encode(): value.encode() if isinstance(value, str) else msgspec.json.encode(value)
            for name in names
            if (value := info.get(name)) not in (None, [])
        }

    async def wait_cached_bytes(self, inode: Inode) -> int:
        """How much of the file is in the cache; counted in a thread where that takes long."""
        if (self._tree.size(inode) or 0) < COUNTED_IN_THREAD_BYTES_MIN:
            return self._cached_bytes(inode)
        key = self._key(inode)
        if key is None or self._store is None:
            return self._cached_bytes(inode)
        with trio.move_on_after(COUNTED_WITHIN_S):
            return await trio.to_thread.run_sync(self._store.cached_bytes, key, abandon_on_cancel=True)
        return 0  # who asks what is cached of a disk that does not answer: nothing that is of use

    def _of_file(self, inode: Inode) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "path": self._tree.path(inode),
            "type": "file",
            "size": self._tree.size(inode),
            "on_disk": self._tree.local(inode),
        }
        if self._tree.file_index(inode) < 0:
            return shown  # on the disk below the mount point, not in the manifest
        record = self._manifest.record(self._tree.file_index(inode))
        return shown | {
            "input": record.input_name,
            "name": record.name,
            "uri": without_secrets(record.uri) if record.uri else None,
            "datum_id": record.datum_id,
            "input_id": record.input_id,
            "download_intent": record.download_intent,
            "metadata": record.metadata,
            "checksums": record.checksums,
        }

    def _key(self, inode: Inode) -> ObjectKey | None:
        """None for what the cache has nothing of: a file on the disk, an empty one, one of unknown size."""
        size = self._tree.size(inode)
        if not size or self._tree.local(inode):
            return None
        return ObjectKey(stable_id(self._manifest.record(self._tree.file_index(inode))), size)

    def _cached_bytes(self, inode: Inode) -> int:
        key = self._key(inode)
        if key is None:
            return self._tree.size(inode) or 0
        return 0 if self._store is None else self._store.cached_bytes(key)

    async def _of_directory(self, inode: Inode) -> dict[str, Any]:
        files = size = unknown = cached = 0
        for file in self._tree.walk_files(inode):
            known = self._tree.size(file)
            files += 1
            size += known or 0
            unknown += known is None
            cached += await self.wait_cached_bytes(file)
            if files % FILES_PER_BREATH == 0:
                await trio.lowlevel.checkpoint()
        return {
            "path": self._tree.path(inode),
            "type": "directory",
            "files": files,
            "size": size,
            "files_of_unknown_size": unknown,
            "cached_bytes": cached,
        }


@contextlib.contextmanager
def offline(settings: Settings, inputs: tuple[str, ...]) -> Iterator[Facts]:
    """The same facts without a mount, about what would be shown below the inputs directory; paths begin with the input's name.

    Raises ConfigurationError and UsageError (no such input).
    """
    with contextlib.ExitStack() as stack:
        manifest = manifest_file.load(settings.config_dir, inputs)
        stack.callback(manifest.close)
        local: LocalFiles | None = None
        with contextlib.suppress(OSError):  # no inputs directory: nothing is on the disk
            local = LocalFiles(settings.inputs_dir, only=inputs)
            stack.callback(local.close)
        files = local.files if local is not None else {}
        tree = build(manifest, as_root=True, local=files, inputs_dir=settings.inputs_dir)
        store: BlockStore | None = None
        if os.path.isdir(settings.cache_dir):  # looking makes no directory
            on_disk = SegmentStore(settings.cache_dir)
            stack.callback(on_disk.close)
            store = on_disk
        yield Facts(Catalogue(manifest, tree), store, settings.inputs_dir)


class Inspection:
    """Answers about one mount; all on the trio thread."""

    def __init__(
        self,
        spec: MountSpec,
        tree: Tree,
        facts: Facts,
        occupancy: Occupancy,
        reader: Reader,
        leases: Leases,
        metrics: Counts,
        *,
        store: Callable[[], StoreStatistics],
        requests_under_way: Callable[[], int],
        began_at_s: float,
    ) -> None:
        self._spec = spec
        self._tree = tree
        self._facts = facts
        self._occupancy = occupancy
        self._reader = reader
        self._leases = leases
        self._metrics = metrics
        self._store = store
        self._requests_under_way = requests_under_way
        self._began_at_s = began_at_s

    async def status(self, request: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - a handler's shape
        """The `status` answer: what is mounted, what is open, all metrics."""
        return self.state() | {"cached_bytes": await self._occupancy.estimate()}

    def state(self) -> dict[str, Any]:
        """The same for a dump, without what takes counting."""
        files, size, unknown = self._tree.totals()
        reader = self._reader.statistics()
        self._metrics.gauge("open_files", reader.handles)
        self._metrics.gauge("reads_under_way", reader.reads_waiting)
        self._metrics.gauge("flights", reader.flights)
        self._metrics.gauge("flights_ahead", reader.flights_ahead)
        self._metrics.gauge("requests_under_way", self._requests_under_way())
        self._metrics.gauge("tasks", trio.lowlevel.current_statistics().tasks_living)
        return {
            "pid": os.getpid(),
            "mountpoint": self._spec.mountpoint,
            "inputs": list(self._spec.inputs),
            "as_root": self._spec.as_root,
            "since": self._began_at_s,
            "files": files,
            "bytes": size,
            "files_of_unknown_size": unknown,
            "warnings": len(self._tree.warnings),
            "open_files": self._reader.open_labels(OPEN_FILES_SHOWN),
            "metrics": self._metrics.snapshot() | self._renewals() | self._cache(),
        }

    def _renewals(self) -> dict[str, float]:
        leases = self._leases.statistics()
        return {
            "renewals": leases.renewals,
            "renewal_failures": leases.renewals_failed,
            "urls_refused": leases.refused,
            "clock_skew_seconds": leases.clock_skew_s or 0.0,
        }

    def _cache(self) -> dict[str, float]:
        store = self._store()
        return {
            "blocks_corrupt": store.blocks_distrusted,
            "cache_errors": store.disk_errors,
            "hot_bytes": store.memory_bytes,
        }

    async def info(self, request: dict[str, Any]) -> dict[str, Any]:
        """The `info` answer for `path`, relative to the mount point. Raises UsageError when there is no such name."""
        return await self._facts.info(str(request.get("path", "")).strip("/"))
