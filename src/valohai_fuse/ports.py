"""The seams between the rooms: Protocols, and the frozen messages that cross them.

The engine is written against these and nothing else; adapters (`sources`, `fetch`, `store`) implement them and never import
one another. One suite per port in `tests/contracts` runs on the fake and on the real one.

All extents are half-open byte ranges of an object. Instants named `..._at_s` are seconds of the wall clock (Unix epoch);
everything inside trio waits on trio's own clock.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

from valohai_fuse.model.extents import Extent
from valohai_fuse.model.failure import FailureKind, FetchFailed
from valohai_fuse.model.file_ref import FileRef

__all__ = [
    "ABSENT",
    "COLD",
    "FOREIGN",
    "BlockStore",
    "Clock",
    "FailureKind",
    "FetchFailed",
    "FetchOrder",
    "Fetched",
    "Fetcher",
    "FileRef",
    "Landed",
    "LandingPlace",
    "Lease",
    "Metrics",
    "NotHere",
    "ObjectKey",
    "Priority",
    "Renewal",
    "SizeProbe",
    "UrlSource",
    "Version",
]

Clock = Callable[[], float]
"""Seconds since the epoch by the wall clock; injected, so that tests can jump."""


# --- what is fetched, and from where ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """What an object *is*, never where it is: datum id or query-less URI, and its size. Names its segments in the cache.

    The ETag is not part of the key, for it is not known before the first answer, and a warm cache must serve without a
    network. It is the object's *version*: written into every segment, and bytes of two versions never meet in one open
    file (see `engine.objects`).
    """

    stable_id: str
    size: int


Version = str
"""An ETag exactly as the store sent it; "" when the store sends none."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A URL that may be used for one object until `expires_at_s` (None: it says nothing, the store's refusal decides)."""

    url: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    expires_at_s: float | None = None
    minted_at_s: float | None = None
    """When we received it; a refusal of a URL minted for this very request is a real one. None: from the manifest."""


class UrlSource(Protocol):
    """One object in, one lease out. May be slow, caches nothing, is asked by `engine.leases` only.

    Answering for a whole input at once is the rule (`renew`); the returned mapping is asked by `FileRef`.
    """

    async def renew(self, file: FileRef) -> Renewal:
        """A fresh set of URLs that covers `file`, or whatever else the answer held.

        Raises AccessRefusedError (token dead, execution over), StoreUnavailableError (API down beyond the bounded
        retries, answer not understood), ConfigurationError (api.json missing or invalid).
        """
        ...


class Renewal(Protocol):
    """One answer of a UrlSource; kept by the leases until the next one replaces it."""

    @property
    def minted_at_s(self) -> float:
        """When the answer came, by the wall clock."""
        ...

    def url_for(self, file: FileRef) -> str | None:
        """The signed URL of `file` in this answer; None when the answer does not hold it."""
        ...


class SizeProbe(Protocol):
    """Learns the size of an object with one small ranged GET."""

    async def size(self, lease: Lease) -> int:
        """Total bytes of the object. Raises FetchFailed."""
        ...


# --- fetching ---------------------------------------------------------------------------------------------------------


class Priority(enum.IntEnum):
    """Who is waiting: demand always overtakes ahead."""

    DEMAND = 0
    AHEAD = 1


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """Land `extent` of an object in the segment file at `segment_path`. The extent is block-aligned (the object's end
    excepted) and lies within one segment."""

    key: ObjectKey
    extent: Extent
    lease: Lease
    expect_version: Version | None
    """None: not known yet, take what the response says."""
    segment_path: str
    priority: Priority = Priority.DEMAND
    awaited_upto: int = 0
    """A reader waits for everything below; 0: nobody waits yet. Worth landing and telling at once when it is there."""
    turn: int = 0
    """Among orders of one priority the lowest goes first."""
    staging_path: str = ""
    """Where the blocks land first, in memory, for readers to find them there; `segment_path` gets them behind the readers'
    backs, or not at all if its disk cannot keep up. "": they land at `segment_path` itself."""


@dataclass(frozen=True, slots=True)
class Landed:
    """Everything of the order below `upto` is in the segment file (or its staging), verified by hash entries, readable."""

    upto: int
    version: Version


@dataclass(frozen=True, slots=True)
class Fetched:
    """How an order went."""

    version: Version
    fetched_bytes: int
    first_byte_s: float
    """From sending the request to the first byte of the body."""
    total_s: float
    new_connection: bool
    disk_wait_s: float = 0.0
    """How long landing it waited for the disk."""
    is_kept: bool = True
    """Whether all of it is at `segment_path`; False only for a staged order."""
    disk_error: str = ""
    """Why it is not, if the disk refused it; "" when the disk was only too slow."""


class Fetcher(Protocol):
    """Carries out orders. Returns no bytes, holds no standing secret, decides no retry."""

    async def fetch(self, order: FetchOrder, landed: Callable[[Landed], None]) -> Fetched:
        """Lands the extent in ascending order, calling `landed` (synchronously, on the trio thread) as it grows.

        Raises FetchFailed; what was reported as landed stays landed. Cancelling the caller cancels the transfer.
        """
        ...

    def promote(self, order: FetchOrder) -> None:
        """Somebody now waits for this AHEAD order (the object given to `fetch`): it no longer queues behind demand."""
        ...


# --- the block cache --------------------------------------------------------------------------------------------------


class NotHere(enum.Enum):
    """Why `read_nowait` has no bytes."""

    ABSENT = "absent"  # some block is missing or failed its verification
    COLD = "cold"  # all there, but not in the page cache: use `read`
    FOREIGN = "foreign"  # the segment holds another version of the object


ABSENT: Final = NotHere.ABSENT
COLD: Final = NotHere.COLD
FOREIGN: Final = NotHere.FOREIGN


@dataclass(frozen=True, slots=True)
class LandingPlace:
    """Where one fetch lands; the fields are those of `FetchOrder`."""

    segment_path: str
    staging_path: str = ""


class BlockStore(Protocol):
    """Blocks on disk. What it returns was verified on this very read; absence is normal at any moment; nothing raises on a
    sick disk, it is absence (and a WARNING)."""

    def read_nowait(
        self, key: ObjectKey, version: Version, extent: Extent, *, lend: bool = False
    ) -> bytes | bytearray | memoryview | NotHere:
        """The bytes of `extent` (any alignment, any segments) without ever waiting for a disk. `lend`: they may lie in memory
        that is used again, and are good until the caller awaits anything."""
        ...

    async def read(self, key: ObjectKey, version: Version, extent: Extent) -> bytes | bytearray | memoryview | NotHere:
        """The same, waiting for the disk in a thread where it must; never answers COLD."""
        ...

    def expect(self, key: ObjectKey) -> bool:
        """Somebody has opened the object, or is about to, and is likely to read from its start on: if that is on the disk, the disk
        is asked for it now, and `read_nowait` has it soon. Does not wait for that. True: all of the first segment seems to be
        there, by what its file occupies; False: that is not known, `missing` tells."""
        ...

    def expect_read(self, key: ObjectKey, extent: Extent) -> None:
        """The same for `extent`, whole blocks, of which `missing` has said that they are present: somebody who jumps will come
        there."""
        ...

    async def load(self, key: ObjectKey, version: Version, offset: int) -> bool:
        """Has the blocks of the segment that holds byte `offset`, which somebody is about to read in order, brought from the
        disk to memory, from where `read_nowait` gives them, unless they are there. False: that is no use, or cannot be done, or
        some blocks are missing; read, or fetch, them then."""
        ...

    def missing(self, key: ObjectKey, version: Version, extent: Extent, *, to_keep: bool = False) -> list[Extent]:
        """The block-aligned parts of `extent` that are not present, merged and ascending. By the tables only, without
        verification; a wrong guess costs a fetch or a retry, never a wrong byte. `to_keep`: what is in memory only, on its
        way to the disk at best, does not count as present."""
        ...

    def version(self, key: ObjectKey, offset: int) -> Version | None:
        """The version that the segment holding byte `offset` was written with; None when there is no such segment."""
        ...

    def landing(
        self, key: ObjectKey, extent: Extent, *, ahead: bool, staged: bool = False, to_keep: bool = False
    ) -> AbstractAsyncContextManager[LandingPlace | None]:
        """The place for one fetch of `extent` (within one segment), which lasts as long as the block: room for it is taken
        before it begins. May wait, bounded, until there is some. None: there is none for what nobody waits for (`ahead`);
        what somebody waits for gets a place in any case. `staged`: somebody is about to read it, once; the store may
        choose a place with staging. `to_keep`: it is fetched to lie on the disk, which may take its time; None while that
        takes nothing."""
        ...

    def note_landed(self, byte_count: int, disk_wait_s: float) -> None:
        """A fetch has landed that much and waited that long for the disk: one that holds fetches up is used less."""
        ...

    def note_passed_by(self, byte_count: int) -> None:
        """So much was staged and never written, because the disk could not keep up."""
        ...

    def claim(self, key: ObjectKey, extent: Extent) -> bool:
        """Tells other processes that `extent` (within one segment) is being fetched here; False: one of them is fetching some
        of it. Advice only: whoever waits for the other does so for a bounded time."""
        ...

    def unclaim(self, key: ObjectKey, extent: Extent) -> None:
        """Takes a claim back."""
        ...

    def landing_failed(self, key: ObjectKey, offset: int, detail: str) -> None:
        """A worker could not write there (`FailureKind.DISK`): the store finds another place, in memory if need be."""
        ...

    def cached_bytes(self, key: ObjectKey) -> int:
        """How many bytes of the object are present, by the tables of its segments."""
        ...


class Metrics(Protocol):
    """Counters and gauges by name; see `obs.metrics` for the names."""

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter."""
        ...

    def gauge(self, name: str, value: float) -> None:
        """Sets a gauge."""
        ...
