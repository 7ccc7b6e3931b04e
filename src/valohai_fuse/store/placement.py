"""Where the bytes of a fetch land: in the segment's file, in memory on their way there, or in memory instead of it.

- What is large and about to be read is staged: it lands in memory, and in the file behind the reader's back.
- What the disk does not take, because it is sick, full, stuck or too slow, stands in memory, of which there is little.
- Nothing lands on the disk that the `Room` has not granted.

Belongs to the event loop.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.model import segment
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.ports import LandingPlace, ObjectKey
from valohai_fuse.store.calls import DiskCalls, NotAnsweringError
from valohai_fuse.store.claims import Claims
from valohai_fuse.store.directory import Home
from valohai_fuse.store.health import DiskHealth, DiskPace, RateLimitedLog
from valohai_fuse.store.places import ABANDONED_S, Place, Places
from valohai_fuse.store.room import Room

STAGED_BYTES_MIN = 1024 * 1024
"""From this on a piece goes through memory: a stream's. A smaller one would waste a segment's memory."""
ROOM_PATIENCE_S = 2.0
"""How long a fetch that somebody waits for waits for room on the disk before it lands in memory."""
_ROOM_PATIENCE_AHEAD_S = 0.5


class Placement:
    """The choices of one store. `room`: None, the disk takes whatever fits on it."""

    def __init__(
        self,
        home: Home,
        places: Places,
        *,
        disk: DiskCalls,
        claims: Claims,
        room: Room | None,
        monotonic: Callable[[], float],
        warnings: RateLimitedLog,
    ) -> None:
        self._home = home
        self._places = places
        self._disk = disk
        self._claims = claims
        self._room = room
        self._warnings = warnings
        self._health = DiskHealth(monotonic)
        self.pace = DiskPace(monotonic)

    @property
    def is_well(self) -> bool:
        """Whether the disk takes what it is given, as far as is known."""
        return self._health.well and not self._disk.stuck

    @property
    def failures(self) -> int:
        """How often it did not, since the start."""
        return self._health.failures

    @contextlib.asynccontextmanager
    async def landing(
        self, key: ObjectKey, extent: Extent, *, ahead: bool, staged: bool, to_keep: bool
    ) -> AsyncIterator[LandingPlace | None]:
        """See `ports.BlockStore`.

        Staged is what is large enough; small pieces go through the page cache, which writes them out when it pleases.
        """
        place = (key, extent.start // SEGMENT_BYTES)
        path = self.file_path(place)
        with self._staging(place, extent, staged=staged) if path else contextlib.nullcontext("") as staging:
            if path is None or not (staging or to_keep or self.pace.affordable()):
                with contextlib.nullcontext() if to_keep else self._standing_in(place, extent) as memory:
                    yield None if memory is None else LandingPlace(memory)
                return
            charged_s = 0.0 if staging or to_keep else self.pace.begin(len(extent))
            try:
                async with self._taken(len(extent), ahead=ahead, staged=bool(staging)) as granted:
                    if granted:
                        yield LandingPlace(path, staging)
                    elif ahead or to_keep:
                        yield None
                    else:
                        with self._standing_in(place, extent) as memory:
                            yield LandingPlace(memory)
            finally:
                self.pace.end(charged_s)

    def file_path(self, place: Place) -> str | None:
        """The segment's file, if the disk may be asked to take it; its directory is made."""
        path = self._places.path(place)
        if self._disk.stuck:
            self.refused("it does not answer")
            return None
        if self._places.avoids_file(place) or not self._health.takes_writes():
            return None
        try:
            self._home.make()
            self._home.make_fan_out(os.path.dirname(path))
        except (OSError, ConfigurationError) as error:
            self.refused(reason_of(error))
            return None
        return path

    def refused(self, detail: str) -> None:
        """The disk did not take something."""
        self._health.failed(detail)
        self._home.forget()
        # On a file that may be gone; without them, at worst something is fetched twice.
        self._disk.later(self._claims.close)
        self._places.forget_files()  # who deleted files to make room gets it only when nobody has them open

    @contextlib.contextmanager
    def _standing_in(self, place: Place, extent: Extent) -> Iterator[str]:
        """Memory for what the disk does not take; the file all the same, should there be no memory."""
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(self._places.in_memory(place, extent, stands_in=True))
            except OSError as error:
                self._warnings.warn(
                    "memory", f"no segments in memory ({reason_of(error)}); trying the disk all the same"
                )
                path = None
            yield path or self._places.path(place)

    @contextlib.contextmanager
    def _staging(self, place: Place, extent: Extent, *, staged: bool) -> Iterator[str]:
        """Memory for a large piece that somebody is about to read; "" where there is no use or no room for it.

        Where the disk may hang it is used for everything: a worker's thread hangs then, and not the worker.
        """
        with contextlib.ExitStack() as stack:
            path = None
            if (staged and len(extent) >= STAGED_BYTES_MIN) or self._disk.may_hang:
                with contextlib.suppress(OSError):
                    in_memory = self._places.in_memory(place, extent, stands_in=False, may_replace=self._disk.may_hang)
                    path = stack.enter_context(in_memory)
            yield path or ""

    def _taken(self, byte_count: int, *, ahead: bool, staged: bool) -> AbstractAsyncContextManager[bool]:
        """Room on the disk for `byte_count` bytes of one segment while the block runs, and whether there was any. What was
        `staged` and then given up may still be on its way to the disk when the block is over."""
        if self._room is None:
            return contextlib.nullcontext(enter_result=True)
        return self._room.taken(
            segment.bytes_on_disk_max(byte_count),
            patience_s=_ROOM_PATIENCE_AHEAD_S if ahead else ROOM_PATIENCE_S,
            given_up_after_s=ABANDONED_S if staged else 0.0,
        )


def reason_of(error: OSError | ConfigurationError) -> str:
    """In words for a log."""
    if isinstance(error, NotAnsweringError):
        return "it does not answer"
    return error.message if isinstance(error, ConfigurationError) else error.strerror or type(error).__name__
