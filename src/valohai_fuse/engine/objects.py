"""One remote object as the engine sees it while it is open: its identity, its version, its flights.

The version (ETag) is pinned by the first evidence: a cached segment, or the first response. From then on bytes of another
version never reach a reader of this generation:
- A response that disagrees with a pin that came only from the cache and under which nothing was served replaces the pin.
- A response that disagrees with a pin under which bytes were served begins a new *generation*: handles of the old one fail
  with ObjectChangedError for ever, new opens read the new version, and the kernel's pages are dropped on the next open.

All state is changed on the trio thread, in functions that do not await.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from valohai_fuse.errors import ObjectChangedError
from valohai_fuse.model.readahead import Planner
from valohai_fuse.model.tree import Inode
from valohai_fuse.ports import FileRef, ObjectKey, Version

if TYPE_CHECKING:
    from valohai_fuse.engine.flights import Flight


class RemoteObject:
    """An object with at least one handle or flight. `version` None: nothing is known yet."""

    __slots__ = (
        "cache_distrusted",
        "file",
        "flights",
        "generation",
        "handles",
        "inode",
        "key",
        "label",
        "missing",
        "served",
        "version",
    )

    def __init__(self, inode: Inode, key: ObjectKey, file: FileRef, label: str) -> None:
        self.inode = inode
        self.key = key
        self.file = file
        self.label = label
        self.version: Version | None = None
        self.generation = 0
        self.handles = 0
        self.flights: list[Flight] = []
        self.served = False
        self.cache_distrusted = False
        """The store contradicted the cache: versions are learnt from responses only."""
        self.missing = False
        """The store answered 404 or 410: the next open says so."""

    def adopt(self, version: Version) -> None:
        """Pins the version that a response or the cache shows. Raises ObjectChangedError when it contradicts the pin."""
        if self.version is None:
            self.version = version
        elif self.version != version:
            raise self.changed("its ETag is not what it was")

    @property
    def forgettable(self) -> bool:
        """Nobody uses it and there is nothing to remember of it: a later open may begin anew."""
        return not (self.handles or self.flights or self.generation or self.missing)

    def distrust_cache(self) -> bool:
        """The store says that the pinned version is gone. True: nothing was served under it, so forget it and go on."""
        if self.served or self.version is None:
            return False
        self.version = None
        self.cache_distrusted = True
        return True

    def changed(self, how: str) -> ObjectChangedError:
        """Begins a new generation; returns the error for everyone who holds the old one."""
        self.generation += 1
        self.version = None
        self.served = False
        self.cache_distrusted = True
        return ObjectChangedError(f"{self.label}: the object has changed in its store: {how}")


class Handle:
    """One open file. Reads through it fail once the object's generation has moved on."""

    __slots__ = ("generation", "object", "planner")

    def __init__(self, obj: RemoteObject, window_bytes_max: int) -> None:
        self.object = obj
        self.generation = obj.generation
        self.planner = Planner(obj.key.size, window_bytes_max)

    def check(self) -> None:
        """Raises ObjectChangedError when this handle belongs to a former generation."""
        if self.generation != self.object.generation:
            raise ObjectChangedError(f"{self.object.label}: the object has changed in its store since it was opened")
