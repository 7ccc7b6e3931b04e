"""How the commands speak: data on stdout, words for people on stderr as `error: ...`, `hint: ...`, `warning: ...`.

Everything that is said is cut of secrets once more here, and is one line per thing said, whatever names it quotes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import IO, Any, Final

from valohai_fuse import settings
from valohai_fuse.obs.redaction import printable, redact

WARNINGS_SHOWN_MAX: Final = 10
_STYLES: Final = {"error": "31;1", "hint": "36", "warning": "33", "note": "2", "ok": "32", "FAIL": "31;1", "warn": "33"}


def has_color(stream: IO[str]) -> bool:
    """Whether colour is wanted and would be seen."""
    return settings.color_wanted() and stream.isatty()


def styled(word: str, stream: IO[str]) -> str:
    """`word` in the colour it stands for, where colour is wanted."""
    return f"\x1b[{_STYLES[word]}m{word}\x1b[0m" if word in _STYLES and has_color(stream) else word


def say(text: str = "") -> None:
    """A line for people."""
    print(printable(redact(text)), file=sys.stderr, flush=True)


def _tell(word: str, text: str) -> None:
    print(f"{styled(word, sys.stderr)}: {printable(redact(text))}", file=sys.stderr, flush=True)


def error(message: str, hint: str | None = None) -> None:
    """What went wrong, and what can be done about it."""
    _tell("error", message)
    if hint:
        _tell("hint", hint)


def warning(message: str, hint: str | None = None) -> None:
    """What is not as it should be but did not stop us."""
    _tell("warning", message)
    if hint:
        _tell("hint", hint)


def warnings(messages: Iterable[str]) -> None:
    """Several; beyond the first few only their number."""
    several = list(messages)
    for message in several[:WARNINGS_SHOWN_MAX]:
        warning(message)
    if len(several) > WARNINGS_SHOWN_MAX:
        warning(f"and {len(several) - WARNINGS_SHOWN_MAX} more; the log has them")


def data(text: str) -> None:
    """A line of the result."""
    print(text, flush=True)


def data_json(value: Any) -> None:
    """The result for programs."""
    print(json.dumps(value, indent=2), flush=True)


def bytes_shown(count: float | None) -> str:
    """`1.5 GiB`; `?` when unknown."""
    if count is None:
        return "?"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(size) < 1024 or unit == "PiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def files_shown(count: int) -> str:
    """`1 file`, `12,000 files`."""
    return "1 file" if count == 1 else f"{count:,} files"
