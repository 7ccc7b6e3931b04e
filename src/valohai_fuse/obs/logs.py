"""Where log lines go and what they look like: `2026-11-23T10:11:12.345Z WARNING train fetch.pool: message`.

Two nets stand below every line, whoever wrote it: secrets are cut (`redaction.redact`, tracebacks included), and a message is
one line, so that a file name cannot forge another. A log that cannot be written never disturbs the process: `logging`'s own
complaints are off.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import time
from io import TextIOWrapper

from valohai_fuse.obs.redaction import printable, redact

FILE_BYTES_MAX = 16 * 1024 * 1024
"""A log file is moved to `.1` at this size; with that one old file, a mount's log takes at most twice as much."""

_CHATTY = ("httpx", "httpcore", "hpack", "urllib3", "asyncio")
"""Libraries whose INFO lines tell each request (with its URL)."""


class LineFormatter(logging.Formatter):
    """Time in UTC, level, what is mounted, module, message; redacted."""

    def __init__(self, subject: str = "") -> None:
        super().__init__()
        self._subject = f" {printable(subject)}" if subject else ""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and below it the traceback where there is one."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        name = record.name.removeprefix("valohai_fuse.")
        head = f"{moment}.{int(record.msecs):03d}Z {record.levelname}{self._subject} {name}: {printable(record.getMessage())}"
        if record.exc_info:
            head += "\n" + self.formatException(record.exc_info)
        return redact(head)


class _PrivateFileHandler(logging.handlers.RotatingFileHandler):
    """0600, and never through a symbolic link that somebody else put there."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.baseFilename, flags, 0o600)
        return TextIOWrapper(
            os.fdopen(descriptor, "ab", buffering=0), encoding="utf-8", errors="backslashreplace", write_through=True
        )


def configure(level: str, *, log_file: str | None, subject: str = "", echo_level: str = "") -> None:
    """Sends all logging of this process to `log_file`, or to stderr when it is None or cannot be opened.

    `level` is a name of `logging`; `subject` says which input or mount the lines are about; with `echo_level` what is at least
    that goes to stderr beside the file. May be called again.
    """
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    handler: logging.Handler
    problem: OSError | None = None
    try:
        handler = (
            _PrivateFileHandler(log_file, maxBytes=FILE_BYTES_MAX, backupCount=1)
            if log_file is not None
            else logging.StreamHandler(sys.stderr)
        )
    except OSError as error:
        handler, problem = logging.StreamHandler(sys.stderr), error
    handlers = [handler]
    if echo_level and isinstance(handler, _PrivateFileHandler):
        echo = logging.StreamHandler(sys.stderr)
        echo.setLevel(echo_level)
        handlers.append(echo)
    for handler in handlers:
        handler.setFormatter(LineFormatter(subject))
        root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = False
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    if problem is not None:
        logging.getLogger(__name__).warning(
            "cannot write the log to %s (%s); it goes to stderr", log_file, problem.strerror
        )
