"""What of this execution's inputs is in the block cache, for `cache info` and `cache export`: joins inputs.json, the cache
directory and the mounts that use it. Imports what is heavy, so it is imported when one of the two runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.model import segment
from valohai_fuse.model.manifest import Manifest, stable_id
from valohai_fuse.model.tree import ROOT, build
from valohai_fuse.obs.control_client import NoAnswerError, ask
from valohai_fuse.obs.runtime_dir import RuntimeDir
from valohai_fuse.ports import ObjectKey
from valohai_fuse.settings import Settings
from valohai_fuse.sources import manifest_file
from valohai_fuse.store.export import export as export_object
from valohai_fuse.store.segments import SegmentStore
from valohai_fuse.store.upkeep import Holding, summarize


def gather(settings: Settings, cache_dir: str) -> dict[str, Any]:
    """The answer of `cache info --json`."""
    inputs = {
        name: [(_digest_hex(key), key.size) for key in files] for name, files in _files_by_input(settings).items()
    }
    found = summarize(cache_dir, {digest_hex for files in inputs.values() for digest_hex, _ in files})
    disk = os.statvfs(cache_dir)
    now_s = time.time()
    return {
        "cache_dir": cache_dir,
        "segments": found.segments,
        "objects": found.objects,
        "blocks": found.total.blocks,
        "content_bytes": found.total.content_bytes,
        "bytes_on_disk": found.total.bytes_on_disk,
        "bytes_max": settings.cache_max_size or None,
        "min_free": settings.cache_min_free,
        "free_bytes": disk.f_bavail * disk.f_frsize,
        "capacity_bytes": disk.f_blocks * disk.f_frsize,
        "used_first_s": now_s - found.used_first_ns / 1e9 if found.segments else None,
        "used_last_s": now_s - found.used_last_ns / 1e9 if found.segments else None,
        "hit_rate": _hit_rate(settings),
        "inputs": [_of_input(name, files, found.of) for name, files in inputs.items()],
    }


def _digest_hex(key: ObjectKey) -> str:
    return segment.object_digest(key.stable_id, key.size).hex()


def _hit_rate(settings: Settings) -> float | None:
    """Of the mounts that are up; None when nothing was read through one."""
    hits = misses = 0.0
    for record in RuntimeDir(settings.runtime_dir).records():
        try:
            metrics = ask(record.control_path, "status")["metrics"]
        except NoAnswerError:
            continue
        hits += metrics.get("hit_bytes", 0)
        misses += metrics.get("miss_bytes", 0)
    return hits / (hits + misses) if hits + misses else None


def _files_by_input(settings: Settings) -> dict[str, list[ObjectKey]]:
    """The files whose size is known; the others' names in the cache are not known either."""
    try:
        manifest = manifest_file.load(settings.config_dir)
    except ConfigurationError:
        return {}  # a host that keeps the cache of many executions need not be inside of one
    try:
        return _by_input(manifest)
    finally:
        manifest.close()


def _by_input(manifest: Manifest) -> dict[str, list[ObjectKey]]:
    found: dict[str, list[ObjectKey]] = {}
    for index in range(len(manifest)):
        size = manifest.size(index)
        record = manifest.record(index)
        files = found.setdefault(record.input_name, [])
        if size is not None:
            files.append(ObjectKey(stable_id(record), size))
    return found


def _of_input(name: str, files: list[tuple[str, int]], objects: dict[str, Holding]) -> dict[str, Any]:
    """`files`: digest and size of each."""
    held = Holding()
    files_cached = 0
    for digest_hex, size in files:
        holding = objects.get(digest_hex)
        if holding is not None:
            held.add(holding)
        files_cached += holding is not None and holding.content_bytes >= size if size else 1
    return {
        "input": name,
        "files": len(files),
        "size": sum(size for _, size in files),
        "files_cached": files_cached,
        "blocks": held.blocks,
        "content_bytes": held.content_bytes,
        "bytes_on_disk": held.bytes_on_disk,
    }


def export(settings: Settings, cache_dir: str, inputs: Sequence[str], target: str) -> dict[str, Any]:
    """The answer of `cache export --json`. Raises ConfigurationError for an unknown input, OSError for `target`."""
    manifest = manifest_file.load(settings.config_dir, list(inputs) or None)
    store = SegmentStore(cache_dir)
    files = content = incomplete = 0
    try:
        for path, key in _tree_files(manifest, settings.inputs_dir):
            place = os.path.join(os.fsencode(target), path)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            if key is not None and export_object(store, key, os.fsdecode(place)):
                files += 1
                content += key.size
            else:
                incomplete += 1
    finally:
        store.close()
        manifest.close()
    return {"files": files, "bytes": content, "incomplete": incomplete}


def _tree_files(manifest: Manifest, inputs_dir: str) -> Iterator[tuple[bytes, ObjectKey | None]]:
    """As the tree shows them: names that it refuses are left out, of duplicates the last. No key: the size is not known."""
    tree = build(manifest, as_root=True, local={}, inputs_dir=inputs_dir)
    for inode in tree.walk_files(ROOT):
        size = tree.size(inode)
        path = os.fsencode(tree.path(inode))
        if size is None:
            yield path, None
        else:
            yield path, ObjectKey(stable_id(manifest.record(tree.file_index(inode))), size)
