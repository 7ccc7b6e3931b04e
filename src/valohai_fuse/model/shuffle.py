"""Which files come next when a directory's files are opened in no order: all of them, each once, as a data loader shuffles them.

Nobody knows which is next, but when a sixteenth of a directory has been opened, file after file and hardly one twice, it is likely
that the rest follows, and what is fetched meanwhile is there when its turn comes. How far that is trusted:

- never more files are fetched ahead and not opened than have been opened, so who stops has cost twice what he read at most;
- two requests at a time, and more as opens hit what they brought: a reader whom they are no use to must not notice them;
- only files of the kinds (by suffix) that are opened are fetched;
- if the opens hit what was fetched less than half as often as they would by chance, there is a method to them that we do not see,
  and nothing more is fetched.

Pure; positions are indices into the directory's listing. Knows nothing of sizes, caches or flights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

OPENED_FILES_MIN: Final = 32
OPENED_SHARE: Final = 16
"""The least that must have been opened of a directory is this fraction of it."""
REQUESTS_MIN: Final = 2
HITS_PER_REQUEST: Final = 3
"""For so many hits there may be one request more."""
FILES_PER_OPEN: Final = 4
"""Fetched ahead upon one open at the most: what many readers open at once should not make a burst."""
UNOPENED_FILES_MAX: Final = 1024
HITS_EXPECTED_MIN: Final = 8
"""So many hits must be due before their absence says anything."""
KINDS_MAX: Final = 8
"""Of more kinds all are one: such suffixes say nothing."""
_SUFFIX_BYTES_MAX: Final = 8
_OPENED, _PLANNED = 1, 2


class Shuffle:
    """The opens of one directory, whose files have these names."""

    __slots__ = (
        "_expected",
        "_hits",
        "_kinds",
        "_left",
        "_names",
        "_next",
        "_opened",
        "_repeats",
        "_state",
        "_unopened",
    )

    def __init__(self, names: Sequence[bytes]) -> None:
        self._names = names
        self._state = bytearray(len(names))
        self._kinds: set[bytes] | None = set()
        """Suffixes of what has been opened; None: any."""
        self._opened = 0
        self._repeats = 0
        self._unopened = 0
        """Planned and not opened yet."""
        self._left = 0
        """Files of the opened kinds that have not been opened, as far as they have been counted; 0 before that."""
        self._next = 0
        self._expected = 0.0
        self._hits = 0

    def on_open(self, position: int) -> None:
        """A file was opened."""
        state = self._state[position]
        if state == _OPENED:
            self._repeats += 1
            return
        if self._left:
            self._expected += self._unopened / self._left
        if state == _PLANNED:
            self._hits += 1
            self._unopened -= 1
        self._state[position] = _OPENED
        self._opened += 1
        self._left -= self._left > 0
        if self._kinds is not None and (suffix := _suffix(self._names[position])) not in self._kinds:
            self._kinds.add(suffix)
            if len(self._kinds) > KINDS_MAX:
                self._kinds = None
            self._left = self._next = 0  # to be counted anew, and looked through

    @property
    def requests_max(self) -> int:
        """How many may be under way; 0 while nothing speaks for it."""
        if self._next >= len(self._names) or not self._is_likely():
            return 0
        return REQUESTS_MIN + self._hits // HITS_PER_REQUEST

    def next(self, count: int) -> list[int]:
        """The positions that are worth fetching now, `count` at the most; mostly empty."""
        if not self.requests_max:
            return []
        if not self._left:
            states = enumerate(self._state)
            self._left = sum(state != _OPENED and self._is_of_a_kind(position) for position, state in states)
        wanted = min(count, FILES_PER_OPEN, self._opened - self._unopened, UNOPENED_FILES_MAX - self._unopened)
        found: list[int] = []
        while len(found) < wanted and self._next < len(self._names):
            position = self._next
            self._next += 1
            if not self._state[position] and self._is_of_a_kind(position):
                self._state[position] = _PLANNED
                found.append(position)
        self._unopened += len(found)
        return found

    def _is_likely(self) -> bool:
        if self._opened < max(OPENED_FILES_MIN, len(self._names) // OPENED_SHARE) or 4 * self._repeats > self._opened:
            return False
        return self._expected < HITS_EXPECTED_MIN or 2 * self._hits >= self._expected

    def _is_of_a_kind(self, position: int) -> bool:
        return self._kinds is None or _suffix(self._names[position]) in self._kinds


def _suffix(name: bytes) -> bytes:
    _, dot, suffix = name.rpartition(b".")
    return suffix if dot and len(suffix) <= _SUFFIX_BYTES_MAX else b""
