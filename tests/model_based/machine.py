"""A reference model of a mount: a dictionary of bytes, and everything that may happen to the real one.

hypothesis calls the rules in any order; each is done to a real mount and to the model, and what the mount says is compared. What
must hold:

- Every read gives exactly the bytes of one version of the object, or an errno that the product page allows in the state that
  the store, the API and the object are in. In the plain state (both up, nothing changed, nothing denied) it gives the bytes.
- Every step ends within the read's deadline and a margin. A probing process takes the steps, so that a hang fails.
- Names and attributes never change and always answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import stat
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.mounts import MountedSandbox, wait_until
from support.prober import Prober
from support.processes import daemon_pid, workers
from valohai_fuse.engine.leases import DENIAL_PAUSE_S
from valohai_fuse.mount import table
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import Ramp, ramp
from valohai_fuse.sandbox.dataset import SandboxFile
from valohai_fuse.sandbox.script import Fault, Rule
from valohai_fuse.sandbox.valohai import Sandbox

MIB: Final = 1024 * 1024
READ_TIMEOUT_S: Final = 3
STEP_TIMEOUT_S: Final = READ_TIMEOUT_S * 2 + 10
"""A large read is several requests of the kernel, each with its own deadline; the first that fails ends it."""
HANDLES_MAX: Final = 6
FAULTS_PENDING_MAX: Final = 3
"""More in a row are no longer passing: the pauses between attempts would use up the time of a read."""
READS_IN_TROUBLE_MAX: Final = 3
"""Each may take the whole time-out; a run that waits finds nothing."""

SIZES: Final = {"a.bin": 20 * MIB + 17, "d/b.bin": 300_001, "d/deep/c.txt": 11, "unknown.bin": 2 * MIB, "empty": 0}
TREE: Final = {"": ["a.bin", "d", "empty", "unknown.bin"], "d": ["b.bin", "deep"], "d/deep": ["c.txt"]}
OF_UNKNOWN_SIZE: Final = {"unknown.bin", "empty"}

TRANSIENT: Final[dict[str, Fault]] = {
    "hang up": faults.hang_up(),
    "reset": faults.reset_after(100_000),
    "cut": faults.truncate_after(70_000),
    "500": faults.internal_error(),
    "502": faults.bad_gateway(),
    "503": faults.throttled(),
    "drip": faults.drip(100_000, 0.01),
    "expire in the body": faults.expire_after(50_000),
    "whole body": faults.ignore_range(),
    "chunked": faults.chunked(),
    "wrong start": faults.wrong_range_start(),
    "no Content-Range": faults.no_content_range(),
    "401": faults.expired(),
}
RENEWAL_FAULTS: Final[dict[str, Fault]] = {
    "500": faults.internal_error(),
    "hang up": faults.hang_up(),
    "half": faults.half_json(),
    "slow": faults.delay(0.5),
    "503": faults.throttled(),
}
SLOW: Final = RENEWAL_FAULTS["slow"].name
REFUSING: Final = frozenset({"401", "expire in the body"})
LOUD_EXPECTED: Final = (
    r"a fetch worker \(pid \d+\) died",
    "ended unexpectedly: killed by signal 9",
    "gave up on ",
    "renew",
    "cache",
    "damaged|verification|segment",
    "the object has changed|has changed in its store|is not what it was",
    "refuse",
)
"""Lines of WARNING and above that these scenarios provoke; a stall, an overdue request or a bug is none of them."""


@dataclass
class _Open:
    """A handle: which versions its reads so far were consistent with, and whether its daemon is gone."""

    name: str
    versions: set[int]
    is_dead: bool = False


@dataclass
class _Object:
    """All versions of an object's bytes, the last being the store's."""

    versions: list[bytes]
    is_denied: bool = False
    handles: list[str] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        return len(self.versions) > 1


class MountMachine(RuleBasedStateMachine):
    """See the module's text. `base` (class attribute) is where the sandboxes go."""

    base = "/nonexistent"

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self.objects: dict[str, _Object] = {}
        self.handles: dict[str, _Open] = {}
        self.inodes: dict[str, int] = {}
        self.uris: dict[str, str] = {}
        self.is_store_up = self.is_api_up = True
        self.was_expired = False
        """URLs were revoked at some time: those of inputs.json, which a new daemon begins with, are among them."""
        self.faults: list[Rule] = []
        self.api_faults: list[Rule] = []
        self.api_was_away_until_s = 0.0
        self.reads_in_trouble = 0
        self.numbers = 0

    @initialize()
    def mount(self) -> None:
        """Mounts."""
        root = tempfile.mkdtemp(dir=self.base)
        self._stack.callback(shutil.rmtree, root, ignore_errors=True)
        files = [
            SandboxFile(name, ramp(size), size="null" if name in OF_UNKNOWN_SIZE else "exact")
            for name, size in SIZES.items()
        ]
        self.sandbox = self._stack.enter_context(Sandbox({"data": files}, root=root))
        options = ("--xattrs", f"--read-timeout={READ_TIMEOUT_S}", "--stall-timeout=2", "--connect-timeout=2")
        self.mounted = MountedSandbox(self.sandbox, options=options, expected_warnings=LOUD_EXPECTED)
        self._stack.enter_context(self.mounted)
        self.prober = self._stack.enter_context(Prober(STEP_TIMEOUT_S))
        self.objects = {name: _Object([self.sandbox.expected_bytes("data", name)]) for name in SIZES}

    def teardown(self) -> None:
        """Everything up again, everything closed, unmounted, and nothing unexpected in the log."""
        if self.objects:
            self.prober.close()
        self._stack.close()

    # --- looking ------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return str(self.mounted.path("data", name))

    @property
    def may_be_refused(self) -> bool:
        """Whether some URL that the daemon holds is refused while no renewal is possible, or one has failed and the next is not
        due yet (`leases.FAILURE_PAUSES_S`, of which the longest are longer than a read here waits)."""
        return self.was_expired and (
            not self.is_api_up
            or any(rule.hits < (rule.count or 0) for rule in self.api_faults)
            or self._last_renewal_failed
        )

    @property
    def _last_renewal_failed(self) -> bool:
        """Whether the API has not answered well since it last answered badly or was away."""
        exchanges = self.sandbox.api.exchanges()
        if not exchanges:
            return self.api_was_away_until_s > 0
        last = exchanges[-1]
        return last.at_s < self.api_was_away_until_s or last.status != 200 or last.fault not in {"", SLOW}

    def _try(self, op: str, **arguments: Any) -> tuple[Any, int]:
        """The value or bytes of a step and 0, or None and its errno."""
        try:
            return self.prober.ask(op, **arguments), 0
        except OSError as error:
            return None, error.errno or 0

    def _is_plain(self, name: str) -> bool:
        obj = self.objects[name]
        return self.is_store_up and not self.may_be_refused and not obj.is_changed and not obj.is_denied

    def _allowed(self, name: str) -> set[int]:
        """The errnos that a read may end with."""
        obj = self.objects[name]
        allowed = set()
        if not self.is_store_up:
            allowed |= {errno.ETIMEDOUT, errno.EIO}
        if self.may_be_refused or obj.is_denied:
            allowed |= {errno.EACCES, errno.ETIMEDOUT, errno.EIO}
        if obj.is_changed:
            allowed |= {errno.ESTALE}
        return allowed

    def _spend(self, name: str) -> bool:
        """Whether a read that may take its whole time may still be made."""
        if self._is_plain(name):
            return True
        self.reads_in_trouble += 1
        return self.reads_in_trouble <= READS_IN_TROUBLE_MAX

    @invariant()
    def names_answer(self) -> None:
        """Each directory lists what it always did."""
        if not self.objects:
            return
        for directory, names in TREE.items():
            assert self.prober.ask("listdir", path=self._path(directory)) == names

    @rule(name=st.sampled_from(sorted(SIZES)))
    def stat(self, name: str) -> None:
        """Size, mode, link count and inode number, for ever the same."""
        if name in OF_UNKNOWN_SIZE and not self._spend(name):
            return
        allowed = self._allowed(name)  # before the step: faults that it uses up have happened to it
        found, failed = self._try("stat", path=self._path(name))
        if failed:
            assert name in OF_UNKNOWN_SIZE, os.strerror(failed)
            assert failed in allowed, os.strerror(failed)
            return
        mode, size, links, inode = found
        assert (stat.S_ISREG(mode), stat.S_IMODE(mode), links) == (True, 0o444, 1)
        assert size in {len(version) for version in self.objects[name].versions}
        if not self.objects[name].is_changed:
            assert size == SIZES[name]
        assert self.inodes.setdefault(name, inode) == inode

    @rule(name=st.sampled_from(sorted(set(SIZES) - OF_UNKNOWN_SIZE)))
    def getxattr(self, name: str) -> None:
        """The uri never changes, and is no secret."""
        uri = self.prober.ask("getxattr", path=self._path(name), attribute="user.valohai.uri")
        assert "?" not in uri
        assert self.uris.setdefault(name, uri) == uri

    @rule(name=st.sampled_from(["nothing", "d/nothing", "a.bin/x"]))
    def missing(self, name: str) -> None:
        """A name that is not there is not there."""
        _, failed = self._try("stat", path=self._path(name))
        assert failed in {errno.ENOENT, errno.ENOTDIR}

    # --- handles ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.handles) < HANDLES_MAX)
    @rule(name=st.sampled_from(sorted(SIZES)), direct=st.booleans())
    def open(self, name: str, direct: bool) -> None:
        """Opens."""
        if name in OF_UNKNOWN_SIZE and not self._spend(name):
            return
        self.numbers += 1
        handle = f"h{self.numbers}"
        allowed = self._allowed(name)
        _, failed = self._try("open", name=handle, path=self._path(name), direct=direct)
        if failed:
            assert failed in allowed, os.strerror(failed)
            return
        self.handles[handle] = _Open(name, set(range(len(self.objects[name].versions))))

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """Closes."""
        self._close(data.draw(st.sampled_from(sorted(self.handles))))

    def _close(self, handle: str) -> None:
        _, failed = self._try("close", name=handle)
        assert not failed or self.handles[handle].is_dead, os.strerror(failed)
        del self.handles[handle]

    @rule(name=st.sampled_from(sorted(SIZES)), data=st.data(), direct=st.booleans())
    def cat(self, name: str, data: st.DataObject, direct: bool) -> None:
        """Opens, reads a piece as it comes, closes."""
        before = set(self.handles)
        self.open(name, direct)
        for handle in set(self.handles) - before:
            self._read(data, handle, "pread")
            self._close(handle)

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), how=st.sampled_from(["pread", "pread", "seek_read", "mmap"]), fresh=st.booleans())
    def read(self, data: st.DataObject, how: str, fresh: bool) -> None:
        """Reads any range; `fresh`: not from the kernel's pages."""
        handle = data.draw(st.sampled_from(sorted(self.handles)))
        if fresh:
            self._try("forget_pages", name=handle)
        self._read(data, handle, how)

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def read_again(self, data: st.DataObject) -> None:
        """Reads, not from the kernel's pages: a rule of its own, so that there is more reading than trouble."""
        self.read(data, "pread", fresh=True)

    def _read(self, data: st.DataObject, handle: str, how: str) -> None:
        opened = self.handles[handle]
        size = SIZES[opened.name]
        start = data.draw(st.integers(0, size + 10))
        length = data.draw(st.one_of(st.integers(1, 5000), st.integers(1, 700_000), st.just(size)))
        if not opened.is_dead and not self._spend(opened.name):
            return
        allowed = self._allowed(opened.name)
        got, failed = self._try(how, name=handle, start=start, size=length)
        if failed:
            self._check_errno(opened, failed, allowed, mapped=how == "mmap")
            return
        matching = {
            number
            for number in opened.versions
            if self.objects[opened.name].versions[number][start : start + length] == got
        }
        assert matching, self._difference(opened, start, length, got)
        if got and start < size:
            opened.versions = matching

    def _check_errno(self, opened: _Open, failed: int, allowed: set[int], *, mapped: bool) -> None:
        allowed = allowed | ({errno.EFAULT} if mapped and allowed else set())
        if opened.is_dead:
            allowed |= {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.EFAULT}
        assert failed in allowed, (
            f"{os.strerror(failed)} of {opened.name} is not in {sorted(allowed)} (store up: {self.is_store_up})"
        )

    def _difference(self, opened: _Open, start: int, length: int, got: bytes) -> str:
        wanted = self.objects[opened.name].versions[min(opened.versions)][start : start + length]
        first = next(
            (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
        )
        return f"{opened.name}: {len(got)} bytes for {len(wanted)}, the first that differs is byte {start + first}"

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    @rule()
    def expire(self) -> None:
        """The store refuses all URLs handed out until now; nobody notices while they can be renewed."""
        self.sandbox.expire_urls()
        self.was_expired = True

    @rule(up=st.booleans())
    def api(self, up: bool) -> None:
        """The API goes or comes back."""
        if up != self.is_api_up:
            (self.sandbox.start_api if up else self.sandbox.stop_api)()
            self.is_api_up = up
            self.api_was_away_until_s = time.monotonic()

    @rule(up=st.booleans())
    def store(self, up: bool) -> None:
        """The store goes or comes back."""
        if up != self.is_store_up:
            (self.sandbox.start_store if up else self.sandbox.stop_store)()
            self.is_store_up = up

    @rule()
    def recover(self) -> None:
        """Everything works again, faults and refusals included: from here on reads succeed at once."""
        self.store(up=True)
        self.api(up=True)
        self.sandbox.store.faults.clear()
        self.faults.clear()
        self.sandbox.api.faults.clear()
        self.api_faults.clear()
        if any(obj.is_denied for obj in self.objects.values()):
            time.sleep(DENIAL_PAUSE_S)  # so long a refusal is believed
        for obj in self.objects.values():
            obj.is_denied = False

    @rule(kind=st.sampled_from(sorted(TRANSIENT)), count=st.integers(1, 3))
    def passing_fault(self, kind: str, count: int) -> None:
        """The next few answers are bad; the reader does not notice."""
        pending = [rule.fault for rule in self.faults for _ in range((rule.count or 0) - rule.hits)]
        if kind in REFUSING:
            count = 1  # a fresh URL that is refused again is a real refusal
            if any(TRANSIENT[other] in pending for other in REFUSING):
                return
        if len(pending) + count > FAULTS_PENDING_MAX:
            return
        self.faults.append(self.sandbox.store.faults.add(TRANSIENT[kind], count=count))
        self.was_expired |= kind in REFUSING

    @rule(kind=st.sampled_from(sorted(RENEWAL_FAULTS)), count=st.integers(1, 2))
    def renewal_fails(self, kind: str, count: int) -> None:
        """The API's next answers are bad: a read may fail of it, and the next one is none the worse."""
        self.api_faults.append(self.sandbox.api.faults.add(RENEWAL_FAULTS[kind], count=count))

    @rule(name=st.sampled_from(sorted(SIZES)))
    def revoke(self, name: str) -> None:
        """The store denies one object from now on, whatever the URL."""
        self.sandbox.store.faults.add(faults.denied(), path=f"*{name}", count=None)
        self.objects[name].is_denied = True

    @rule(name=st.sampled_from(["a.bin", "d/b.bin", "unknown.bin"]), growth=st.sampled_from([0, 0, 1, -1]))
    def change(self, name: str, growth: int) -> None:
        """Somebody overwrites the object, with as many bytes or not."""
        obj = self.objects[name]
        if len(obj.versions) < 3:
            shift = 7 * len(obj.versions)
            self.sandbox.replace_object("data", name, Ramp(SIZES[name] + growth, shift))
            obj.versions.append(self.sandbox.expected_bytes("data", name))
            for opened in self.handles.values():
                if opened.name == name:
                    opened.versions.add(len(obj.versions) - 1)

    # --- the cache and the processes ----------------------------------------------------------------------------------

    def _segments(self) -> list[Path]:
        found = [path for path in Path(self.mounted.cache_dir).rglob("*") if path.is_file() and path.stat().st_size > 0]
        return sorted(found)

    @rule(seed=st.integers(0, 1000))
    def evict(self, seed: int) -> None:
        """Somebody removes a file of the cache."""
        if segments := self._segments():
            random.Random(seed).choice(segments).unlink(missing_ok=True)

    @rule(seed=st.integers(0, 1000), how=st.sampled_from(["flip", "flip", "cut", "zero"]))
    def damage(self, seed: int, how: str) -> None:
        """A bit flips, a file is cut, a page is lost."""
        if not (segments := self._segments()):
            return
        dice = random.Random(seed)
        path = dice.choice(segments)
        size = path.stat().st_size
        if how == "cut":
            os.truncate(path, dice.randrange(size))
            return
        with path.open("r+b") as file:
            where = dice.randrange(size)
            file.seek(where)
            before = file.read(4096 if how == "zero" else 1)
            file.seek(where)
            file.write(bytes(len(before)) if how == "zero" else bytes([before[0] ^ 1 << dice.randrange(8)]))

    @rule()
    def kill_worker(self) -> None:
        """The fetch workers die."""
        for pid in workers(daemon_pid(self.mounted, "data")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @rule()
    def kill_daemon(self) -> None:
        """The daemon dies; `mount` mends it; handles from before fail for good."""
        os.kill(daemon_pid(self.mounted, "data"), signal.SIGKILL)
        wait_until("the mount is dead", lambda: table.answers(self._path("")) is False)
        mended = self.mounted.mount()
        assert mended.returncode == 0, mended.stderr
        for opened in self.handles.values():
            opened.is_dead = True

    @rule()
    def remount(self) -> None:
        """An orderly end and a new beginning, with what is cached."""
        for handle in sorted(self.handles):
            self._close(handle)
        ended = self.mounted.unmount()
        assert ended.returncode == 0, ended.stderr
        mended = self.mounted.mount()
        assert mended.returncode == 0, mended.stderr


def unexpected(log: str) -> list[str]:
    """Lines that no scenario excuses."""
    return [line for line in log.splitlines() if re.search("stood still|has been under way for|Traceback", line)]
