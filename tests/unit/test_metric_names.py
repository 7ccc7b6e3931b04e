"""Every metric that the source counts stands in the tables of names, and every name there is counted."""

from __future__ import annotations

import ast
from pathlib import Path

import valohai_fuse
from valohai_fuse.obs.metrics import COUNTERS, GAUGES


def test_every_name_counted_is_listed() -> None:
    unlisted = set()
    for source in Path(valohai_fuse.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            first = node.args[0]
            if not (
                isinstance(first, ast.Constant)
                and isinstance(first.value, str)
                and "metrics" in ast.unparse(node.func.value)
            ):
                continue
            table = {"count": COUNTERS, "gauge": GAUGES}.get(node.func.attr)
            if table is not None and first.value not in table:
                unlisted.add((source.name, first.value))
    assert unlisted == set()


def test_every_name_listed_is_counted() -> None:
    """A name that nothing ever sets would say for ever that all is well."""
    package = Path(valohai_fuse.__file__).parent
    readers = {package / "obs" / "metrics.py", package / "cli" / "status.py"}
    named = {
        node.value
        for source in package.rglob("*.py")
        if source not in readers
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(COUNTERS) | set(GAUGES) <= named
