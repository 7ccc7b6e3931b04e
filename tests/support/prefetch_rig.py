"""Prefetches over an `EngineRig`: a tree of its objects, sizes from a probe that knows them."""

from __future__ import annotations

import json
from collections.abc import Iterable

import trio

from support.engine_rig import EngineRig
from valohai_fuse.engine.prefetch import InCache, Keep, Prefetch
from valohai_fuse.engine.sizing import Sizing
from valohai_fuse.model.manifest_json import from_json
from valohai_fuse.model.tree import Inode, LocalFile, Tree, build
from valohai_fuse.ports import FileRef, Lease, Priority


class SizesOf:
    """A `SizeProbe` that knows the rig's objects."""

    def __init__(self, rig: EngineRig) -> None:
        self._rig = rig
        self.asked: list[str] = []

    async def size(self, lease: Lease) -> int:
        await trio.sleep(0.02)
        name = lease.url.rpartition("/")[2].partition("?")[0]
        self.asked.append(name)
        return len(self._rig.contents[name])


def tree_of(rig: EngineRig, *, unknown: Iterable[str] = (), local: dict[str, LocalFile] | None = None) -> Tree:
    files = [{"name": name, "size": None if name in unknown else len(rig.contents[name])} for name in rig.names]
    manifest = from_json(json.dumps({"data": {"files": files}}).encode(), mtime_ns=7)
    return build(manifest, as_root=False, local=local or {}, inputs_dir="/valohai/inputs")


def prefetch_of(
    rig: EngineRig,
    nursery: trio.Nursery,
    tree: Tree,
    *,
    keep: Keep | None = None,
    pieces_max: int = 4,
    patience_s: float = 300,
) -> Prefetch:
    def describe(inode: Inode) -> tuple[FileRef, str]:
        _key, file, label = rig._describe(inode)
        return file, label

    sizing = Sizing(
        nursery=nursery,
        tree=tree,
        probe=SizesOf(rig),
        leases=rig.leases,
        metrics=rig.metrics,
        describe=describe,
        timeout_s=60,
    )
    return Prefetch(
        tree=tree,
        reader=rig.reader,
        flights=rig.flights,
        sizing=sizing,
        keep=keep or InCache(),
        priority=Priority.AHEAD,
        pieces_max=pieces_max,
        patience_s=patience_s,
    )
