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
from valohai_fuse.model.extents import Extent
from valohai_fuse.model.fill import Fill
from valohai_fuse.model.readahead import Planner
from valohai_fuse.model.tree import Inode
from valohai_fuse.ports import FileRef, ObjectKey, Version

if TYPE_CHECKING:
    from valohai_fuse.engine.flights import Flight


REPEAT_S = 1.0
"""The kernel repeats a read that failed at once; what comes later is somebody's own new read."""
GIVEN_UP_MAX = 64


class _GivenUp:
    """A read that ended at its deadline, and which of its offsets have been asked for again since."""

    __slots__ = ("extent", "repeated", "until_t")

    def __init__(self, extent: Extent, until_t: float) -> None:
        self.extent = extent
        self.until_t = until_t
        self.repeated: set[int] = set()


class RemoteObject:
    """An object with at least one handle or flight. `version` None: nothing is known yet."""

    __slots__ = (
        "cache_distrusted",
        "file",
        "fill",
        "flights",
        "generation",
        "given_up",
        "handles",
        "inode",
        "key",
        "label",
        "last_failure",
        "missing",
        "scattered_waiting",
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
        self.given_up: list[_GivenUp] = []
        self.fill: Fill | None = None
        """Of a file that is open and read at random: whether to complete it. Belongs to `engine.fill`."""
        self.scattered_waiting = 0
        """Reads that continue nothing and wait for bytes from the store."""
        self.served = False
        self.cache_distrusted = False
        """The store contradicted the cache: versions are learnt from responses only."""
        self.missing = False
        """The store answered 404 or 410: the next open says so."""
        self.last_failure = ""
        """What became of the latest attempt to fetch any of it, in words for a log; empty when that succeeded."""

    def adopt(self, version: Version) -> None:
        """Pins the version that a response or the cache shows. Raises ObjectChangedError when it contradicts the pin."""
        if self.version is None:
            self.version = version
        elif self.version != version:
            raise self.changed("its ETag is not what it was")

    def note_given_up(self, extent: Extent, now_t: float) -> None:
        """A read of `extent` has just ended at its deadline."""
        recent = [one for one in self.given_up if now_t < one.until_t]
        self.given_up = [*recent[1 - GIVEN_UP_MAX :], _GivenUp(extent, now_t + REPEAT_S)]

    def is_repeat(self, extent: Extent, now_t: float) -> bool:
        """Whether this is the kernel's repetition of a read that was given up: it must not have a deadline of its own.

        When a read that the kernel made for readahead fails, it asks for the page that somebody waits for once more, and only
        the outcome of that reaches the program, which would so wait twice as long as it was promised. Each page is asked for
        again once, at once, perhaps through the handle of another reader; a program that tries again comes after that.
        """
        for one in self.given_up:
            within = one.extent.start <= extent.start and extent.stop <= one.extent.stop
            if within and now_t < one.until_t and extent.start not in one.repeated:
                one.repeated.add(extent.start)
                return True
        return False

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

    __slots__ = ("generation", "loaded_upto", "number", "object", "planner", "unlooked")

    def __init__(self, obj: RemoteObject, window_bytes_max: int, number: int = 0) -> None:
        self.object = obj
        self.number = number
        """Tells the handles of a mount apart in its log."""
        self.generation = obj.generation
        self.planner = Planner(obj.key.size, window_bytes_max)
        self.loaded_upto = 0
        """Up to where in the object its cached bytes are being loaded into memory; 0: they are not. Belongs to `engine.loads`."""
        self.unlooked: list[Extent] = []
        """What was planned ahead of streams while that was so, and nobody has asked the store for yet. Belongs to the reader."""

    def check(self) -> None:
        """Raises ObjectChangedError when this handle belongs to a former generation."""
        if self.generation != self.object.generation:
            raise ObjectChangedError(f"{self.object.label}: the object has changed in its store since it was opened")
