"""Warnings about single files, gathered while the manifest and the tree are built.

A manifest may hold a million bad names; the person is told of the first hundred and of how many more there are. Whoever
adds a notice has made it printable (`names.printable`); nothing here knows files or inputs.
"""

from __future__ import annotations

NOTICES_MAX = 100


class Notices:
    """A bounded list of sentences, and a count of those that did not fit."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._total = 0

    def add(self, sentence: str) -> None:
        """Keeps the sentence, or only counts it once the list is full."""
        self._total += 1
        if len(self._kept) < NOTICES_MAX:
            self._kept.append(sentence)

    def extend(self, others: Notices) -> None:
        """Adds all of `others`, also those that it only counted."""
        for sentence in others._kept:
            self.add(sentence)
        self._total += others._total - len(others._kept)

    def __len__(self) -> int:
        return self._total

    def lines(self) -> tuple[str, ...]:
        """What to show: the sentences kept, then `and N more` where there were more."""
        more = self._total - len(self._kept)
        return (*self._kept, f"and {more} more warnings like these") if more else tuple(self._kept)
