"""Files made out of pieces: resumed only where the bytes agree, complete or not there at all, never outside of the target."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.ports import ObjectKey
from valohai_fuse.sandbox.content import ramp, read_all
from valohai_fuse.store.copies import ChecksumError, Copy, InTheWayError, OtherVersionError

SIZE = 2 * SEGMENT_BYTES + 1000
CONTENT = read_all(ramp(SIZE))
PIECES = [Extent(0, SEGMENT_BYTES), Extent(SEGMENT_BYTES, 2 * SEGMENT_BYTES), Extent(2 * SEGMENT_BYTES, SIZE)]


class Target:
    def __init__(self, path: Path) -> None:
        self.path = path / "target"
        self.partial = self.path / "partial"
        self.partial.mkdir(parents=True)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def copy(self, name: str = "data/d/a.bin", size: int = SIZE) -> Copy:
        return Copy(ObjectKey("datum:1", size), name, self.fd, str(self.partial))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    made = Target(tmp_path)
    yield made
    os.close(made.fd)


def write(copy: Copy, *pieces: Extent, version: str = '"v1"') -> None:
    for piece in pieces:
        copy.write(piece, CONTENT[piece.start : piece.stop], version)


def test_a_file_appears_when_all_of_it_is_there(target: Target) -> None:
    """Pieces in any order; the name, mode and time come at the end, and nothing is left in the partial directory."""
    copy = target.copy()
    write(copy, PIECES[2], PIECES[0])
    assert not copy.is_complete()
    assert not (target.path / "data").exists()
    write(copy, PIECES[1])
    copy.complete({"sha256": hashlib.sha256(CONTENT).hexdigest(), "md5": "wrong, but the weaker one"}, 5 * 10**9)
    made = target.path / "data/d/a.bin"
    assert made.read_bytes() == CONTENT
    assert (made.stat().st_mode & 0o777, made.stat().st_mtime) == (0o644, 5)
    assert copy.is_complete()
    assert os.listdir(target.partial) == []


def test_a_later_copy_goes_on_with_what_the_bytes_confirm(target: Target) -> None:
    """A damaged piece, one that was lost, a torn line: fetched again; what agrees is not."""
    write(target.copy(), *PIECES)
    again = target.copy()
    assert again.missing() == []
    with open(again.part_path, "r+b") as part:
        part.seek(SEGMENT_BYTES + 5)
        part.write(b"\xff")
    assert target.copy().missing() == [PIECES[1]]
    os.truncate(again.part_path, SIZE - 1)
    assert target.copy().missing() == PIECES[1:]
    journal = Path(again.part_path).with_suffix(".journal")
    journal.write_text(journal.read_text()[: -len("2 0123456789abcdef") - 5])
    assert target.copy().missing() == PIECES[1:]
    journal.write_bytes(b"\xff\xfenonsense")
    assert target.copy().missing() == PIECES
    write(again := target.copy(), *PIECES)
    again.complete({}, 0)
    assert (target.path / "data/d/a.bin").read_bytes() == CONTENT


def test_two_versions_never_meet_in_one_file(target: Target) -> None:
    """A resumed file is of the version it began with; another object of the same name begins anew."""
    write(target.copy(), PIECES[0])
    resumed = target.copy()
    assert resumed.missing() == PIECES[1:]
    with pytest.raises(OtherVersionError):
        write(resumed, PIECES[1], version='"v2"')
    resumed.discard()
    assert target.copy().missing() == PIECES
    write(target.copy(), PIECES[0])
    assert target.copy(size=SIZE + 1).missing()[0] == PIECES[0]


def test_a_wrong_checksum_leaves_nothing(target: Target) -> None:
    copy = target.copy()
    write(copy, *PIECES)
    with pytest.raises(ChecksumError, match="md5"):
        copy.complete({"md5": "0" * 32}, 0)
    assert os.listdir(target.partial) == []
    assert not copy.is_complete()


def test_small_and_empty_files_need_no_journal(target: Target) -> None:
    empty = target.copy("data/empty", 0)
    assert empty.missing() == []
    empty.complete({}, 0)
    assert (target.path / "data/empty").read_bytes() == b""
    small = target.copy("data/small", 10)
    small.write(Extent(0, 10), b"0123456789", "")
    assert len(os.listdir(target.partial)) == 1
    small.complete({}, 0)
    assert (target.path / "data/small").read_bytes() == b"0123456789"


def test_what_is_in_the_way_is_left_alone(target: Target, tmp_path: Path) -> None:
    """A file of another size, a directory, a link as the file or on the way there: refused, not overwritten, not followed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (target.path / "link").symlink_to(elsewhere)
    (target.path / "short").write_bytes(b"mine")
    (target.path / "to").symlink_to(elsewhere / "x")
    (target.path / "directory").mkdir()
    for name in ("link/a", "short", "to", "directory", "short/a"):
        with pytest.raises(InTheWayError):
            target.copy(name, 10).is_complete()
    late = target.copy("link/a", 10)
    late.write(Extent(0, 10), b"0123456789", "")
    with pytest.raises(InTheWayError):
        late.complete({}, 0)
    assert os.listdir(elsewhere) == []
    assert (target.path / "short").read_bytes() == b"mine"
