"""Calls to a disk that may stop answering.

A file system whose server is gone (NFS, sshfs, ...) hangs whoever calls it, for minutes or for ever. What the event loop asks
of such a one goes through a thread, one call after the other, and is waited for `patience_s` at the most; then the disk is
*stuck*, and nobody asks it anything until the call that it owes has returned. So it needs no probing, and no more than one
thread of ours hangs in it. A local disk is called directly: a hand-over costs more than what is asked for.

Threads: any. `call` hands over on the event loop's thread only; other threads are there to wait, and are kept from beginning.
Must not know: segments, records, claims.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import trio

log = logging.getLogger("valohai_fuse.store")

PATIENCE_S: Final = 1.0
"""So long the event loop stands still for a disk that has stopped answering, once. One that only hesitates is better waited for:
what it holds would be fetched again, and what lands meanwhile would not be cached."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class NotAnsweringError(TimeoutError):
    """The disk has been asked something and has not answered; whether it did what it was asked for is not known."""


class _Call:
    __slots__ = ("abandoned", "answered", "ask", "error", "result")

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask
        self.answered = threading.Event()
        self.abandoned = False
        self.result: Any = None
        self.error: BaseException | None = None


class DiskCalls:
    """The way to one disk. `may_hang`: it is one of those; otherwise everything is called directly."""

    def __init__(self, *, may_hang: bool, patience_s: float = PATIENCE_S) -> None:
        self.may_hang: Final = may_hang
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self.stuck = False
        """Whether it owes an answer."""
        if may_hang:
            # Now, for later may be a garbage collection, which is no place to start a thread, or two at once.
            threading.Thread(target=self._answer, name="disk-calls", daemon=True).start()

    def call(self, ask: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `ask` returns or raises; NotAnsweringError when that takes too long, or the disk is stuck anyway.

        What is abandoned so may still happen at any later time, in another thread: `ask` must allow for that.
        """
        if not self.may_hang:
            return ask(*args, **kwargs)
        if self.stuck:
            raise NotAnsweringError
        if not trio.lowlevel.in_trio_run():
            return ask(*args, **kwargs)
        call = self._hand_over(lambda: ask(*args, **kwargs))
        if not call.answered.wait(self._patience_s):
            with self._lock:
                if not call.answered.is_set():
                    call.abandoned = True
                    self.stuck = True
                    raise NotAnsweringError
        if call.error is not None:
            raise call.error
        result: _T = call.result
        return result

    def later(self, ask: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> None:
        """Has `ask` called after everything that was called before, without waiting. Raises nothing.

        May be called by a garbage collection, at any moment.
        """
        if self.may_hang:
            self._hand_over(lambda: ask(*args, **kwargs))
            return
        with contextlib.suppress(OSError):
            ask(*args, **kwargs)

    def _hand_over(self, ask: Callable[[], object]) -> _Call:
        call = _Call(ask)
        self._calls.put(call)
        return call

    def _answer(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call.result = call.ask()
            except OSError as error:
                call.error = error
            except Exception as bug:  # the one who waits gets it; where nobody does, it must not end this thread
                call.error = bug
                log.debug("a call to the cache disk failed", exc_info=True)
            with self._lock:
                call.answered.set()
                if call.abandoned:
                    self.stuck = False
            del call  # what it opened for nobody is given back now
