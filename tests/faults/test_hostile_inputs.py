"""Manifests, answers and stores that mean harm, on a real mount: no crash, no hang, no flood of memory, a clear message."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.mounts import GIVEN_UP, MountInputs, read_elsewhere
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import Ramp, ramp, read_all
from valohai_fuse.sandbox.dataset import SandboxFile, SandboxInput
from valohai_fuse.sandbox.messages import Response, text_response
from valohai_fuse.sandbox.script import Fault, Situation

EXABYTE = 10**18
ALIASES = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (letter, letter, b",".join([b"*%c" % (letter - 1)] * 9)) for letter in range(ord("b"), ord("z"))
)


def test_every_character_in_a_name(mount_inputs: MountInputs) -> None:
    """Control characters, quotes, percent signs, line ends, letters of every script: listed byte for byte, and readable; and
    none of them forges a line of the log."""
    forged = "x\n2026-01-01T00:00:00.000Z ERROR forged: by a name"
    characters = [chr(code) for code in (*range(1, 0x100), 0x20AC, 0x1F600, 0x200B, 0xFEFF, 0x202E) if chr(code) != "/"]
    names = [f"<{character}>" for character in characters] + [forged, "%2e%2e", " ", "...", "-rf", "~", "a" * 255]
    content = {name: f"{number}\n".encode() for number, name in enumerate(names)}
    mounted = mount_inputs({"data": content}, options=("--log-level=DEBUG", "--readahead=0"))
    directory = os.fsencode(mounted.path("data"))
    assert sorted(os.listdir(directory)) == sorted(name.encode() for name in names)
    for name in names[::5] + names[-7:]:
        with open(os.path.join(directory, name.encode()), "rb") as file:
            assert file.read() == content[name]
    assert os.path.getsize(os.path.join(directory, forged.encode())) == len(content[forged])
    assert not re.search(r"^2026-01-01", mounted.log(), re.MULTILINE)


def test_a_hundred_levels(mount_inputs: MountInputs) -> None:
    """100 directories and names of 255 bytes: a path beyond PATH_MAX, walked as find(1) walks it."""
    # Of the longest only one, for the store's URL of it must not be longer than servers read.
    levels = [f"{number:040}" for number in range(99)] + ["\u00e9" * 127 + "x"]
    mounted = mount_inputs({"data": {"/".join([*levels, "f" * 255]): ramp(100_000)}})
    here = os.open(mounted.path("data"), os.O_RDONLY | os.O_DIRECTORY)
    for level in levels:
        assert os.listdir(here) == [level]
        below = os.open(level, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    file = os.open("f" * 255, os.O_RDONLY, dir_fd=here)
    assert os.pread(file, 200_000, 0) == read_all(Ramp(100_000), 0, 100_000)
    os.close(file)
    os.close(here)


def test_sizes_of_every_sort(mount_inputs: MountInputs) -> None:
    """An exabyte is read at both ends; what is no size is asked of the store, and is then the truth."""
    files = [SandboxFile("huge", Ramp(EXABYTE)), SandboxFile("largest", Ramp(2**63 - 1))]
    odd = {"negative": -5, "float": 1.5, "beyond": 2**64, "null": None, "zero": 0}
    files += [SandboxFile(name, ramp(70_000), overrides={"size": size}) for name, size in odd.items()]
    mounted = mount_inputs({"data": SandboxInput(files)}, expected_warnings=("the size cannot be",))
    for name, size in (("huge", EXABYTE), ("largest", 2**63 - 1)):
        assert mounted.path("data", name).stat().st_size == size
        assert read_elsewhere(mounted.path("data", name), 0, 10) == read_all(Ramp(size), 0, 10)
    end = EXABYTE - 100_000
    assert read_elsewhere(mounted.path("data", "huge"), end, EXABYTE) == read_all(Ramp(EXABYTE), end, EXABYTE)
    for name in odd:
        assert mounted.path("data", name).stat().st_size == 70_000
        assert read_elsewhere(mounted.path("data", name)) == read_all(Ramp(70_000), 0, 70_000)
    assert json.loads(mounted.cli("info", "--json", str(mounted.path("data"))).stdout)[0]["size"] > EXABYTE


LOCATIONS = {
    "file:///etc/passwd": "file:",
    "unix:///run/docker.sock": "unix:",
    "http://169.254.169.254/latest/meta-data/iam": "own network",
    "http://[fe80::1]/x": "own network",
    "http://0xa9fea9fe/x": "own network",
    "http://h/x\r\nX-Injected: 1": "control characters",
    "http://h\u2028/x y": "control characters",
    "gopher://127.0.0.1:70/x": "gopher:",
    "//h/x": "not a URL",
    "http://": "no host",
    "http://h/" + "x" * 20_000: "its URL has 200",
}


def test_locations_that_must_not_be_fetched(mount_inputs: MountInputs) -> None:
    """Valohai is asked for others, once; where it has none either, EIO, and the log says why without the location."""
    files = [
        SandboxFile(f"{number}", ramp(1000), overrides={"storage_uri": f"{location}?sig=s3cr3t"})
        for number, location in enumerate(LOCATIONS)
    ]
    mounted = mount_inputs({"data": files}, options=("--readahead=0",), expected_warnings=GIVEN_UP)
    for number in range(len(files)):
        assert read_elsewhere(mounted.path("data", f"{number}")) == read_all(Ramp(1000), 0, 1000)  # with Valohai's URL
    assert mounted.sandbox.api.renewals() == 1
    assert mounted.unmount().returncode == 0
    mounted.sandbox.api.faults.add(faults.answer_is([]), count=None)
    assert mounted.mount(f"--cache-dir={mounted.cache_dir}-2").returncode == 0
    for number, reason in enumerate(LOCATIONS.values()):
        with pytest.raises(OSError, match=r"\[Errno 5\]"):
            read_elsewhere(mounted.path("data", f"{number}"))
        assert re.search(rf"gave up on {number}: .*{reason}", mounted.log())
    assert "s3cr3t" not in mounted.log()
    assert "X-Injected" not in mounted.log()


def test_an_answer_that_unpacks_without_end(mount_inputs: MountInputs) -> None:
    """Fifty megabytes out of fifty kilobytes: refused as what it is, with the daemon as small as before."""
    packed = gzip.compress(b" " * (50 << 20))

    def act(_: Response, __: Situation) -> Response:
        answer = text_response(200, packed, "application/json")
        answer.headers["Content-Encoding"] = "gzip"
        return answer

    mounted = mount_inputs({"data": {"f": ramp(1000)}}, options=("--read-timeout=5",), expected_warnings=GIVEN_UP)
    before = sum(map(_resident_bytes_max, mounted.daemon_pids()))
    mounted.sandbox.expire_urls()
    mounted.sandbox.api.faults.add(Fault("bomb", act))
    assert read_elsewhere(mounted.path("data", "f")) == read_all(Ramp(1000), 0, 1000)
    assert sum(map(_resident_bytes_max, mounted.daemon_pids())) - before < 32 << 20
    assert mounted.sandbox.api.renewals() >= 2


def _resident_bytes_max(pid: int) -> int:
    """Anonymous memory, for pages of a mapped file are not the daemon's own."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("inputs.json", b"[" * 1_000_000),
        ("inputs.json", b'{"a":{"files":' + b"[" * 1_000_000),
        ("inputs.json", b'{"a":{"files":[{"name":"x","size":' + b"9" * 1_000_000 + b"}]}}"),
        ("inputs.json", b"\x00" * 1_000_000),
        ("inputs.yaml", b"{" * 1_000_000),
        ("inputs.yaml", ALIASES),
    ],
    ids=["open brackets", "open files", "a number", "zeros", "open braces", "aliases"],
)
def test_a_manifest_that_is_a_bomb(name: str, content: bytes, own_directories: Path) -> None:
    """Exit code 3, a sentence and no traceback, within bounds that a limit on memory enforces."""
    config = own_directories / "config"
    config.mkdir()
    (config / name).write_bytes(content)
    command = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); sys.argv[0] = 'valohai-fuse'; "
    command += "from valohai_fuse.cli.main import main; sys.exit(main())"
    outcome = subprocess.run(
        [sys.executable, "-c", command, "mount", f"--config-dir={config}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode == 3, outcome.stderr[-2000:]
    assert outcome.stderr.startswith(f"error: {config}/{name}: ")
    assert len(outcome.stderr) < 1000
    assert "Traceback" not in outcome.stderr


def test_a_redirect_of_the_api_takes_no_token_along(mount_inputs: MountInputs) -> None:
    """A redirect to another host is not followed, for the token is for Valohai alone; nor is one of the store given anything."""
    mounted = mount_inputs({"data": {"f": ramp(1000)}}, options=("--read-timeout=2",), expected_warnings=GIVEN_UP)
    sandbox = mounted.sandbox
    elsewhere = sandbox.elsewhere
    sandbox.expire_urls()
    for code in (302, 307, 308):
        sandbox.api.faults.add(faults.redirect_elsewhere(elsewhere.origin, code))
    sandbox.store.faults.add(faults.redirect_elsewhere(elsewhere.origin))
    with pytest.raises(OSError, match=r"\[Errno 110\]"):
        read_elsewhere(mounted.path("data", "f"))
    sandbox.api.faults.clear()
    sandbox.store.faults.clear()
    assert not elsewhere.requests_for("*request-input*")
    sandbox.assert_token_never_leaked()
