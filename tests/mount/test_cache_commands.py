"""`valohai-fuse cache ...` beside a live mount."""

from __future__ import annotations

import json
from pathlib import Path

from support.mounts import MountedSandbox, MountInputs, read_elsewhere, run_cli
from valohai_fuse.sandbox import ramp

MIB = 1024 * 1024


def cache(mounted: MountedSandbox, verb: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `cache VERB`."""
    outcome = run_cli("cache", verb, *mounted.places, *arguments)
    return outcome.returncode, outcome.stdout, outcome.stderr


def read_all(mounted: MountedSandbox) -> None:
    """Every byte of the two files is right."""
    for name in ("a.bin", "sub/b.bin"):
        expected = mounted.sandbox.expected_bytes("data", name)
        assert read_elsewhere(mounted.path("data", name)) == expected


def drop(mounted: MountedSandbox) -> None:
    """Takes the kernel's pages of the mount away, so that a read asks the daemon again."""
    outcome = mounted.unmount()
    assert outcome.returncode == 0, outcome.stderr
    outcome = mounted.mount()
    assert outcome.returncode == 0, outcome.stderr


def test_the_cache_is_looked_after_beside_a_mount(mount_inputs: MountInputs) -> None:
    """info, verify, export, prune and clear, while the mount is up and goes on reading; and with the store down, every byte
    that is cached can be read and exported."""
    mounted = mount_inputs({"data": {"a.bin": ramp(20 * MIB), "sub/b.bin": ramp(70_001)}})
    size = 20 * MIB + 70_001
    read_all(mounted)

    code, out, _ = cache(mounted, "info", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["content_bytes"] == size
    (entry,) = answer["inputs"]
    assert (entry["input"], entry["files_cached"], entry["size"], entry["content_bytes"]) == ("data", 2, size, size)
    assert entry["bytes_on_disk"] == answer["bytes_on_disk"] >= size
    assert 0 <= answer["hit_rate"] <= 1
    code, out, _ = cache(mounted, "info")
    assert code == 0
    assert "cached     20.1 MiB of 20.1 MiB (100%), 322 blocks, 2 of 2 files complete" in out

    code, out, _ = cache(mounted, "verify", "--json")
    assert (code, json.loads(out)["content_bytes"]) == (0, size)

    mounted.sandbox.stop_store()
    mounted.sandbox.stop_api()
    drop(mounted)
    read_all(mounted)
    target = Path(mounted.sandbox.root, "plain")
    code, out, _ = cache(mounted, "export", "data", f"--to={target}", "--json")
    assert (code, json.loads(out)) == (0, {"files": 2, "bytes": size, "incomplete": 0})
    assert (target / "data/a.bin").read_bytes() == mounted.sandbox.expected_bytes("data", "a.bin")
    assert (target / "data/sub/b.bin").read_bytes() == mounted.sandbox.expected_bytes("data", "sub/b.bin")
    mounted.sandbox.start_store()
    mounted.sandbox.start_api()

    code, out, _ = cache(mounted, "prune", "--to=10M", "--json")
    assert code == 0
    assert json.loads(out)["bytes_on_disk"] >= 10 * MIB
    drop(mounted)
    read_all(mounted)
    code, out, err = cache(mounted, "clear")
    assert code == 0
    assert out.startswith("removed ")
    code, _, err = cache(mounted, "export", f"--to={target}")
    assert code == 1
    assert "2 files not completely cached" in err
    drop(mounted)
    read_all(mounted)


def test_what_rotted_is_found_and_fetched_again(mount_inputs: MountInputs) -> None:
    """`cache verify` says with its exit code that there was something, and a second one that all is well."""
    mounted = mount_inputs({"data": {"a.bin": ramp(3 * MIB), "sub/b.bin": ramp(1000)}})
    read_all(mounted)
    (path,) = [path for path in Path(mounted.cache_dir, "v1").rglob("*.0") if path.stat().st_size > MIB]
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"rot")
    code, out, _ = cache(mounted, "verify")
    assert code == 1
    assert "removed: 1 blocks, 0 files" in out
    assert cache(mounted, "verify")[0] == 0
    drop(mounted)
    sent = mounted.sent_bytes()
    read_all(mounted)
    assert mounted.sent_bytes() - sent == 64 * 1024


def test_a_cache_that_is_not_there_is_said(mount_inputs: MountInputs) -> None:
    mounted = mount_inputs({"data": {"a.bin": ramp(10)}})
    for verb in ("info", "verify", "clear"):
        outcome = run_cli("cache", verb, "--cache-dir=/nonexistent/cache")
        assert outcome.returncode == 3
        assert "there is no block cache in /nonexistent/cache" in outcome.stderr
    assert cache(mounted, "prune")[0] == 2
