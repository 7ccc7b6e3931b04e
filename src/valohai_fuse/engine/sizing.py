"""Learns sizes that the manifest does not know: when a file is first looked up, with one small ranged GET.

One probe at a time per file however many look it up; a failure leaves nothing, the next lookup tries again. Each lookup ends
within its deadline. `_probes` changes only on the trio thread, in code that does not await between check and insertion.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from valohai_fuse import errors
from valohai_fuse.engine.leases import Leases
from valohai_fuse.model.retry import GiveUp, Renew, RetryAfter, RetryState
from valohai_fuse.model.tree import Inode, Tree
from valohai_fuse.ports import FetchFailed, FileRef, Lease, Metrics, SizeProbe


class _Probe:
    """One probe under way; its outcome is for all who wait."""

    __slots__ = ("done", "error", "last_failure")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: errors.ReadError | None = None
        self.last_failure = ""
        """In words for a log, until then."""


class Sizing:
    """Fills in the sizes that the tree lacks."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        tree: Tree,
        probe: SizeProbe,
        leases: Leases,
        metrics: Metrics,
        describe: Callable[[Inode], tuple[FileRef, str]],
        timeout_s: float,
    ) -> None:
        self._nursery = nursery
        self._tree = tree
        self._probe = probe
        self._leases = leases
        self._metrics = metrics
        self._describe = describe
        self._timeout_s = timeout_s
        self._probes: dict[Inode, _Probe] = {}

    async def wait_known(self, inode: Inode) -> int:
        """The size of the file in bytes, asked of the store where the tree does not know it. Raises ReadError."""
        size = self._tree.size(inode)
        if size is not None:
            return size
        probe = self._probes.get(inode)
        if probe is None:
            probe = self._probes[inode] = _Probe()
            self._nursery.start_soon(self._run, inode, probe)
        with trio.move_on_after(self._timeout_s):
            await probe.done.wait()
        if probe.error is not None:
            raise type(probe.error)(probe.error.message, hint=probe.error.hint)
        size = self._tree.size(inode)
        if size is None:
            why = f"; the last failure: {probe.last_failure}" if probe.last_failure else ""
            raise errors.DeadlineExceededError(
                f"{self._describe(inode)[1]}: its size was not to be had in {self._timeout_s:g} s{why}"
            )
        return size

    async def _run(self, inode: Inode, probe: _Probe) -> None:
        file, label = self._describe(inode)
        try:
            self._tree.set_size(inode, await self._attempts(file, label, probe))
        except errors.ReadError as error:
            probe.error = error
        except errors.ConfigurationError as error:
            probe.error = errors.AccessRefusedError(error.message, hint=error.hint)
        finally:
            del self._probes[inode]
            probe.done.set()

    async def _attempts(self, file: FileRef, label: str, probe: _Probe) -> int:
        retry = RetryState(random=random.random)
        began = trio.current_time()
        refused: Lease | None = None
        while True:
            lease: Lease | None = None
            failure: FetchFailed | errors.ValohaiFuseError
            try:
                lease = await self._leases.lease(file, refused)
                self._metrics.count("probes")
                return await self._probe.size(lease)
            except (FetchFailed, errors.ReadError, errors.ConfigurationError) as error:
                failure = error
            probe.last_failure = failure.detail if isinstance(failure, FetchFailed) else failure.message
            if isinstance(failure, FetchFailed) and failure.server_date_s is not None:
                self._leases.note_server_date(failure.server_date_s)
            decision = retry.after(
                failure,
                elapsed_s=trio.current_time() - began,
                deadline_s=self._timeout_s,
                lease_age_s=self._leases.age_s(lease) if lease is not None else None,
            )
            if isinstance(decision, GiveUp):
                if lease is not None and decision.error_class is errors.AccessRefusedError:
                    self._leases.note_denied(file, lease)
                kind = (
                    decision.error_class
                    if issubclass(decision.error_class, errors.ReadError)
                    else errors.AccessRefusedError
                )
                raise kind(f"{label}: {decision.message}", hint=decision.hint)
            refused = lease if isinstance(decision, Renew) else None
            if isinstance(decision, RetryAfter):
                await trio.sleep(decision.delay_s)
