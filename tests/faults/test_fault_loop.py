"""Each kind of fault of a store and of the API, at each opportunity, on a real mount: right bytes or the promised errno.

The kinds and what each may lead to stand in `support.fault_kinds`, the loop in `support.fault_loop`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fault_loop import OPTIONS, SIZE_BYTES, FaultLoop, Thoroughness, forms, inputs
from support.mounts import GIVEN_UP, MountedSandbox
from support.reader_process import Readers
from support.tls_hosts import TlsHosts
from valohai_fuse.sandbox.valohai import Sandbox


@contextlib.contextmanager
def fault_loop(directory: Path, thoroughness: Thoroughness) -> Iterator[FaultLoop]:
    """A loop over a fresh mount of everything under one root."""
    with (
        Sandbox(inputs(thoroughness), root=directory / "valohai", forms=forms()) as sandbox,
        TlsHosts(sandbox) as tls,
        Readers() as readers,
    ):
        root = directory / "root"
        options = [f"--root={root}", f"--readahead={thoroughness.readahead}", f"--ca-file={tls.authority}", *OPTIONS]
        with MountedSandbox(sandbox, options=options, expected_warnings=GIVEN_UP) as mounted:
            yield FaultLoop(sandbox, mounted, root, readers, thoroughness, tls)
            mounted.cli("unmount", str(root))


def test_every_fault_at_every_opportunity(own_directories: Path) -> None:
    """Whatever a store or the API does wrong, once or for ever: right bytes or the errno of the table, in time; afterwards
    the mount is alive, well again, and nothing is leaked."""
    with fault_loop(own_directories, Thoroughness(1, 1, 0.0, lengthy=False)) as loop:
        loop.run()
    assert not loop.problems, "\n".join(sorted(loop.problems))
    assert loop.hits > 150, "a loop that hardly hits anything proves nothing"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "thoroughness",
    [Thoroughness(4, 3, 120.0), Thoroughness(2, 1, 120.0, readahead="64M", extents=((0, SIZE_BYTES),))],
    ids=["parts", "whole files"],
)
def test_every_fault_at_every_opportunity_at_length(thoroughness: Thoroughness, own_directories: Path) -> None:
    """The same, with faults that stay from the first, second, third request on, until the API is well again; and for whole files
    with readahead."""
    with fault_loop(own_directories, thoroughness) as loop:
        loop.run()
    assert not loop.problems, "\n".join(sorted(loop.problems))
