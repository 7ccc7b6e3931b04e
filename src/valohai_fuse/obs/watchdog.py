"""Watches the daemon from inside: requests that outlive their deadline, an event loop that stands still, SIGUSR1.

What it decides: a request is overdue `MARGIN_S` after the deadline that all requests have; the loop stalls when one pass over
its runnable tasks takes longer than STALL_S. Time during which the loop's thread was ready to run and the processor was given
to others is not counted (schedstat): a busy machine is not a fault of ours. Both are a WARNING with the stack, and a number in
`status`. SIGUSR1 writes the stacks of all threads and tasks and the state to the log, also while the loop stands still.

Cost: two clock readings per pass of the loop, and a thread that looks ten times a second while there is work and sleeps while
there is none, until a pass of the loop wakes it. Overdue requests cost nothing to look for: the task sleeps until the oldest
request would be overdue.

Concurrency: `busy_since_s` and `passes` are written by the loop's thread alone, `_reported` and `_sleeps` by the watching thread
alone; each is read by the other as it is (one word, under the GIL). No wake-up is lost: one says that it sleeps and then looks
whether the loop is busy, the other says that it is busy and then looks whether one sleeps. Must not know: what a request does,
what the state means.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol

import trio

from valohai_fuse.ports import Metrics

log = logging.getLogger(__name__)

STALL_S: Final = 0.25
MARGIN_S: Final = 5.0
LOOK_S: Final = 0.1
LOOK_IDLE_S: Final = 60.0
_WAKE: Final = signal.SIGRTMIN
"""Sent to the watching thread alone, which has it blocked and waits for it."""
LOOP_ANSWERS_WITHIN_S: Final = 2.0
OVERDUE_REPORTED_MAX: Final = 5
"""Stacks per report: thousands of reads that wait for one store have one reason."""
STACK_FRAMES_MAX: Final = 25
STACKS_SHOWN_MAX: Final = 200


class Request(Protocol):
    """A request that is being answered; hashable."""

    @property
    def name(self) -> str:
        """What the kernel asks for: read, lookup, ..."""
        ...

    @property
    def began_s(self) -> float:
        """When it began, by `time.monotonic`."""
        ...

    @property
    def task(self) -> trio.lowlevel.Task:
        """Who answers it."""
        ...


class Requests(Protocol):
    """What is being answered."""

    def since(self, began_s: float) -> Iterable[Request]:
        """The requests that began before `began_s` (`time.monotonic`), oldest first."""
        ...

    def oldest(self) -> Request | None:
        """The one that waits longest."""
        ...

    def __len__(self) -> int: ...


class Watchdog(trio.abc.Instrument):
    """One per daemon; `run` on the trio thread is its life. `state` gives what a dump shows beside the stacks."""

    def __init__(
        self,
        *,
        requests: Requests,
        deadline_s: float,
        metrics: Metrics,
        state: Callable[[], Mapping[str, Any]],
        margin_s: float = MARGIN_S,
        stall_s: float = STALL_S,
    ) -> None:
        self._requests = requests
        self._limit_s = deadline_s + margin_s
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._state = state
        self._stall_s = stall_s
        self._stopped = False
        self._ready = threading.Event()
        self._may_end = threading.Event()
        self._thread: threading.Thread
        self._sleeps = False
        self._clock: _ThreadClock
        self._loop_thread = 0
        self._token: trio.lowlevel.TrioToken
        self._reported_pass = -1
        self._stall_max_s = 0.0
        self._overdue: set[Request] = set()
        self.busy_since_s: float | None = None
        """When the pass that the loop is in began; None while it waits for something to happen."""
        self.passes = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watches until cancelled. SIGUSR1 is watched where the process has it blocked (`block_signal`)."""
        self._clock = _ThreadClock(threading.get_native_id())
        self._loop_thread = threading.get_ident()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._ready.wait()  # until it has its signal blocked: a moment
        trio.lowlevel.add_instrument(self)
        task_status.started()
        try:
            while True:  # noqa: ASYNC110 - it is time that is waited for
                await trio.sleep(self._look_at_requests())
        finally:
            trio.lowlevel.remove_instrument(self)
            self._stopped = True
            self._wake()
            self._may_end.set()  # not before: a thread that is gone must not be sent a signal
            self._thread.join()
            self._clock.close()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        """A pass begins."""
        self.passes += 1
        self.busy_since_s = time.monotonic()
        if self._sleeps:
            self._wake()

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        """The pass is over; one that took too long is counted here, exactly, whether the thread saw it or not."""
        began_s = self.busy_since_s
        if began_s is None:
            return
        self.busy_since_s = None
        if time.monotonic() - began_s < self._stall_s:
            return
        stalled_s = self._clock.ran_since(began_s)
        if stalled_s < self._stall_s:
            return
        self._metrics.count("loop_stalls")
        self._stall_max_s = max(self._stall_max_s, stalled_s)
        self._metrics.gauge("loop_stall_seconds_max", round(self._stall_max_s, 3))
        if self._reported_pass != self.passes:
            log.warning("the event loop stood still for %.2f s; nobody saw where", stalled_s)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _look_at_requests(self) -> float:
        """Reports what has become overdue; seconds until something else can."""
        now_s = time.monotonic()
        overdue = set(self._requests.since(now_s - self._limit_s))
        new = sorted(overdue - self._overdue, key=lambda request: request.began_s)
        for request in new[:OVERDUE_REPORTED_MAX]:
            log.warning(
                "a %s has been under way for %.0f s, though it ends within %.0f s: %s",
                request.name,
                now_s - request.began_s,
                self._deadline_s,
                task_stack(request.task),
            )
        if len(new) > OVERDUE_REPORTED_MAX:
            log.warning("%d more requests are overdue", len(new) - OVERDUE_REPORTED_MAX)
        self._metrics.count("requests_overdue", len(new))
        self._overdue = overdue
        waiting = [r.began_s for r in (self._requests.oldest(),) if r is not None and not overdue]
        next_s = min([now_s, *waiting]) + self._limit_s
        return 1.0 if overdue else max(0.05, next_s - now_s)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        assert self._thread.ident is not None, "it runs"
        signal.pthread_kill(self._thread.ident, _WAKE)

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {_WAKE})
        self._ready.set()
        seen_passes = -1
        while not self._stopped:
            is_idle = self.passes == seen_passes and self.busy_since_s is None
            seen_passes = self.passes
            self._clock.look()
            if self._pause(sleep=is_idle):
                self.dump()
            began_s, number = self.busy_since_s, self.passes
            if began_s is None or number == self._reported_pass or time.monotonic() - began_s < self._stall_s:
                continue
            stalled_s = self._clock.ran_since(began_s)
            if stalled_s >= self._stall_s:
                frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - documented, for debuggers
                self._reported_pass = number
                log.warning("the event loop has stood still for %.2f s: %s", stalled_s, frame_stack(frame))

        self._may_end.wait()

    def _pause(self, *, sleep: bool) -> bool:
        """Waits for the next look; True when SIGUSR1 ended it. A sleep ends when the loop is busy again, and either with `run`."""
        self._sleeps = sleep
        if self._stopped or (sleep and self.busy_since_s is not None):
            self._sleeps = False
            return False
        awaited = {_WAKE, signal.SIGUSR1} if is_signal_blocked() else {_WAKE}
        info = signal.sigtimedwait(awaited, LOOK_IDLE_S if sleep else LOOK_S)
        self._sleeps = False
        # After a SIGCONT that comes too late CPython 3.11 returns a siginfo of nothing instead of None.
        return info is not None and info.si_signo == signal.SIGUSR1

    # --- the dump -----------------------------------------------------------------------------------------------------

    def dump(self) -> None:
        """Stacks of all threads, then of all tasks with the state, as WARNING. Any thread but the loop's."""
        log.warning("SIGUSR1: stacks of all threads, all tasks and the state follow")
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for number, frame in sys._current_frames().items():  # noqa: SLF001 - the same
            log.warning("thread %s: %s", names.get(number, number), frame_stack(frame))
        answered = threading.Event()

        def tell() -> None:
            self._dump_tasks()
            answered.set()

        try:
            self._token.run_sync_soon(tell)
        except trio.RunFinishedError:
            return
        if not answered.wait(LOOP_ANSWERS_WITHIN_S):
            log.warning("the event loop does not answer; its thread's stack says where it is")

    def _dump_tasks(self) -> None:
        stacks = Counter((task.name, task_stack(task)) for task in all_tasks())
        for (name, stack), count in stacks.most_common(STACKS_SHOWN_MAX):
            log.warning("%s %s: %s", f"{count} tasks" if count > 1 else "task", name, stack)
        log.warning("state: %s", json.dumps(dict(self._state()), default=str, sort_keys=True))


def block_signal() -> None:
    """To be called before any thread starts: SIGUSR1 is then the watching thread's, and never ends the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def is_signal_blocked() -> bool:
    """Whether this thread, and so those that it starts, has SIGUSR1 blocked."""
    return signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])


class _ThreadClock:
    """How long a thread ran or waited for something, without the time for which the processor was given to others.

    From /proc/self/task/TID/schedstat (sched-stats.rst: second field, nanoseconds spent waiting on a run queue); where the
    kernel does not keep it, nothing is subtracted.
    """

    def __init__(self, thread: int) -> None:
        self._file = None
        try:
            self._file = Path(f"/proc/self/task/{thread}/schedstat").open("rb", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError:
            log.debug("no schedstat: stalls of a busy machine count as ours")
        self._marks: list[tuple[float, float]] = [(time.monotonic(), self._queued_s())]
        """(time, seconds on the run queue until then), the last few looks, ascending."""

    def _queued_s(self) -> float:
        if self._file is None:
            return 0.0
        self._file.seek(0)
        return int(self._file.read(100).split()[1]) / 1e9

    def look(self) -> None:
        """Notes where the thread stands; by the watching thread, often."""
        self._marks = [*self._marks[-20:], (time.monotonic(), self._queued_s())]

    def ran_since(self, began_s: float) -> float:
        """Seconds since `began_s`, less what the thread has queued since the last look before it: too little if anything."""
        before = [queued_s for at_s, queued_s in self._marks if at_s <= began_s] or [self._marks[0][1]]
        return time.monotonic() - began_s - (self._queued_s() - before[-1])

    def close(self) -> None:
        """No more looks."""
        if self._file is not None:
            self._file.close()


def all_tasks() -> Iterator[trio.lowlevel.Task]:
    """Every task of this run. On the trio thread."""
    root = trio.lowlevel.current_root_task()
    pending = [root] if root is not None else []
    while pending:
        task = pending.pop()
        yield task
        for nursery in task.child_nurseries:
            pending.extend(nursery.child_tasks)


def task_stack(task: trio.lowlevel.Task) -> str:
    """Where a task waits, outermost first, on one line."""
    return _on_one_line(traceback.StackSummary.extract(task.iter_await_frames(), lookup_lines=False))


def frame_stack(frame: FrameType | None) -> str:
    """Where a thread is, outermost first, on one line."""
    if frame is None:
        return "(gone)"
    return _on_one_line(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)[::-1])


def _on_one_line(frames: Iterable[traceback.FrameSummary]) -> str:
    shown = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in frames]
    cut = ["..."] if len(shown) > STACK_FRAMES_MAX else []
    return " > ".join(cut + shown[-STACK_FRAMES_MAX:]) or "(not started)"
