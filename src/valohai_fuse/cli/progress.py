"""How far a transfer of files is, on stderr: a live bar on a terminal, elsewhere a line now and then and one at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from valohai_fuse.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_EVERY_S: Final = 15.0
"""Between the lines where there is no terminal: a job's log should show that it goes on, and not be filled."""
FAILURES_SHOWN_MAX: Final = 10


@dataclass(slots=True)
class Totals:
    """What `engine.prefetch.Progress` says, perhaps summed over several mounts."""

    files: int = 0
    files_done: int = 0
    files_failed: int = 0
    bytes: int = 0
    bytes_done: int = 0
    bytes_fetched: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        """Adds the numbers of one more answer, where it has them."""
        for name in Totals.__slots__:
            setattr(self, name, getattr(self, name) + int(answer.get(name, 0)))


class Shown:
    """A context manager around the transfer; `update` as often as there is news."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._began_s = self._told_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began_s

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = _bar(self._verb)
            self._task = self._bar.add_task("", total=None, files="", rate="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, totals: Totals) -> None:
        """Shows how far it is now."""
        if self._bar is not None and self._task is not None:
            files = f"{totals.files_done + totals.files_failed:,}/{totals.files:,} files"
            speed = self._bar.tasks[0].speed
            rate = f"{output.bytes_shown(speed)}/s" if speed else ""
            self._bar.update(
                self._task, total=totals.bytes or None, completed=totals.bytes_done, files=files, rate=rate
            )
        elif time.monotonic() - self._told_s >= LINE_EVERY_S:
            self._told_s = time.monotonic()
            output.say(
                f"{self._verb}: {totals.files_done:,} of {output.files_shown(totals.files)}, "
                f"{output.bytes_shown(totals.bytes_done)} of {output.bytes_shown(totals.bytes)}"
            )


def _bar(verb: str) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, no_color=not output.has_color(sys.stderr), highlight=False)
    columns = (TextColumn(verb), BarColumn(), DownloadColumn(binary_units=True))
    return Progress(
        *columns,
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[files]}"),
        console=console,
    )


def conclude(
    verb: str,
    totals: Totals,
    failures: list[tuple[str, str]],
    *,
    elapsed_s: float,
    interrupted: bool,
    for_programs: bool,
) -> int:
    """Says how it went; the exit code: 0 when all of it is there, 1 when a file failed, 130 when it was interrupted."""
    for path, why in failures[:FAILURES_SHOWN_MAX]:
        output.error(why if path in why else f"{path}: {why}")
    if totals.files_failed > FAILURES_SHOWN_MAX:
        output.error(f"and {output.files_shown(totals.files_failed - FAILURES_SHOWN_MAX)} more")
    output.say(
        f"{verb}: {'interrupted, ' if interrupted else ''}{totals.files_done:,} of {output.files_shown(totals.files)}, "
        f"{output.bytes_shown(totals.bytes_done)} ({output.bytes_shown(totals.bytes_fetched)} fetched) in {elapsed_s:.1f} s"
    )
    if for_programs:
        output.data_json(
            {
                **{name: getattr(totals, name) for name in Totals.__slots__},
                "failures": [{"path": path, "error": why} for path, why in failures],
                "interrupted": interrupted,
                "seconds": round(elapsed_s, 3),
            }
        )
    if interrupted:
        return 130
    return int(totals.files_failed > 0)
