"""The loop of `tests/faults/test_fault_loop.py`: one mount with a file for each fault, at each of its opportunities.

As SQLite does it: a fault happens at the first request of a read, then at the second, and so on, until a run had no such
request and so was clean. Each run has a file of its own, which nobody has read before, and each kind of fault at the API an
input of its own, so that runs go on side by side and none sees another's fault.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support import at_rest
from support.fault_kinds import API_KINDS, RIGHT, STORE_KINDS, FaultKind, Outcomes, Surroundings
from support.mounts import MountedSandbox, wait_until
from support.reader_process import Extents, Readers, ReadOutcome, digest_of
from support.tls_hosts import TlsHosts
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import Ramp, read_all
from valohai_fuse.sandbox.dataset import SandboxFile, SandboxInput
from valohai_fuse.sandbox.script import Rule
from valohai_fuse.sandbox.signing import Form
from valohai_fuse.sandbox.valohai import Sandbox

SIZE_BYTES: Final = 9_000_000
"""Two segments, so that one read of it is several orders."""
EXTENTS: Final = ((0, 100_000), (5_000_000, 5_100_000), (SIZE_BYTES - 50_000, SIZE_BYTES))
READ_TIMEOUT_S: Final = 5.0
SLACK_S: Final = 5.0
"""A read may end this much after its deadline: the machine may be busy."""
AT_REST_S: Final = 45.0
"""A fetch that nobody waits for any more may still wait for the API, which is asked for 30 s at the most."""
OPPORTUNITIES_MAX: Final = 12
SIDE_BY_SIDE: Final = 64
OPTIONS: Final = (
    f"--read-timeout={READ_TIMEOUT_S}",
    "--stall-timeout=2",
    "--connect-timeout=2",
    "--connections=128",
    "--log-level=DEBUG",
)


@dataclass(frozen=True, slots=True)
class Thoroughness:
    """How much of the loop: `always` at the first so many opportunities; `api_patience_s` for the API to be well again; which
    parts of each file are read."""

    always_opportunities: int
    api_always_opportunities: int
    api_patience_s: float
    readahead: str = "0"
    """With readahead a fault may also meet a request that nobody waits for."""
    extents: Extents = EXTENTS
    lengthy: bool = True


def store_input(kind: FaultKind) -> str:
    """The input of all runs of one kind."""
    return f"store-{STORE_KINDS.index(kind)}"


def api_input(kind: FaultKind, run: str) -> str:
    """The input of one run."""
    return f"api-{API_KINDS.index(kind)}-{run}"


def inputs(thoroughness: Thoroughness) -> dict[str, SandboxInput]:
    """The data set that the loop needs."""
    made = {"healthy": SandboxInput([SandboxFile("0.bin", Ramp(SIZE_BYTES))])}
    for kind in STORE_KINDS:
        once = [f"once-{nth}.bin" for nth in range(1, OPPORTUNITIES_MAX + 1)]
        always = [f"always-{nth}.bin" for nth in range(1, thoroughness.always_opportunities + 1)]
        files = [SandboxFile(name, Ramp(SIZE_BYTES)) for name in (*once, *always)]
        files += [SandboxFile(f"probe-{run}.bin", Ramp(SIZE_BYTES), size="null") for run in ("once", "always")]
        made[store_input(kind)] = SandboxInput(files)
    for kind in API_KINDS:
        runs = [f"once-{nth}" for nth in range(1, OPPORTUNITIES_MAX + 1)]
        runs += [f"always-{nth}" for nth in range(1, thoroughness.api_always_opportunities + 1)]
        for run in runs:
            made[api_input(kind, run)] = SandboxInput([SandboxFile("0.bin", Ramp(SIZE_BYTES))])
    return made


def forms() -> dict[str, Form]:
    """How the URLs of each input are signed."""
    return {store_input(kind): kind.form for kind in STORE_KINDS}


@dataclass
class FaultLoop:
    """One run of the loop over a mount; `problems` holds a line for each promise that was not kept."""

    sandbox: Sandbox
    mounted: MountedSandbox
    root: Path
    readers: Readers
    thoroughness: Thoroughness
    tls: TlsHosts
    problems: list[str] = field(default_factory=list)
    runs: int = 0
    hits: int = 0
    _right: str = ""
    _told: list[tuple[str, str, int, str]] = field(default_factory=list)
    """What failed: its name, the file, the errno, and what the log must say of it."""
    _longest_s: float = 0.0

    def __post_init__(self) -> None:
        self.surroundings = Surroundings(self.sandbox, self.tls)
        # The first look-up may probe, then each MiB is a read with a deadline of its own.
        reads = 1 + sum(-(-(stop - start) // (1 << 20)) for start, stop in self.thoroughness.extents)
        self._longest_s = reads * READ_TIMEOUT_S + 2 * SLACK_S
        content = Ramp(SIZE_BYTES)
        self._right = digest_of(*(read_all(content, start, stop) for start, stop in self.thoroughness.extents))

    def run(self) -> None:
        """All kinds, then what holds after them."""
        together = [*self._store_runs(alone=False), *self._api_runs(alone=False)]
        with ThreadPoolExecutor(SIDE_BY_SIDE) as threads:
            list(threads.map(self._guarded, together))
        for run in (*self._store_runs(alone=True), *self._api_runs(alone=True)):
            self._guarded(run)
        self.sandbox.stop_api()  # which ends the requests that it never answered
        self.sandbox.start_api()
        self._check_health()

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - a run that breaks is a line among the problems, not the end of the others
            self.problems.append(f"{type(error).__name__}: {error}")

    # --- the runs -------------------------------------------------------------------------------------------------------

    def _store_runs(self, *, alone: bool) -> Iterator[Callable[[], None]]:
        for kind in STORE_KINDS:
            if kind.alone is not alone or (kind.lengthy and not self.thoroughness.lengthy):
                continue
            yield lambda kind=kind: self._until_clean(f"store: {kind.name}", self._store_once(kind))  # type: ignore[misc] # mypy cannot infer a lambda with a default
            for nth in range(1, self.thoroughness.always_opportunities + 1):
                yield lambda kind=kind, nth=nth: self._store_always(kind, nth)  # type: ignore[misc] # the same
            for run, count in (("once", 1), ("always", None)):
                yield lambda kind=kind, run=run, count=count: self._probe(kind, run, count)  # type: ignore[misc] # the same

    def _store_once(self, kind: FaultKind) -> Callable[[int], int]:
        def once(nth: int) -> int:
            key = f"{store_input(kind)}/once-{nth}.bin"
            rule = self.sandbox.store.faults.add(kind.make(self.surroundings), path=key, first=nth, count=1)
            outcome = self._read(key)
            self._judge(f"store: {kind.name}, once at {nth}", outcome, kind.once if rule.hits else RIGHT)
            return rule.hits

        return once

    def _store_always(self, kind: FaultKind, nth: int) -> None:
        key = f"{store_input(kind)}/always-{nth}.bin"
        rule = self.sandbox.store.faults.add(kind.make(self.surroundings), path=key, first=nth, count=None)
        outcome = self._read(key)
        self._judge(f"store: {kind.name}, always from {nth}", outcome, kind.always if rule.hits else RIGHT)
        self._told.append((f"store: {kind.name}, always from {nth}", key, outcome.errno, kind.said))
        self._recovers(f"store: {kind.name}, always from {nth}", key, rule, 25.0)

    def _probe(self, kind: FaultKind, run: str, count: int | None) -> None:
        key = f"{store_input(kind)}/probe-{run}.bin"
        rule = self.sandbox.store.faults.add(kind.make(self.surroundings), path=key, count=count)
        # The kernel repeats a look-up that ends with ESTALE, and the size is asked of whatever answers.
        allowed = kind.probe | kind.once if count else kind.probe
        outcome = self._read(key)
        self._judge(f"probe: {kind.name}, {run}", outcome, allowed)
        self._told.append((f"probe: {kind.name}, {run}", key, outcome.errno, kind.said))
        rule.count = 0

    def _api_runs(self, *, alone: bool) -> Iterator[Callable[[], None]]:
        for kind in API_KINDS:
            if kind.alone is not alone or (kind.lengthy and not self.thoroughness.lengthy):
                continue
            yield lambda kind=kind: self._until_clean(f"api: {kind.name}", self._api_once(kind))  # type: ignore[misc] # as above
            for nth in range(1, self.thoroughness.api_always_opportunities + 1):
                yield lambda kind=kind, nth=nth: self._api_always(kind, nth)  # type: ignore[misc] # as above

    def _api_once(self, kind: FaultKind) -> Callable[[int], int]:
        def once(nth: int) -> int:
            name = api_input(kind, f"once-{nth}")
            rule = self._api_rule(kind, name, nth, 1)
            self._judge(
                f"api: {kind.name}, once at {nth}", self._read(f"{name}/0.bin"), kind.once if rule.hits else RIGHT
            )
            return rule.hits

        return once

    def _api_always(self, kind: FaultKind, nth: int) -> None:
        name = api_input(kind, f"always-{nth}")
        rule = self._api_rule(kind, name, nth, None)
        what = f"api: {kind.name}, always from {nth}"
        outcome = self._read(f"{name}/0.bin")
        self._judge(what, outcome, kind.always if rule.hits else RIGHT)
        self._told.append((what, f"{name}/0.bin", outcome.errno, kind.said))
        rule.count = 0
        if self.thoroughness.api_patience_s:
            self._recovers(what, f"{name}/0.bin", rule, self.thoroughness.api_patience_s)

    def _api_rule(self, kind: FaultKind, name: str, nth: int, count: int | None) -> Rule:
        """The input's URL is refused once for each of the extents, so that there is something to renew each time.

        Not for parts of one extent, which are fetched side by side: a URL that is refused as soon as it was renewed is a denial.
        """
        for start, _ in self.thoroughness.extents:
            self.sandbox.store.faults.add(faults.expired(), path=f"{name}/*", covers=start)
        input_id = self.sandbox.dataset.inputs[name][0]
        return self.sandbox.api.faults.add(
            kind.make(self.surroundings), first=nth, count=count, when=lambda request: f"={input_id}" in request.query
        )

    # --- judging --------------------------------------------------------------------------------------------------------

    def _until_clean(self, what: str, once: Callable[[int], int]) -> None:
        for nth in range(1, OPPORTUNITIES_MAX + 1):
            hits = once(nth)
            self.hits += hits
            if not hits:
                if nth == 1:
                    self.problems.append(f"{what}: never happened")
                return
        self.problems.append(f"{what}: no run was clean in {OPPORTUNITIES_MAX}")

    def _read(self, key: str) -> ReadOutcome:
        self.runs += 1
        return self.readers.read(self.root / key, self.thoroughness.extents, timeout_s=self._longest_s)

    def _judge(self, what: str, outcome: ReadOutcome, allowed: Outcomes) -> None:
        if outcome.errno not in allowed:
            self.problems.append(
                f"{what}: {_name(outcome.errno)} instead of {' or '.join(map(_name, sorted(allowed)))}"
            )
        elif outcome.errno == 0 and outcome.digest != self._right:
            self.problems.append(f"{what}: WRONG BYTES")
        elif outcome.errno and outcome.took_s > self._longest_s:
            self.problems.append(f"{what}: took {outcome.took_s:.1f} s")

    def _recovers(self, what: str, key: str, rule: Rule, patience_s: float) -> None:
        """Once the fault is over, the same file is read, by a new open, as if nothing had been."""
        rule.count = 0
        found: list[int] = []

        def reads() -> bool:
            outcome = self._read(key)
            found.append(outcome.errno)
            return outcome.errno == 0 and outcome.digest == self._right

        try:
            wait_until(what, reads, timeout_s=patience_s)
        except AssertionError:
            told = ", ".join(sorted({_name(number) for number in found}))
            self.problems.append(f"{what}: not well {patience_s:g} s after the fault was over: {told}")

    def _check_health(self) -> None:
        """The mount is alive, nothing is leaked, nothing unforeseen was logged, and the token stayed at home."""
        self._judge("afterwards: a healthy file", self._read("healthy/0.bin"), RIGHT)
        left = at_rest.problems(self.mounted, timeout_s=AT_REST_S)
        self.problems += [f"afterwards: {line}" for line in left]
        log = self.mounted.log()
        self._check_messages(log.splitlines())
        unforeseen = [
            line for line in log.splitlines() if " ERROR " in line or " CRITICAL " in line or "Traceback" in line
        ]
        self.problems += [f"logged: {line[:300]}" for line in unforeseen[:10]]
        self.sandbox.assert_token_never_leaked()

    def _check_messages(self, log: list[str]) -> None:
        """Each read that failed has a line that names the file, the reason and the errno."""
        for what, key, number, said in self._told:
            if not number:
                continue
            lines = [line for line in log if f"{key}: " in line and line.endswith(f"-> {_name(number)}")]
            if not any(re.search(said, line.partition(f"{key}: ")[2]) for line in lines):
                self.problems.append(f"{what}: the log does not say {said!r}: {lines[-1:]}")


def _name(number: int) -> str:
    return errno.errorcode[number] if number else "the right bytes"
