"""Everything here stands on real mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder, so that `-m "not mount"` works where FUSE does not."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("mount")
