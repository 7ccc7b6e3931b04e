"""Progress goes to stderr, one line each: stdout is for the tables."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Tells the person what is going on."""
    sys.stderr.write(f"bench: {text}\n")
    sys.stderr.flush()
