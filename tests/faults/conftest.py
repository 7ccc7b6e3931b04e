"""Everything here stands on real mounts, made as those of `tests/mount` are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support import at_rest
from support.mounts import MountedSandbox, MountInputs
from valohai_fuse.sandbox.dataset import InputSpec
from valohai_fuse.sandbox.valohai import Sandbox

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder, so that `-m "not mount"` works where FUSE does not."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("mount")


@pytest.fixture
def mount_inputs(own_directories: Path) -> Iterator[MountInputs]:
    """`mount_inputs({"data": {"a.bin": ramp(10**6)}}, options=[...], **sandbox_options)` -> a MountedSandbox.

    At the end of the test whatever was wrong is put right, and then nothing may be left in the mount (`support.at_rest`), which is
    unmounted and stopped.
    """
    made: list[MountedSandbox] = []
    with contextlib.ExitStack() as stack:

        def mount(
            inputs: Mapping[str, InputSpec],
            *,
            options: tuple[str, ...] = (),
            expected_warnings: tuple[str, ...] = (),
            **sandbox_options: Any,
        ) -> MountedSandbox:
            sandbox = stack.enter_context(Sandbox(inputs, root=own_directories / "valohai", **sandbox_options))
            mounted = MountedSandbox(sandbox, options=options, expected_warnings=expected_warnings)
            made.append(stack.enter_context(mounted))
            return mounted

        yield mount
        for mounted in made:
            mounted.sandbox.recover()
        left = [line for mounted in made for line in at_rest.problems(mounted)]
        assert not left, "not at rest after the test:\n" + "\n".join(left)
