"""One line of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """`exit_code` counts when it is a FAIL: 1 API or store, 3 configuration, 4 FUSE."""

    check: str
    verdict: str
    message: str
    hint: str | None = None
    exit_code: int = 0
