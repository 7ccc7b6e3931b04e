"""Which requests are answered wrongly: rules, and the script that holds them.

A rule says which requests it means (a glob over the path, a byte that the range covers, from the n-th match on, how often)
and one `Fault`; the first rule that applies is used, alone. A fault only rewrites a `Response` before it is sent, so it
knows nothing of the server's threads. The kinds of fault are in `faults`.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from valohai_fuse.sandbox.content import Content
from valohai_fuse.sandbox.http1 import Server
from valohai_fuse.sandbox.messages import Exchange, Request, Response

Answer = list[dict[str, Any]]
"""The payload of the API's answer: inputs with their files."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a fault may look at besides the response."""

    request: Request
    exchange: Exchange
    server: Server
    revoke: Callable[[], None]
    now_s: float
    content: Content | None = None
    """The object, at a store."""
    answer: Answer | None = None
    """The payload, at the API."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to go wrong. `act` returns the response to send instead, often the same, changed."""

    name: str
    act: Callable[[Response, Situation], Response] = field(repr=False)


@dataclass(slots=True)
class Rule:
    """When a fault happens. Made by `FaultScript.add`; `hits` counts how often it did."""

    fault: Fault
    path: str
    first: int
    count: int | None
    covers: int | None
    when: Callable[[Request], bool] | None
    matches: int = 0
    hits: int = 0

    def wants(self, situation: Situation) -> bool:
        """Counts a match; whether the fault happens to it."""
        if not fnmatch.fnmatchcase(situation.exchange.path, self.path):
            return False
        if self.covers is not None and not _covers(situation.request.headers.get("range"), self.covers):
            return False
        if self.when is not None and not self.when(situation.request):
            return False
        self.matches += 1
        if self.matches < self.first or (self.count is not None and self.hits >= self.count):
            return False
        self.hits += 1
        return True


class FaultScript:
    """The rules in force at one server. Any thread; rules may come and go while it serves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []

    def add(
        self,
        fault: Fault,
        *,
        path: str = "*",
        first: int = 1,
        count: int | None = 1,
        covers: int | None = None,
        when: Callable[[Request], bool] | None = None,
    ) -> Rule:
        """`fault` for the requests whose path (object key, at a store) matches the glob `path`, whose range covers byte
        `covers`, and for which `when` says so: from the `first` match (counted from 1) on, `count` times (None: always).
        """
        rule = Rule(fault, path, first, count, covers, when)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self._rules.clear()

    def apply(self, response: Response, situation: Situation) -> Response:
        """The response to send, and the fault's name in the exchange."""
        with self._lock:
            fault = next((rule.fault for rule in self._rules if rule.wants(situation)), None)
        if fault is None:
            return response
        situation.exchange.fault = fault.name
        return fault.act(response, situation)


def _covers(header: str | None, offset: int) -> bool:
    first, _, last = (header or "bytes=0-").removeprefix("bytes=").partition("-")
    return first.isdecimal() and int(first) <= offset and (not last or offset <= int(last))
