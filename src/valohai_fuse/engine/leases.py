"""Which URL to use for a file now, and when to ask Valohai for new ones.

A lease comes from the manifest first, from the latest renewal of its input afterwards. The trade-off: renewing too often
costs Valohai 100 MB answers, too late costs a reader a refusal and a wait. So a lease is handed out while it has a margin of life
left; within the margin it is still handed out and the renewal runs in the background; only in its last seconds, or when
it was refused, does the caller wait. The margin shrinks to a quarter of a short URL's whole life, so that a URL which lives
for less than the margin does not cause a renewal on each request.

Concurrency. All state is changed on the trio thread, between awaits:
- `_Input.pending` is the one POST of an input under way. It is set by `_start` and cleared by `_renew`, nowhere else; whoever
  finds it set waits for its event. It runs in the nursery given, so that a waiter may be cancelled without failing the others.
- `_Input.renewal` and `.generation` change only in `_renew`, together. What was looked up before an await is looked up again after.
- A failed POST goes to all its waiters; the next one starts after a pause, which whoever comes in the meantime waits out
  (a dead token is answered at once instead: waiting does not cure it).
- A URL in `_refused` is never handed out again, whichever answer repeats it.

Instants of the wall clock come from the injected clock, corrected by what stores say in their Date header (`note_server_date`),
because expiry is by the store's clock. Waiting is on trio's clock. Must not know HTTP, nor how Valohai is asked.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections import deque
from dataclasses import dataclass
from typing import Final

import cachetools
import trio

from valohai_fuse.errors import (
    AccessRefusedError,
    ConfigurationError,
    ReadError,
    StoreUnavailableError,
    UnsupportedLocationError,
    ValohaiFuseError,
)
from valohai_fuse.model import urls
from valohai_fuse.model.expiry import expires_at_s, signed_at_s
from valohai_fuse.ports import Clock, FileRef, Lease, Renewal, UrlSource

LAST_SECONDS_S: Final = 5.0
"""Less life than this is too little to start a transfer with: the caller waits for the renewal."""
PROACTIVE_PAUSE_S: Final = 1.0
"""Nothing is renewed ahead of need sooner than this after the last renewal, whatever the URLs say of their lives."""
DENIAL_PAUSE_S: Final = 5.0
"""For how long a real denial (of a token, or of one file) is answered without asking Valohai again."""
FAILURE_PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Between failed POSTs; the source has retried within each already."""
SKEW_SAMPLES: Final = 9
SKEW_WORTH_A_WARNING_S: Final = 60.0
REFUSED_MAX: Final = 65_536
HELD_MAX: Final = 8192

log = logging.getLogger(__name__)

_InputKey = tuple[str, str | None]
_FileKey = tuple[str, str | None, int]


@dataclass(frozen=True, slots=True)
class LeaseStatistics:
    """A snapshot for status and tests. `renewing` counts POSTs under way, `waiting` the callers that wait for one."""

    renewals: int
    renewals_failed: int
    renewing: int
    waiting: int
    refused: int
    denied: int
    clock_skew_s: float | None


class _Standing(enum.Enum):
    GOOD = "more than the margin left, or it says nothing of its expiry"
    CLOSING = "within the margin"
    LAST_SECONDS = "valid, but hardly"
    EXPIRED = "expired by its own words"


@dataclass(frozen=True, slots=True)
class _Held:
    """A lease with the instant that its life is counted from (by the store's clock when signed, else by ours)."""

    lease: Lease
    generation: int
    signed_at_s: float | None


@dataclass(slots=True)
class _Pending:
    done: trio.Event
    failure: ValohaiFuseError | None


@dataclass(slots=True)
class _Failure:
    error: ValohaiFuseError
    until_t: float
    in_a_row: int


@dataclass(slots=True)
class _Input:
    """What is known of one input's URLs; see the rules at the top for who may change what."""

    name: str
    renewal: Renewal | None = None
    generation: int = 0
    renewed_at_t: float = float("-inf")
    pending: _Pending | None = None
    failure: _Failure | None = None
    posts: int = 0


class Leases:
    """`source` None: there is no api.json (its place, `api_path`, is named when a renewal would have needed it)."""

    def __init__(
        self,
        source: UrlSource | None,
        *,
        nursery: trio.Nursery,
        clock: Clock,
        margin_s: float = 60.0,
        api_path: str = "api.json",
    ) -> None:
        self._source = source
        self._nursery = nursery
        self._clock = clock
        self._margin_s = margin_s
        self._api_path = api_path
        self._began_at_s = clock()
        self._inputs: dict[_InputKey, _Input] = {}
        self._held: cachetools.LRUCache[_FileKey, _Held] = cachetools.LRUCache(HELD_MAX)
        self._refused: cachetools.FIFOCache[int, None] = cachetools.FIFOCache(REFUSED_MAX)
        self._denials: cachetools.LRUCache[_FileKey, _Failure] = cachetools.LRUCache(HELD_MAX)
        self._skews_s: deque[float] = deque(maxlen=SKEW_SAMPLES)
        self._skew_s = 0.0
        self._skew_told = False
        self._renewals = self._renewals_failed = self._waiting = self._refusals = self._denied = 0

    # --- what the engine asks and tells -------------------------------------------------------------------------------

    async def lease(self, file: FileRef, refused: Lease | None = None) -> Lease:
        """A URL for `file` that is not `refused` (nor any refused before), with life enough to start a transfer.

        Waits for Valohai only where there is no such URL at hand; any number of callers wait for one POST per input. May be
        cancelled at any time.

        Raises AccessRefusedError (Valohai refuses, or gives nothing but what was refused), StoreUnavailableError (Valohai does
        not answer now: try again), UnsupportedLocationError (nothing that can be fetched), ConfigurationError (no api.json).
        """
        if refused is not None:
            self.note_refused(refused)
        input_ = self._input(file)
        while True:
            held = self._look_up(file, input_)
            standing = self._standing(held) if held else _Standing.EXPIRED
            if held is not None and standing is _Standing.GOOD:
                return held.lease
            if held is not None and standing is _Standing.CLOSING:
                self._renew_ahead(file, input_)
                return held.lease
            if held is not None and standing is _Standing.LAST_SECONDS:
                await self._wait_briefly(held, file, input_)
                held = self._look_up(file, input_)
                if held is not None and self._standing(held) is not _Standing.EXPIRED:
                    return held.lease
                continue
            if held is not None and self._source is None and not self._skews_s:
                return (
                    held.lease
                )  # expired by our clock alone, which may be wrong, and nobody to ask: let the store say it
            self._raise_if_denied(file)
            posts = input_.posts
            await self._wait_renewed(file, input_)
            held = self._look_up(file, input_)
            unusable = held is None or self._standing(held) is _Standing.EXPIRED
            if unusable and input_.posts > posts:  # and not an answer to what was asked before we came
                raise self._deny(file, self._nothing_usable(file, input_))

    def note_refused(self, lease: Lease) -> None:
        """A store refused this URL: it is not handed out again."""
        self._refusals += 1
        self._refused[hash(lease.url)] = None

    def note_denied(self, file: FileRef, lease: Lease) -> None:
        """The same, and the URL had been renewed for this very request: Valohai is not asked again for a few seconds."""
        self.note_refused(lease)
        self._deny(file, AccessRefusedError(f"{_named(file)}: the store refuses it, also with a renewed URL"))

    def note_server_date(self, server_date_s: float) -> None:
        """A store's Date header (epoch seconds): the median of the last few says by how much our clock is off."""
        self._skews_s.append(server_date_s + 0.5 - self._clock())  # the header has whole seconds, cut off
        self._skew_s = sorted(self._skews_s)[len(self._skews_s) // 2]
        if abs(self._skew_s) > SKEW_WORTH_A_WARNING_S and not self._skew_told:
            self._skew_told = True
            side = "behind" if self._skew_s > 0 else "ahead of"
            log.warning(
                "the clock of this machine is %.0f s %s the store's; reckoning with it", abs(self._skew_s), side
            )

    def age_s(self, lease: Lease) -> float | None:
        """How long ago we received this URL; None for one from the manifest. What `RetryState.after` wants."""
        return None if lease.minted_at_s is None else max(0.0, self._clock() - lease.minted_at_s)

    def statistics(self) -> LeaseStatistics:
        """A frozen snapshot."""
        return LeaseStatistics(
            renewals=self._renewals,
            renewals_failed=self._renewals_failed,
            renewing=sum(input_.pending is not None for input_ in self._inputs.values()),
            waiting=self._waiting,
            refused=self._refusals,
            denied=self._denied,
            clock_skew_s=self._skew_s if self._skews_s else None,
        )

    # --- what is at hand ----------------------------------------------------------------------------------------------

    def _input(self, file: FileRef) -> _Input:
        key = (file.input_name, file.input_id)
        input_ = self._inputs.get(key)
        if input_ is None:
            input_ = self._inputs[key] = _Input(file.input_name)
        return input_

    def _look_up(self, file: FileRef, input_: _Input) -> _Held | None:
        """The newest URL known for `file` that was not refused; expired or not."""
        key = (file.input_name, file.input_id, file.index)
        held = self._held.get(key)
        if held is None or held.generation != input_.generation:
            held = self._from_renewal(file, input_) or self._from_manifest(file, input_)
            if held is None:
                return None
            self._held[key] = held
        return None if hash(held.lease.url) in self._refused else held

    def _from_renewal(self, file: FileRef, input_: _Input) -> _Held | None:
        url = input_.renewal.url_for(file) if input_.renewal is not None else None
        if input_.renewal is None or url is None or not urls.supported(url):
            return None
        lease = Lease(url, expires_at_s=expires_at_s(url), minted_at_s=input_.renewal.minted_at_s)
        return _Held(lease, input_.generation, None)

    def _from_manifest(self, file: FileRef, input_: _Input) -> _Held | None:
        url = urls.first_supported(file.storage_uri, file.uri)
        if url is None:
            return None
        return _Held(Lease(url, expires_at_s=expires_at_s(url)), input_.generation, signed_at_s(url))

    def _standing(self, held: _Held) -> _Standing:
        lease = held.lease
        if lease.expires_at_s is None:
            return _Standing.GOOD
        now_s = self._clock() + self._skew_s
        began_s = held.signed_at_s
        if began_s is None:
            began_s = self._skew_s + (self._began_at_s if lease.minted_at_s is None else lease.minted_at_s)
        life_s = lease.expires_at_s - began_s
        if life_s <= 0 and lease.minted_at_s is not None:
            return _Standing.GOOD  # it came dead, by our reckoning: then our reckoning is off, and the store decides
        left_s = lease.expires_at_s - now_s
        margin_s = min(self._margin_s, max(life_s, 0.0) / 4)
        if left_s <= 0:
            return _Standing.EXPIRED
        if left_s > margin_s:
            return _Standing.GOOD
        return _Standing.CLOSING if left_s > min(LAST_SECONDS_S, margin_s / 4) else _Standing.LAST_SECONDS

    # --- renewing -----------------------------------------------------------------------------------------------------

    def _renew_ahead(self, file: FileRef, input_: _Input) -> None:
        """Starts a renewal that nobody waits for, unless one is under way, just done, or just failed."""
        now_t = trio.current_time()
        paused = input_.failure is not None and now_t < input_.failure.until_t
        if self._source and not input_.pending and not paused and now_t >= input_.renewed_at_t + PROACTIVE_PAUSE_S:
            self._start(self._source, file, input_)

    async def _wait_briefly(self, held: _Held, file: FileRef, input_: _Input) -> None:
        """Waits for a renewal, but leaves time to use what is held, and lets failures pass: it is still valid."""
        if input_.failure is not None and trio.current_time() < input_.failure.until_t:
            return
        left_s = (held.lease.expires_at_s or 0.0) - self._clock() - self._skew_s
        with trio.move_on_after(left_s / 2), contextlib.suppress(ValohaiFuseError):
            await self._wait_renewed(file, input_)

    async def _wait_renewed(self, file: FileRef, input_: _Input) -> None:
        """Waits for the renewal under way, or for one that it starts; past the pause after a failure."""
        self._waiting += 1
        try:
            while True:
                if input_.pending is None:
                    if self._source is None:
                        raise self._no_source(file)
                    pause_s = input_.failure.until_t - trio.current_time() if input_.failure else 0.0
                    if input_.failure is not None and pause_s > 0:
                        if not isinstance(input_.failure.error, StoreUnavailableError):
                            raise _again(self._blamed(file, input_.failure.error))
                        await trio.sleep(pause_s)
                        continue  # another waiter may have begun meanwhile
                    self._start(self._source, file, input_)
                pending = input_.pending
                assert pending is not None
                await pending.done.wait()
                if pending.failure is not None:
                    raise _again(self._blamed(file, pending.failure))
                return
        finally:
            self._waiting -= 1

    def _start(self, source: UrlSource, file: FileRef, input_: _Input) -> None:
        input_.pending = _Pending(trio.Event(), StoreUnavailableError("the renewal was cancelled"))
        input_.posts += 1
        self._nursery.start_soon(self._renew, source, file, input_, input_.pending, name=f"renew {input_.name}")

    async def _renew(self, source: UrlSource, file: FileRef, input_: _Input, pending: _Pending) -> None:
        """The one POST. Ends by clearing `pending` and waking all who wait, however it ends."""
        try:
            renewal = await source.renew(file)
        except ValohaiFuseError as error:
            self._renewal_failed(input_, pending, error)
        except Exception as error:  # a bug in a source fails these reads, not the mount
            log.exception("input %s: the renewal of its URLs failed unexpectedly", input_.name)
            self._renewal_failed(input_, pending, ReadError(f"renewal failed: {type(error).__name__}"), told=True)
        else:
            if input_.failure is not None:
                log.info("input %s: its URLs are renewed again", input_.name)
            input_.renewal, input_.failure = renewal, None
            input_.generation += 1
            input_.renewed_at_t = trio.current_time()
            self._renewals += 1
            pending.failure = None
        finally:
            input_.pending = None
            pending.done.set()

    def _renewal_failed(
        self, input_: _Input, pending: _Pending, error: ValohaiFuseError, *, told: bool = False
    ) -> None:
        in_a_row = input_.failure.in_a_row + 1 if input_.failure else 1
        transient = isinstance(error, StoreUnavailableError)
        pause_s = FAILURE_PAUSES_S[min(in_a_row, len(FAILURE_PAUSES_S)) - 1] if transient else DENIAL_PAUSE_S
        input_.failure = _Failure(error, trio.current_time() + pause_s, in_a_row)
        pending.failure = error
        self._renewals_failed += 1
        if in_a_row == 1 and not told:
            log.warning("input %s: its URLs could not be renewed: %s", input_.name, error.message)

    # --- what to say when there is nothing to give --------------------------------------------------------------------

    def _raise_if_denied(self, file: FileRef) -> None:
        denial = self._denials.get((file.input_name, file.input_id, file.index))
        if denial is not None and trio.current_time() < denial.until_t:
            raise _again(denial.error)

    def _deny(self, file: FileRef, error: ValohaiFuseError) -> ValohaiFuseError:
        self._denied += 1
        key = (file.input_name, file.input_id, file.index)
        self._denials[key] = _Failure(error, trio.current_time() + DENIAL_PAUSE_S, 1)
        return _again(error)

    def _nothing_usable(self, file: FileRef, input_: _Input) -> ValohaiFuseError:
        url = input_.renewal.url_for(file) if input_.renewal is not None else None
        if url is None:
            located = self._located_elsewhere(file, "and Valohai's answer holds no URL for it")
            return located or AccessRefusedError(f"{_named(file)}: Valohai's answer holds no URL for it")
        reason = urls.unsupported_reason(url)
        if reason is not None:
            return UnsupportedLocationError(f"{_named(file)}: {reason} (Valohai gave no https URL)", hint=_ROLES_HINT)
        return AccessRefusedError(f"{_named(file)}: Valohai repeats a URL that the store refuses")

    def _no_source(self, file: FileRef) -> ValohaiFuseError:
        located = self._located_elsewhere(file, f"and there is no {self._api_path} to ask Valohai for another")
        return located or ConfigurationError(
            f"{_named(file)}: it needs a new URL, but {self._api_path} is missing",
            hint="Valohai writes api.json next to inputs.json; it is needed once signed URLs have expired",
        )

    def _blamed(self, file: FileRef, error: ValohaiFuseError) -> ValohaiFuseError:
        """For a file that never had a URL to fetch, its location is the cause, not that Valohai refuses another."""
        if isinstance(error, StoreUnavailableError):
            return error
        return self._located_elsewhere(file, f"and Valohai gave no other: {error.message}") or error

    @staticmethod
    def _located_elsewhere(file: FileRef, why: str) -> UnsupportedLocationError | None:
        reason = urls.obstacle(file.storage_uri, file.uri)
        if reason is None:
            return None
        return UnsupportedLocationError(f"{_named(file)}: {reason}, {why}", hint=_ROLES_HINT)


_ROLES_HINT: Final = "inputs behind machine roles need Valohai to hand out signed https URLs"


def _named(file: FileRef) -> str:
    return f"{file.input_name}/{file.name}"


def _again(error: ValohaiFuseError) -> ValohaiFuseError:
    """A copy to raise: one instance raised by many tasks would gather their tracebacks."""
    return type(error)(error.message, hint=error.hint)
