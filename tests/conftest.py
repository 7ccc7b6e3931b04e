"""What holds for every test: no unexpected warning in the log, nothing left behind, never the real directories.

- A record of level WARNING or above fails the test, unless it matches a regular expression of
  `@pytest.mark.expect_warnings("...", ...)` (no expression: any), or the test looks at the log itself (`caplog`).
- A mount, process or descriptor that was not there before fails the test. Fixtures of wider scope come first, so what
  they hold is no leftover.
- VH_* and VALOHAI_FUSE_* point into a directory of the test's own.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import valohai_fuse
from support.leftovers import Ours, Snapshot, left_since
from valohai_fuse.settings import OPTIONS

SOURCES = Path(valohai_fuse.__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker of this file."""
    config.addinivalue_line(
        "markers", "expect_warnings(*regexes): the test provokes these log records of level WARNING+"
    )


@pytest.fixture(scope="session")
def session_marks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ours]:
    """Marks every process started from here on as ours, by its TMPDIR. The path is short: it holds unix sockets."""
    directory = tempfile.mkdtemp(prefix="vf-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", directory)
        patch.setenv("PYTHONPATH", str(SOURCES))  # a daemon's working directory is /, so it must be absolute
        yield Ours(b"TMPDIR=" + directory.encode(), (directory, str(tmp_path_factory.getbasetemp())))
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left_behind(session_marks: Ours) -> Iterator[None]:
    """Fails a test that leaves a mount, a process or a descriptor. First of the autouse fixtures, so torn down last."""
    before = Snapshot.take(session_marks)
    yield
    left = left_since(before, session_marks)
    assert not left, "left behind:\n" + "\n".join(left)


@pytest.fixture(autouse=True)
def own_directories(nothing_left_behind: None, session_marks: Ours, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short-named directory of this test; settings taken from the environment point into it."""
    base = Path(tempfile.mkdtemp(dir=session_marks.directories[0]))
    for option in OPTIONS:
        monkeypatch.delenv(option.env, raising=False)
    for variable, name in (
        ("VH_CONFIG_DIR", "config"),
        ("VH_INPUTS_DIR", "inputs"),
        ("VALOHAI_FUSE_CACHE_DIR", "cache"),
        ("VALOHAI_FUSE_RUNTIME_DIR", "run"),
    ):
        monkeypatch.setenv(variable, str(base / name))
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_unexpected_warning(request: pytest.FixtureRequest, own_directories: Path) -> Iterator[None]:
    """Fails a test during which something logs a WARNING or worse that it did not announce.

    Sits in the record factory, not in a handler: handlers can be replaced by the code under test.
    """
    loud: list[str] = []
    factory = logging.getLogRecordFactory()

    def watch(*args: object, **kwargs: object) -> logging.LogRecord:
        record: logging.LogRecord = factory(*args, **kwargs)
        if record.levelno >= logging.WARNING:
            loud.append(f"{record.levelname} {record.name}: {record.getMessage()}")
        return record

    logging.setLogRecordFactory(watch)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
    if "caplog" in request.fixturenames:
        return
    unexpected = [line for line in loud if not _is_expected(line, request)]
    assert not unexpected, "logged unexpectedly:\n" + "\n".join(unexpected)


def _is_expected(line: str, request: pytest.FixtureRequest) -> bool:
    markers = list(request.node.iter_markers("expect_warnings"))
    return any(not marker.args or any(re.search(regex, line) for regex in marker.args) for marker in markers)
