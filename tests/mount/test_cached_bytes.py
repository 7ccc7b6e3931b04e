"""What `status` and `info` say of the cache, with a mount and without one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from support.mounts import MountedSandbox, MountInputs, run_cli
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import SandboxFile
from valohai_fuse.sandbox.valohai import Sandbox

MIB = 1024 * 1024


def info(mounted: MountedSandbox, *paths: Path | str) -> list[dict[str, Any]]:
    outcome = mounted.cli("info", "--json", *map(str, paths))
    assert outcome.returncode == 0, outcome.stderr
    answers: list[dict[str, Any]] = json.loads(outcome.stdout)
    return answers


def test_status_says_how_much_is_cached(mount_inputs: MountInputs) -> None:
    """`cached_bytes` for programs, the column CACHED with its share for people; it grows as files are read."""
    mounted = mount_inputs({"data": {"a.bin": ramp(3 * MIB), "b.bin": ramp(MIB)}})
    assert mounted.status()["mounts"][0]["cached_bytes"] == 0
    mounted.path("data", "a.bin").read_bytes()
    assert mounted.status()["mounts"][0]["cached_bytes"] == 3 * MIB
    assert re.search(r"4\.0 MiB +3\.0 MiB \(75%\)", mounted.cli("status").stdout)


def test_info_without_a_mount_comes_from_the_manifest_and_the_cache(own_directories: Path) -> None:
    """Before a mount, after one, and for a directory: the same facts, and what is cached; nothing is made or fetched."""
    files = [SandboxFile("d/a.bin", ramp(MIB)), SandboxFile("d/b.bin", ramp(1000), metadata=[{"label": "cat"}])]
    with Sandbox({"data": files, "other": {"x": b"x"}}, root=own_directories / "valohai") as sandbox:
        mounted = MountedSandbox(sandbox)
        path = mounted.path("data", "d/b.bin")
        (before,) = info(mounted, path)
        assert (before["size"], before["cached_bytes"], before["metadata"]) == (1000, 0, [{"label": "cat"}])
        assert before["uri"].startswith("datum://")
        assert not Path(mounted.cache_dir).exists()
        with mounted:
            mounted.path("data", "d/a.bin").read_bytes()
            (whole,) = info(mounted, mounted.path("data"))
        sent = mounted.sent_bytes()
        (after,) = info(mounted, mounted.path("data"))
        assert after == whole | {"path": after["path"]}
        assert (after["files"], after["size"], after["cached_bytes"]) == (2, MIB + 1000, MIB)
        assert "cached    1.0 MiB" in mounted.cli("info", str(mounted.path("data", "d"))).stdout
        assert mounted.sent_bytes() == sent
        for wrong, words in (("data/nope", "no such file"), ("nope/x", "no input 'nope'"), ("..", "not below a mount")):
            outcome = mounted.cli("info", str(Path(sandbox.inputs_dir, wrong)))
            assert (outcome.returncode, words in outcome.stderr) == (2, True), outcome.stderr


def test_info_never_shows_what_signs_a_uri(own_directories: Path) -> None:
    """A `uri` that is itself a URL with credentials and a signature loses both."""
    uri = "https://user:secret@store.example/a.bin?X-Amz-Signature=deadbeef"
    files = [SandboxFile("a.bin", ramp(10), overrides={"uri": uri})]
    with Sandbox({"data": files}, root=own_directories / "valohai") as sandbox:
        mounted = MountedSandbox(sandbox)
        outcome = run_cli("info", *mounted.places, "--json", str(mounted.path("data", "a.bin")))
        assert json.loads(outcome.stdout)[0]["uri"] == "https://store.example/a.bin"
        assert "secret" not in outcome.stdout
        assert "deadbeef" not in outcome.stdout
