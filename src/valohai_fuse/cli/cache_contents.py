"""What of this execution's inputs is in the block cache, for `cache info` and `cache export`: joins inputs.json, the cache
directory and the mounts that use it. Imports what is heavy, so it is imported when one of the two runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from valohai_fuse.store.upkeep import survey


@dataclass(slots=True)
class _Holding:
    """What the cache has of one object."""

    blocks: int = 0
    content_bytes: int = 0
    bytes_on_disk: int = 0


def gather(settings: Settings, cache_dir: str) -> dict[str, Any]:
    """The answer of `cache info --json`."""
    objects: dict[str, _Holding] = {}
    segments = blocks = content = on_disk = 0
    used_ns: list[int] = []
    for held in survey(cache_dir):
        holding = objects.setdefault(held.digest_hex, _Holding())
        holding.blocks += held.blocks
        holding.content_bytes += held.content_bytes
        holding.bytes_on_disk += held.file.bytes_on_disk
        segments += 1
        blocks += held.blocks
        content += held.content_bytes
        on_disk += held.file.bytes_on_disk
        used_ns = [min([*used_ns[:1], held.file.used_at_ns]), max([*used_ns[1:], held.file.used_at_ns])]
    disk = os.statvfs(cache_dir)
    return {
        "cache_dir": cache_dir,
        "segments": segments,
        "objects": len(objects),
        "blocks": blocks,
        "content_bytes": content,
        "bytes_on_disk": on_disk,
        "bytes_max": settings.cache_max_size or None,
        "min_free": settings.cache_min_free,
        "free_bytes": disk.f_bavail * disk.f_frsize,
        "capacity_bytes": disk.f_blocks * disk.f_frsize,
        "used_first_s": time.time() - used_ns[0] / 1e9 if used_ns else None,
        "used_last_s": time.time() - used_ns[1] / 1e9 if used_ns else None,
        "hit_rate": _hit_rate(settings),
        "inputs": _of_inputs(settings, objects),
    }


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


def _of_inputs(settings: Settings, objects: dict[str, _Holding]) -> list[dict[str, Any]]:
    try:
        manifest = manifest_file.load(settings.config_dir)
    except ConfigurationError:
        return []  # a host that keeps the cache of many executions need not be inside of one
    try:
        return [_of_input(name, files, objects) for name, files in _by_input(manifest).items()]
    finally:
        manifest.close()


def _by_input(manifest: Manifest) -> dict[str, list[ObjectKey]]:
    """The files whose size is known; the others' names in the cache are not known either."""
    found: dict[str, list[ObjectKey]] = {}
    for index in range(len(manifest)):
        size = manifest.size(index)
        record = manifest.record(index)
        files = found.setdefault(record.input_name, [])
        if size is not None:
            files.append(ObjectKey(stable_id(record), size))
    return found


def _of_input(name: str, files: list[ObjectKey], objects: dict[str, _Holding]) -> dict[str, Any]:
    nothing = _Holding()
    held = [objects.get(segment.object_digest(key.stable_id, key.size).hex(), nothing) for key in files]
    return {
        "input": name,
        "files": len(files),
        "size": sum(key.size for key in files),
        "files_cached": sum(holding.content_bytes >= key.size for key, holding in zip(files, held, strict=True)),
        "blocks": sum(holding.blocks for holding in held),
        "content_bytes": sum(holding.content_bytes for holding in held),
        "bytes_on_disk": sum(holding.bytes_on_disk for holding in held),
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
