"""Room for descriptors, as the kernel tells of it (`FDSize` in proc(5)), in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from valohai_fuse.descriptors import DESCRIPTORS_EXPECTED

_CHILD = """
import resource, sys
from pathlib import Path
from valohai_fuse.descriptors import expand_descriptor_table
if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
opened = len(list(Path("/proc/self/fd").iterdir()))
expand_descriptor_table()
assert len(list(Path("/proc/self/fd").iterdir())) == opened
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("FDSize")).split()[1])
"""


@pytest.mark.parametrize(("limit", "least"), [(0, DESCRIPTORS_EXPECTED), (700, 700)])
def test_there_is_room_within_the_limit_and_nothing_stays_open(limit: int, least: int) -> None:
    command = [sys.executable, "-c", _CHILD, str(limit)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert least <= int(said)
