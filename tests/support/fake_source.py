"""A UrlSource for engine tests: scripted latency and failures, no I/O; proven against the real one in `contracts`.

Its URLs expire by the clock it is given and carry the number of the renewal, so that a test sees which one it got.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import quote

import trio

from valohai_fuse.errors import ValohaiFuseError
from valohai_fuse.ports import Clock, FileRef


def file_ref(name: str = "a.bin", *, index: int = 0, input_id: str | None = "i-1", url: str | None = None) -> FileRef:
    """A file of the input "data"; `url` is its storage_uri."""
    return FileRef("data", input_id, name, f"datum://{name}", name, url, index)


@dataclass
class FakeRenewal:
    """The answer of one `renew`: an https URL for every file that is not left out."""

    minted_at_s: float
    number: int
    lifetime_s: float | None
    left_out: frozenset[str]
    given: dict[str, str]

    def url_for(self, file: FileRef) -> str | None:
        """As the port says."""
        if file.name in self.left_out:
            return None
        if file.name in self.given:
            return self.given[file.name]
        query = f"renewal={self.number}"
        if self.lifetime_s is not None:
            query += f"&Expires={int(self.minted_at_s + self.lifetime_s)}"
        return f"https://store.test/{file.input_name}/{quote(file.name)}?{query}"


@dataclass
class FakeSource:
    """`latency_s` on trio's clock; each element of `failures` (None: succeed) is used up by one renewal.

    `left_out` names files that answers do not hold, `given` overrides the URL of a file in every answer.
    """

    clock: Clock
    lifetime_s: float | None = 3600.0
    latency_s: float = 0.0
    failures: deque[ValohaiFuseError | Exception | None] = field(default_factory=deque)
    left_out: set[str] = field(default_factory=set)
    given: dict[str, str] = field(default_factory=dict)
    asked: list[FileRef] = field(default_factory=list)
    under_way: int = 0
    under_way_max: int = 0

    def fail(self, failures: Iterable[ValohaiFuseError | Exception | None]) -> None:
        """Scripts the next renewals."""
        self.failures.extend(failures)

    async def renew(self, file: FileRef) -> FakeRenewal:
        """As the port says."""
        self.asked.append(file)
        self.under_way += 1
        self.under_way_max = max(self.under_way_max, self.under_way)
        try:
            await trio.sleep(self.latency_s)
        finally:
            self.under_way -= 1
        failure = self.failures.popleft() if self.failures else None
        if failure is not None:
            raise failure
        return FakeRenewal(self.clock(), len(self.asked), self.lifetime_s, frozenset(self.left_out), dict(self.given))
