"""The tools of every day, and every way that a program can ask a kernel for bytes, on a real mount.

As in `test_real_clients`: each line runs in the source directory and in the mounted input, and must print the same.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from support.mounts import MountedSandbox, run_program

pytestmark = pytest.mark.clients

LINES = {
    "grep -r": "grep -r 'with a needle' . | sort",
    "sha256sum": "find . -type f -print0 | sort -z | xargs -0 sha256sum",
    "find -size": "find . -type f -size +1M -printf '%P %s\\n' | sort; find . -empty -type f; find . -size -4k -type f | wc -l",
    "ls -R": "ls -R1",
    "du --apparent-size": "find . -type f -print0 | sort -z | xargs -0 du -b",
    "file": "find . -type f -print0 | sort -z | xargs -0 file",
    "wc": "wc -lc table/rows.csv text/*/*/*.txt",
    "head": "head -c 4097 archive/big.zip | sha256sum",
    "tail": "tail -c 70001 archive/big.zip | sha256sum; tail -n 3 table/rows.csv",
    "dd of odd sizes": "for size in 1 511 4097 65537 1048577; do dd if=text/ramp.bin bs=$size skip=3 count=9 2>&- | cksum; done",
    "dd backwards": "for at in 99 50 12 7 0; do dd if=text/ramp.bin bs=98765 skip=$at count=1 2>&- | sha256sum; done",
    "sqlite3": "sqlite3 'file:db/catalogue.sqlite?immutable=1' 'pragma integrity_check; select sum(bytes) from datums'",
    "tar t": "tar tf archive/images.tar; tar xOf archive/images.tar | sha256sum",
    "eight at once": "find . -type f -print0 | sort -z | xargs -0 -n1 -P8 sha256sum | sort",
}

READERS = {
    "mmap": """
import hashlib, mmap, random
with open("arrays/matrix.npy", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
    places = [random.Random(5).randrange(len(view)) for _ in range(1)] + list(range(0, len(view), 1_234_567))
    print([view[place : place + 3].hex() for place in places], view.find(view[-9:]), hashlib.sha256(view).hexdigest())
""",
    "mmap shared by processes": """
import hashlib, mmap, os
with open("text/ramp.bin", "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
    for part in range(4):
        if os.fork() == 0:
            start = part * len(view) // 4
            os._exit(0 if view[start : start + 251] == (view[:251] * 2)[start % 251 : start % 251 + 251] else 1)
    print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)], hashlib.sha256(view).hexdigest())
""",
    "sendfile": """
import hashlib, os, tempfile
with open("archive/images.tar", "rb") as file, tempfile.TemporaryFile() as copy:
    at = 0
    while sent := os.sendfile(copy.fileno(), file.fileno(), at, 3_000_001): at += sent
    copy.seek(0)
    print(at, hashlib.file_digest(copy, "sha256").hexdigest())
""",
    "splice": """
import hashlib, os
digest, at = hashlib.sha256(), 0
out, into = os.pipe()
with open("text/ramp.bin", "rb") as file:
    while moved := os.splice(file.fileno(), into, 65536, offset_src=at):
        at += moved
        while moved:
            data = os.read(out, moved); digest.update(data); moved -= len(data)
print(at, digest.hexdigest())
""",
    "copy_file_range or its fallback": """
import hashlib, shutil, tempfile, os
with tempfile.TemporaryDirectory() as place:
    shutil.copyfile("archive/images.tar", place + "/copy")
    print(os.path.getsize(place + "/copy"), hashlib.file_digest(open(place + "/copy", "rb"), "sha256").hexdigest())
""",
    "O_DIRECT": """
import hashlib, mmap, os
digest, at, buffer = hashlib.sha256(), 0, mmap.mmap(-1, 1 << 20)
descriptor = os.open("text/ramp.bin", os.O_RDONLY | os.O_DIRECT)
while count := os.preadv(descriptor, [buffer], at):
    digest.update(memoryview(buffer)[:count]); at += count
print(at, digest.hexdigest())
""",
    "pread in threads": """
import concurrent.futures, hashlib, os, random
descriptor = os.open("archive/big.zip", os.O_RDONLY)
size = os.fstat(descriptor).st_size
spots = [(random.Random(n).randrange(size), random.Random(n + 1).choice([1, 4096, 70_000, 1 << 20])) for n in range(200)]
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    data = list(pool.map(lambda spot: os.pread(descriptor, spot[1], spot[0]), spots))
assert all(len(piece) == min(want, size - at) for piece, (at, want) in zip(data, spots)), "a short read before the end"
print(hashlib.sha256(b"".join(data)).hexdigest(), os.pread(descriptor, 10, size), os.pread(descriptor, 10, size + 5000))
""",
}


@pytest.mark.parametrize("name", LINES)
def test_a_tool_prints_the_same(name: str, source: Path, mounted: MountedSandbox) -> None:
    """Exploring with the tools of every day gives what it gives on a disk."""
    expected = run_program(["sh", "-c", LINES[name]], cwd=source)
    assert expected
    assert run_program(["sh", "-c", LINES[name]], cwd=mounted.path("data")) == expected


@pytest.mark.parametrize("name", READERS)
def test_a_way_of_reading_gives_the_same_bytes(name: str, source: Path, mounted: MountedSandbox) -> None:
    """The bytes are exactly the object's, for read, pread, mmap, sendfile, splice, O_DIRECT, any size, any order."""
    expected = run_program([sys.executable, "-c", READERS[name]], cwd=source)
    assert len(expected) > 64
    assert run_program([sys.executable, "-c", READERS[name]], cwd=mounted.path("data")) == expected


@pytest.mark.parametrize(
    "line",
    [
        'cp -r . "$0"',
        'cp -r --sparse=always . "$0"',
        'rsync -a --whole-file ./ "$0/"',
        'tar c . | tar x -C "$0"',
        'tar c --sparse . | tar x -C "$0"',
    ],
)
def test_a_copy_is_the_same(line: str, source: Path, mounted: MountedSandbox, tmp_path: Path) -> None:
    """cp, rsync and tar copy every byte; a file with content is never taken for a hole."""
    copy = tmp_path / "copy"
    copy.mkdir()
    try:
        run_program(["sh", "-c", line, str(copy)], cwd=mounted.path("data"))
        assert run_program(["diff", "-r", str(source), str(copy)], cwd=tmp_path) == ""
        assert sum(path.is_file() for path in copy.rglob("*")) == sum(path.is_file() for path in source.rglob("*"))
    finally:
        for folder in [copy, *copy.rglob("*")]:  # copied modes are read-only, and the copies are large
            if folder.is_dir():
                folder.chmod(0o755)
        run_program(["rm", "-rf", str(copy)], cwd=tmp_path)


def test_attributes_are_those_of_read_only_files(source: Path, mounted: MountedSandbox) -> None:
    """Regular files 0444, directories 0555, owner = who mounted, nlink right, `st_size` exact, `st_blocks` = size rounded up."""
    config = os.stat(os.path.join(mounted.sandbox.config_dir, "inputs.json"))
    top = mounted.path("data")
    for path in [top, *top.rglob("*")]:
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        if stat.S_ISDIR(status.st_mode):
            assert stat.S_IMODE(status.st_mode) == 0o555
            assert status.st_nlink == 2 + sum(child.is_dir() for child in path.iterdir())
        else:
            assert stat.S_ISREG(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o444
            assert status.st_nlink == 1
            assert status.st_size == (source / path.relative_to(top)).stat().st_size
            assert status.st_size <= status.st_blocks * 512 < status.st_size + 4096
            assert int(status.st_mtime) == int(config.st_mtime)


@pytest.mark.parametrize(
    "line",
    [
        "echo x > new",
        "echo x > text/empty.txt",
        "rm text/empty.txt",
        "mkdir new",
        "mv text tixt",
        "chmod 777 text",
        "ln -s a b",
    ],
)
def test_a_write_is_refused(line: str, mounted: MountedSandbox) -> None:
    """Any write, create, rename, unlink, chmod: EROFS."""
    said = run_program(
        ["sh", "-c", f"LC_ALL=C; export LC_ALL; ({line}) 2>&1 && echo worked; true"], cwd=mounted.path("data")
    )
    assert "Read-only file system" in said
    assert "worked" not in said
