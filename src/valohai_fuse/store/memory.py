"""Segments in memory: memfds in the format of cache files. Three uses, one mechanism:

- *staging*: what readers stream lands here first, is read from here, and is written to its file behind the readers' backs
  (`store.landing.copy_out`, O_DIRECT), so that a stream fills no page cache but FUSE's;
- *loading*: what a stream comes to soon is copied here from its file (`store.loading`), for the same reason;
- *standing in*: while the disk takes no writes.

A fetch worker lands in one by the path /proc/PID/fd/N, for it runs as the same user. Bounded by what the segments may hold
when full. A segment is pinned while something lands in it; of the others those go first that have been read to their end,
the last one first (its memory is warm), then the oldest. A full-sized memfd that goes is used again for the next segment,
and one that was read goes as soon as another is wanted, for memory that is new to the process costs several times what a
copy does.

Whoever lands receives straight into the memory and hashes what lies there, so each byte of it has one writer at a time. An
order that was given up may have a worker that has not heard of it: where it was landing is *stale*, nothing else lands there,
and such a memfd is not used again.

Not thread-safe: the store calls this under its lock.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field

from valohai_fuse.model import segment
from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store.huge import map_whole
from valohai_fuse.store.landing import MEMORY_NAME
from valohai_fuse.store.opened import OpenSegment

SEGMENTS_MAX = 256
"""Each costs a descriptor, so small objects are bounded by number."""
_MAPPED_BYTES_MIN = 1024 * 1024
"""From this on what is read is not copied (`OpenSegment.lend_blocks`)."""
_FULL_BYTES = segment.PAGE_BYTES + SEGMENT_BYTES

_Place = tuple[ObjectKey, int]


@dataclass(eq=False, slots=True)
class Held:
    """One segment here. To be changed by MemorySegments only."""

    opened: OpenSegment
    bytes_when_full: int
    pins: int = 0
    pins_given_up: int = 0
    """Of those, the ones whose order was given up."""
    stale: Extent | None = None
    """Of the object: where orders were landing that were given up."""
    is_loading: bool = False
    """What its file has is being copied here."""
    is_read: bool = False
    """Read to its end."""
    stands_in: bool = False
    """Its file does not get what is here."""

    @property
    def path(self) -> str:
        """By which a worker of the same user opens it."""
        return f"/proc/{os.getpid()}/fd/{self.opened.fd}"

    def is_free(self, extent: Extent) -> bool:
        """Whether nobody else can be writing there."""
        return not self.is_loading and not (self.stale is not None and self.stale.overlaps(extent))


@dataclass(slots=True)
class MemorySegments:
    """At most `bytes_max` (but always room for one segment) of segments, unless more than that are pinned."""

    bytes_max: int
    bytes_when_full: int = 0
    """What the present segments take at the most."""
    _held: dict[_Place, Held] = field(default_factory=dict)
    """Oldest first."""
    _read: list[_Place] = field(default_factory=list)
    """Those that have been read to their end, in that order."""

    def __post_init__(self) -> None:
        self.bytes_max = max(self.bytes_max, _FULL_BYTES)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: ObjectKey, index: int) -> OpenSegment | None:
        """The segment, or None."""
        held = self._held.get((key, index))
        return None if held is None else held.opened

    def indexes(self, key: ObjectKey) -> list[int]:
        """Which segments of the object are here."""
        return [index for other, index in self._held if other == key]

    def take(
        self,
        key: ObjectKey,
        index: int,
        extent: Extent,
        *,
        stands_in: bool,
        may_replace: bool = False,
    ) -> Held | None:
        """Where a worker lands `extent` of this segment, made if it is not there, and pinned until `release`.

        None, for staging: there is no room, or somebody else may be writing there. Then `may_replace` makes another one, unless
        something lands in the old one; who stands in gets it in any case. Raises OSError.
        """
        held = self._held.get((key, index))
        if held is not None and not stands_in and not held.is_free(extent):
            landings = held.pins - held.pins_given_up - held.is_loading
            if not may_replace or held.stands_in or landings:
                return None
            self._drop((key, index))
            held = None
        if held is None:
            wanted = segment.PAGE_BYTES + segment.segment_bytes(key.size, index)
            fits, used = self._make_room(wanted)
            if not fits and not stands_in:
                return None
            opened = _new_segment(key, index, used)
            held = self._held[key, index] = Held(opened, wanted)
            self.bytes_when_full += wanted
        held.pins += 1
        held.stands_in |= stands_in
        held.is_read = False
        return held

    def take_empty(self, key: ObjectKey, index: int) -> Held | None:
        """A new segment to load this one into, pinned until `release`; None when it is here already, or there is no room.

        Raises OSError.
        """
        if (key, index) in self._held:
            return None
        held = self.take(key, index, Extent(0, 0), stands_in=False)
        if held is not None:
            held.is_loading = True
        return held

    def end_loading(self, held: Held, *, loaded: bool) -> None:
        """Nothing is copied there any more; one into which nothing was goes, unless something lands there."""
        held.is_loading = False
        self.release(held)
        place = (held.opened.key, held.opened.index)
        if not loaded and self._held.get(place) is held and not held.pins and not held.stands_in:
            self._drop(place)

    def holds(self, opened: OpenSegment, *, stands_in: bool = False) -> bool:
        """Whether this is a segment that is still here; with `stands_in`, one whose file does not get its blocks."""
        held = self._held.get((opened.key, opened.index))
        return held is not None and held.opened is opened and (held.stands_in or not stands_in)

    def release(self, held: Held) -> None:
        """Takes one pin back."""
        held.pins -= 1

    def give_up(self, held: Held, extent: Extent) -> None:
        """An order that lands there is given up; its pin stays until `release_given_up`."""
        stale = held.stale or extent
        held.stale = Extent(min(stale.start, extent.start), max(stale.stop, extent.stop))
        held.pins_given_up += 1

    def release_given_up(self, held: Held) -> None:
        """Takes one such pin back."""
        held.pins -= 1
        held.pins_given_up -= 1

    def note_read(self, opened: OpenSegment) -> None:
        """A reader has come to the end of this segment: it goes first from now on."""
        held = self._held.get((opened.key, opened.index))
        if held is not None and held.opened is opened and not held.is_read:
            held.is_read = True
            self._read.append((opened.key, opened.index))

    def drop_staged(self) -> None:
        """Forgets what is staged and not pinned: nobody has streamed for a while, and the memory is better used elsewhere."""
        for place in [place for place, held in self._held.items() if not held.pins and not held.stands_in]:
            self._drop(place)

    def discard(self, key: ObjectKey, index: int) -> None:
        """Forgets one, if it is here."""
        if (key, index) in self._held:
            self._drop((key, index))

    def clear(self) -> None:
        """Forgets all of them."""
        self._held.clear()
        self._read.clear()
        self.bytes_when_full = 0

    def _drop(self, place: _Place) -> Held:
        held = self._held.pop(place)
        self.bytes_when_full -= held.bytes_when_full
        return held

    def _make_room(self, wanted: int) -> tuple[bool, OpenSegment | None]:
        """Forgets segments until `wanted` bytes fit: whether they do, and one of full size whose memory may be used again."""
        if wanted == _FULL_BYTES:
            # Also where there is room: memory that is new costs more than a copy, and what was read is the kernel's to keep.
            for place in self._free_read():
                held = self._held[place]
                if held.bytes_when_full == wanted and not held.stands_in and held.stale is None:
                    return True, self._drop(place).opened
        while self._held and (self.bytes_when_full + wanted > self.bytes_max or len(self._held) >= SEGMENTS_MAX):
            victim = next(iter(self._free_read()), None) or self._oldest()
            if victim is None:
                return False, None
            held = self._drop(victim)
            if held.bytes_when_full == wanted == _FULL_BYTES and held.stale is None:
                return True, held.opened
        return True, None

    def _free_read(self) -> list[_Place]:
        """The segments that have been read to their end and are not pinned, the last one first."""
        self._read = [place for place in self._read if (held := self._held.get(place)) is not None and held.is_read]
        return [place for place in reversed(self._read) if not self._held[place].pins]

    def _oldest(self) -> _Place | None:
        return next((place for place, held in self._held.items() if not held.pins), None)


def _new_segment(key: ObjectKey, index: int, used: OpenSegment | None) -> OpenSegment:
    """A segment without a block, whose header says whose it is; in the memory of `used`, or in new memory."""
    if used is not None:
        fd = os.dup(used.fd)  # the old one is closed with its last reader
        os.set_inheritable(fd, False)
        opened = OpenSegment(fd, key, index, never_waits=True)
        opened.room, opened.mapped = used.room, used.mapped
    else:
        fd = os.memfd_create(MEMORY_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        opened = OpenSegment(fd, key, index, never_waits=True)
        length = segment.PAGE_BYTES + segment.segment_bytes(key.size, index)
        os.ftruncate(fd, length)
        # Workers and we have it mapped: a page that is gone would kill us.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        if length >= _MAPPED_BYTES_MIN:
            opened.room = map_whole(fd, length)
            opened.mapped = opened.room.toreadonly()
    os.pwrite(fd, segment.encode_header(key.stable_id, key.size, index, "") + segment.EMPTY_TABLE, 0)
    return opened
