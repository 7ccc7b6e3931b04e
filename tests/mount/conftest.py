"""Fixtures for tests on a real mount. Every test in this folder has the marker `mount`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support import client_data
from support.leftovers import Ours
from support.mounts import MountedSandbox, MountInputs
from valohai_fuse.sandbox.dataset import InputSpec, SandboxFile
from valohai_fuse.sandbox.valohai import Sandbox

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder, so that `-m "not mount"` works where FUSE does not."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("mount")


@pytest.fixture(scope="session", autouse=True)
def fuse_is_usable() -> None:
    """Says in one sentence what would otherwise be a hundred failures."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.exit("/dev/fuse cannot be opened here; run the rest with: ./scripts/test -m 'not mount'", returncode=1)


@pytest.fixture
def mount_inputs(own_directories: Path) -> Iterator[MountInputs]:
    """`mount_inputs({"data": {"a.bin": ramp(10**6)}}, options=[...], **sandbox_options)` -> a MountedSandbox.

    Unmounts and stops at the end of the test.
    """
    with contextlib.ExitStack() as stack:

        def mount(
            inputs: Mapping[str, InputSpec],
            *,
            options: tuple[str, ...] = (),
            expected_warnings: tuple[str, ...] = (),
            **sandbox_options: Any,
        ) -> MountedSandbox:
            sandbox = stack.enter_context(Sandbox(inputs, root=own_directories / "valohai", **sandbox_options))
            return stack.enter_context(MountedSandbox(sandbox, options=options, expected_warnings=expected_warnings))

        yield mount


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain directory of files in other programs' formats; what is read through a mount is compared with it."""
    return client_data.make(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture(scope="module")
def mounted(source: Path, session_marks: Ours, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedSandbox]:
    """The files of `source` as one mounted input, `data`. There is no api.json: nothing here may need one."""
    files = [SandboxFile(str(path.relative_to(source)), path) for path in sorted(source.rglob("*")) if path.is_file()]
    with (
        Sandbox({"data": files}, root=tmp_path_factory.mktemp("valohai"), api_json=False) as sandbox,
        MountedSandbox(sandbox) as mounted,
    ):
        yield mounted
        sandbox.assert_token_never_leaked()
