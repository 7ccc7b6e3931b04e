"""Several threads that read from one disk, each for something of its own: what was asked for first is read first, by all of them.

A disk gives its best only when several reads are under way. With a thread for each file that is loaded, all of them come in at
the same time, after as long as all of them take together, and the first is what a reader waits for. So a thread that has begun
reads whatever piece is next, its own or not, until its own are read.

Threads: any. Invariant: nothing of a request is read, and its descriptor and its memory are not touched, once `read` has returned.
"""

from __future__ import annotations

import os
import threading
from bisect import insort
from collections import deque
from collections.abc import Iterable

Piece = tuple[int, int]
"""Bytes [start, stop) of a file, and of the memory that they go to."""


class _Request:
    __slots__ = ("error", "fd", "into", "is_incomplete", "left", "turn", "under_way")

    def __init__(self, turn: int, fd: int, into: memoryview, pieces: Iterable[Piece]) -> None:
        self.turn = turn
        self.fd = fd
        self.into = into
        self.left = deque(pieces)
        self.under_way = 0
        self.is_incomplete = False
        self.error: OSError | None = None

    def read(self, piece: Piece) -> None:
        start, stop = piece
        is_whole = False
        try:
            is_whole = os.preadv(self.fd, [self.into[start:stop]], start) == stop - start
        except OSError as error:
            self.error = error
        finally:
            self.is_incomplete |= not is_whole


class ReadsInTurn:
    """See the module's text."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        """By turn, those of which a piece has not been begun."""

    def read(self, turn: int, fd: int, into: memoryview, pieces: Iterable[Piece]) -> bool:
        """Reads these pieces of the file `fd` to their places in `into`, after those of lower turns that are being waited for.

        False: the file ends before. Raises OSError; then, as then, not all of them were read. Blocks.
        """
        request = _Request(turn, fd, into, pieces)
        with self._changed:
            if request.left:
                insort(self._waiting, request, key=lambda other: other.turn)
        try:
            while (taken := self._take(request)) is not None:
                self._carry_out(*taken)
        finally:
            self._leave(request)
        if request.error is not None:
            raise request.error
        return not request.is_incomplete

    def _take(self, request: _Request) -> tuple[_Request, Piece] | None:
        """The next piece of all, as long as `request` has one that nobody has begun."""
        with self._changed:
            if not request.left:
                return None
            first = self._waiting[0]
            piece = first.left.popleft()
            if not first.left:
                self._waiting.remove(first)
            first.under_way += 1
            return first, piece

    def _carry_out(self, request: _Request, piece: Piece) -> None:
        try:
            request.read(piece)
        finally:
            with self._changed:
                request.under_way -= 1
                if request.is_incomplete:
                    self._drop(request)
                self._changed.notify_all()

    def _leave(self, request: _Request) -> None:
        """Waits for the pieces that others have begun."""
        with self._changed:
            self._drop(request)
            while request.under_way:
                self._changed.wait()

    def _drop(self, request: _Request) -> None:
        if request.left:
            request.left.clear()
            self._waiting.remove(request)
