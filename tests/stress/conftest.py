"""Short forms of these run in CI; the long ones have the marker `slow` and are run by scripts/stress."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them mount."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("mount")
