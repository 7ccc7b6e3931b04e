"""What a writer does to a file: `store.landing`."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BYTES
from valohai_fuse.ports import ObjectKey
from valohai_fuse.store import landing
from valohai_fuse.store.huge import HUGE_BYTES, HugePages
from valohai_fuse.store.landing import SegmentWriter
from valohai_fuse.store.mappings import KEPT_S, MAPPINGS_MAX
from valohai_fuse.store.opened import OpenSegment

SIZE = SEGMENT_BYTES + 3 * BLOCK_BYTES + 7
KEY = ObjectKey("datum:x", SIZE)
BLOCK = (bytes(range(251)) * 300)[:BLOCK_BYTES]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "segment")


def land(path: str, offset: int, data: bytes, version: str = "v", key: ObjectKey = KEY) -> None:
    with SegmentWriter(path, key, offset // SEGMENT_BYTES, version) as writer:
        writer.land(offset, data)


def present(path: str) -> list[int]:
    table = segment.decode_table(Path(path).read_bytes()[: segment.PAGE_BYTES].ljust(segment.PAGE_BYTES, b"\0"))
    return [block for block, entry in enumerate(table) if entry]


def test_the_file_is_what_the_format_says(path: str) -> None:
    """Header, entry and block at their places, all else a hole."""
    land(path, SEGMENT_BYTES + 2 * BLOCK_BYTES, BLOCK + b"end....")
    content = Path(path).read_bytes()
    seed = segment.hash_seed(segment.object_digest("datum:x", SIZE), "v")
    expected = bytearray(4096 + 3 * BLOCK_BYTES + 7)
    expected[:3072] = segment.encode_header("datum:x", SIZE, 1, "v")
    expected[3072 + 16 : 3072 + 32] = segment.encode_entries(memoryview(BLOCK + b"end...."), seed, 130)
    expected[4096 + 2 * BLOCK_BYTES :] = BLOCK + b"end...."
    assert content == bytes(expected)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(path).st_blocks * 512 < 3 * BLOCK_BYTES, "the missing blocks take no room"


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (1, BLOCK_BYTES),
        (0, 0),
        (0, BLOCK_BYTES - 1),
        (SEGMENT_BYTES - BLOCK_BYTES, 2 * BLOCK_BYTES),
        (SEGMENT_BYTES, BLOCK_BYTES),
    ],
)
def test_only_whole_blocks_of_the_segment_are_landed(path: str, offset: int, length: int) -> None:
    with SegmentWriter(path, KEY, 0, "v") as writer, pytest.raises(ValueError, match="not "):
        writer.land(offset, bytes(length))
    assert present(path) == []


def test_only_the_objects_last_block_may_be_short(path: str) -> None:
    with SegmentWriter(path, KEY, 1, "v") as writer:
        with pytest.raises(ValueError, match="not whole blocks"):
            writer.land(SEGMENT_BYTES + 3 * BLOCK_BYTES, bytes(6))
        writer.land(SEGMENT_BYTES + 3 * BLOCK_BYTES, bytes(7))
    assert present(path) == [3]


def test_there_is_no_segment_beyond_the_object(path: str) -> None:
    with pytest.raises(ValueError, match="no segment 2"):
        SegmentWriter(path, KEY, 2, "v")
    with pytest.raises(ValueError, match="no segment 0"):
        SegmentWriter(path, ObjectKey("empty", 0), 0, "v")
    assert not os.path.exists(path)


def test_any_buffer_will_do(path: str) -> None:
    with SegmentWriter(path, KEY, 0, "v") as writer:
        writer.land(0, bytearray(BLOCK))
        writer.land(BLOCK_BYTES, memoryview(BLOCK + BLOCK)[5 : 5 + BLOCK_BYTES])
    assert Path(path).read_bytes()[4096:] == BLOCK + (BLOCK + BLOCK)[5 : 5 + BLOCK_BYTES]


def test_writers_of_the_same_version_add_to_one_another(path: str) -> None:
    with SegmentWriter(path, KEY, 0, "v") as one, SegmentWriter(path, KEY, 0, "v") as two:
        one.land(0, BLOCK)
        two.land(BLOCK_BYTES, BLOCK)
        one.land(2 * BLOCK_BYTES, BLOCK)
    assert present(path) == [0, 1, 2]


def test_a_file_of_another_version_is_replaced_and_stays_whole_for_who_has_it_open(path: str) -> None:
    land(path, 0, BLOCK, "v1")
    before = Path(path).read_bytes()
    with open(path, "rb") as reader:
        land(path, BLOCK_BYTES, BLOCK, "v2")
        assert reader.read() == before
    assert present(path) == [1]


@pytest.mark.parametrize("found", [b"x", b"\0" * 5000, b"x" * 5000, b"\x89VFSEG\r\n", "cut", "flipped"])
def test_rubbish_is_written_over_without_believing_its_table(path: str, found: bytes | str) -> None:
    """Also a file of which a crash left a part of the header."""
    land(path, 0, BLOCK)
    if found == "cut":
        os.truncate(path, 1000)
    elif found == "flipped":
        with open(path, "r+b") as file:
            file.seek(2000)
            file.write(b"\1")
    else:
        assert isinstance(found, bytes)
        Path(path).write_bytes(found)
    land(path, 2 * BLOCK_BYTES, BLOCK)
    assert present(path) == [2]
    assert Path(path).read_bytes()[:3072] == segment.encode_header("datum:x", SIZE, 0, "v")


def test_an_empty_file_is_one_that_is_just_being_made(path: str) -> None:
    Path(path).touch()
    inode = os.stat(path).st_ino
    land(path, 0, BLOCK)
    assert (present(path), os.stat(path).st_ino) == ([0], inode)


def test_links_are_not_followed(path: str, tmp_path: Path) -> None:
    """Nobody but us can place one there; should it happen all the same, what it points to is not written to."""
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    os.symlink(target, path)
    with pytest.raises(OSError, match="symbolic links"):
        SegmentWriter(path, KEY, 0, "v")
    assert target.read_bytes() == b"precious"


def test_errors_of_the_disk_come_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SegmentWriter(str(tmp_path / "no" / "such"), KEY, 0, "v")
    with pytest.raises(IsADirectoryError):
        SegmentWriter(str(tmp_path), KEY, 0, "v")


def test_short_writes_are_continued(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may write less than it was given, as before ENOSPC or at a signal."""
    real = os.pwrite

    def a_little(fd: int, data: bytes | memoryview, offset: int) -> int:
        return real(fd, bytes(data[:1000]), offset)

    monkeypatch.setattr(os, "pwrite", a_little)
    land(path, 0, BLOCK)
    monkeypatch.undo()
    assert Path(path).read_bytes()[4096:] == BLOCK
    assert present(path) == [0]


def test_a_write_without_progress_ends(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(fd: int, data: bytes | memoryview, offset: int) -> int:
        return 0

    monkeypatch.setattr(os, "pwrite", nothing)
    with pytest.raises(OSError, match="no progress"):
        SegmentWriter(path, KEY, 0, "v")


def test_no_descriptor_is_left_behind(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    land(path, 0, BLOCK)
    writer = SegmentWriter(path, KEY, 0, "v")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="cannot be stored"):
        SegmentWriter(path, KEY, 0, "v" * 2000)

    def fails(fd: int, length: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(OSError, match="Input/output"):
        SegmentWriter(path, KEY, 0, "v")
    assert os.listdir("/proc/self/fd") == before


# --- segments in memory -----------------------------------------------------------------------------------------------


def memory_path(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"


def memfd(key: ObjectKey = KEY, index: int = 0) -> int:
    """As `store.memory` makes one."""
    fd = os.memfd_create(landing.MEMORY_NAME)
    os.ftruncate(fd, segment.PAGE_BYTES + segment.segment_bytes(key.size, index))
    os.pwrite(fd, segment.encode_header(key.stable_id, key.size, index, "") + segment.EMPTY_TABLE, 0)
    return fd


def fill(writer: SegmentWriter, start: int, data: bytes) -> None:
    """As a transfer does it: in odd cuts, vouched for in two steps."""
    writer.map(start, start + len(data))
    for at in range(0, len(data), 10_007):
        writer.put(data[at : at + 10_007])
    if len(data) > BLOCK_BYTES:
        writer.vouch(start, start + BLOCK_BYTES)
        start, data = start + BLOCK_BYTES, data[BLOCK_BYTES:]
    writer.vouch(start, start + len(data))


def test_landing_in_memory(path: str) -> None:
    """The same bytes as in a file."""
    fd = memfd()
    land(memory_path(fd), 0, BLOCK)
    land(memory_path(fd), BLOCK_BYTES, BLOCK)
    land(path, 0, BLOCK + BLOCK)
    assert os.pread(fd, len(Path(path).read_bytes()), 0) == Path(path).read_bytes()
    os.close(fd)


def test_another_version_takes_the_memory_over() -> None:
    fd = memfd()
    land(memory_path(fd), 0, BLOCK, "v1")
    land(memory_path(fd), BLOCK_BYTES, BLOCK, "v2")
    page = os.pread(fd, 4096, 0)
    assert page[:3072] == segment.encode_header("datum:x", SIZE, 0, "v2")
    assert [block for block, entry in enumerate(segment.decode_table(page)) if entry] == [1]
    os.close(fd)


DIRECT = ObjectKey("datum:large", SEGMENT_BYTES + 3 * BLOCK_BYTES + 5)


@pytest.mark.parametrize(("start", "stop"), [(0, SEGMENT_BYTES), (BLOCK_BYTES, 17 * BLOCK_BYTES), (0, BLOCK_BYTES)])
@pytest.mark.parametrize("direct", [True, False])
def test_what_landed_in_memory_is_copied_to_the_same_file(
    path: str, start: int, stop: int, *, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole segments, parts, with and without the page cache: the file is as if it had been landed in."""
    if not direct:
        monkeypatch.setattr(landing, "_write_directly", lambda *_: 0)
    data = os.urandom(stop - start)
    fd = memfd(DIRECT)
    with SegmentWriter(memory_path(fd), DIRECT, 0, "v") as writer:
        fill(writer, start, data)
        writer.copy_out(path, DIRECT, "v", start, stop)
    with SegmentWriter(path + "2", DIRECT, 0, "v") as writer:
        writer.land(start, data)
    assert Path(path).read_bytes() == Path(path + "2").read_bytes()
    os.close(fd)


def test_the_end_of_an_object_is_copied_although_it_is_no_whole_page(path: str) -> None:
    data = os.urandom(3 * BLOCK_BYTES + 5)
    fd = memfd(DIRECT, 1)
    with SegmentWriter(memory_path(fd), DIRECT, 1, "v") as writer:
        fill(writer, SEGMENT_BYTES, data)
        writer.copy_out(path, DIRECT, "v", SEGMENT_BYTES, DIRECT.size)
    assert Path(path).read_bytes()[segment.DATA_OFFSET :] == data
    os.close(fd)


def test_a_disk_that_refuses_is_told_and_nothing_stays_open(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error still holds on to the memory that it was writing when the writer is closed."""
    pwrite = os.pwrite

    def refuse(fd: int, data: bytes, offset: int) -> int:
        if len(data) >= BLOCK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    fd = memfd(DIRECT)
    before = len(os.listdir("/proc/self/fd"))
    writer = SegmentWriter(memory_path(fd), DIRECT, 0, "v")
    fill(writer, 0, bytes(8 * BLOCK_BYTES))
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="No space left"):
        copy_and_close(writer, path)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def copy_and_close(writer: SegmentWriter, path: str) -> None:
    """As a worker does it."""
    try:
        writer.copy_out(path, DIRECT, "v", 0, 8 * BLOCK_BYTES)
    finally:
        writer.close()


def test_what_somebody_else_put_there_is_not_vouched_for() -> None:
    """A request that was given up may still write where another has put its bytes."""
    fd = memfd(DIRECT)
    with SegmentWriter(memory_path(fd), DIRECT, 0, "v") as writer:
        writer.map(0, 2 * BLOCK_BYTES)
        writer.put(bytes(2 * BLOCK_BYTES))
        os.pwrite(fd, b"another", segment.DATA_OFFSET + BLOCK_BYTES + 17)
        writer.vouch(0, 2 * BLOCK_BYTES)
        with pytest.raises(ValueError, match="has not come"):
            writer.vouch(2 * BLOCK_BYTES, 3 * BLOCK_BYTES)
    opened = OpenSegment(fd, DIRECT, 0, never_waits=True)
    contents = opened.refresh(nowait=False)
    assert contents is not None
    assert opened.read_blocks(contents, 0, memoryview(bytearray(2 * BLOCK_BYTES)), nowait=False) == 1


def test_memory_that_was_spoilt_meanwhile_does_not_verify_in_the_file(path: str) -> None:
    """A segment's memory is used again while its blocks are still being written: they are absent, never wrong."""
    fd = memfd(DIRECT)
    with SegmentWriter(memory_path(fd), DIRECT, 0, "v") as writer:
        fill(writer, 0, bytes(2 * BLOCK_BYTES))
        os.pwrite(fd, b"another", segment.DATA_OFFSET + BLOCK_BYTES + 17)
        writer.copy_out(path, DIRECT, "v", 0, 2 * BLOCK_BYTES)
    opened = OpenSegment.open(path, DIRECT, 0, never_waits=False)
    contents = opened.refresh(nowait=False)
    assert contents is not None
    assert opened.read_blocks(contents, 0, memoryview(bytearray(2 * BLOCK_BYTES)), nowait=False) == 1
    os.close(fd)


def test_a_descriptor_that_means_something_else_by_now_is_not_written_to(tmp_path: Path) -> None:
    """The daemon dropped the segment and its number went to a log file, or to the memory of another segment."""
    victim = tmp_path / "daemon.log"
    victim.write_bytes(b"log\n")
    log = os.open(victim, os.O_RDWR)
    other = memfd(index=1)
    for fd in (log, other):
        with pytest.raises(OSError, match="memory segment is gone"):
            SegmentWriter(memory_path(fd), KEY, 0, "v")
    assert victim.read_bytes() == b"log\n"
    assert (
        os.pread(other, segment.PAGE_BYTES, 0)
        == segment.encode_header(KEY.stable_id, KEY.size, 1, "") + segment.EMPTY_TABLE
    )
    os.close(log)
    os.close(other)


def mapped_count() -> int:
    """How many mappings of memory segments this process has."""
    return Path("/proc/self/maps").read_text().count(landing.MEMORY_NAME)


def test_memory_that_is_landed_in_again_stays_mapped_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written through the mapping that was kept is what is there; after KEPT_S without use it is given back."""
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    landings = landing.Landings()
    fd = memfd(DIRECT)
    before = mapped_count()
    for number in (1, 2):
        with landings.open(memory_path(fd), DIRECT, 0, "v") as writer:
            fill(writer, 0, bytes([number]) * BLOCK_BYTES)
        assert os.pread(fd, BLOCK_BYTES, segment.DATA_OFFSET) == bytes([number]) * BLOCK_BYTES
        assert mapped_count() == before + 1
        now_s += KEPT_S / 2
    assert (landings.due_at_s or 0.0) == now_s + KEPT_S / 2
    landings.expire(now_s)
    assert mapped_count() == before + 1
    landings.expire(now_s + KEPT_S / 2)
    assert mapped_count() == before
    os.close(fd)
    assert landings.due_at_s is None


def test_mappings_are_kept_of_what_is_used_again_and_of_so_many(path: str) -> None:
    """The memory of a short segment is not used again."""
    landings = landing.Landings()
    before = mapped_count()
    for index, count in ((1, 1), (0, MAPPINGS_MAX + 2)):
        for _ in range(count):
            fd = memfd(DIRECT, index)
            with landings.open(memory_path(fd), DIRECT, index, "v") as writer:
                fill(writer, index * SEGMENT_BYTES, bytes(BLOCK_BYTES))
            os.close(fd)
        assert mapped_count() == before + (0 if index else MAPPINGS_MAX)


def test_the_mapping_of_what_was_given_up_is_not_kept() -> None:
    """Its memory is not used again, and what has landed there can still be written."""
    landings = landing.Landings()
    before = mapped_count()
    fd = memfd(DIRECT)
    with landings.open(memory_path(fd), DIRECT, 0, "v") as writer:
        fill(writer, 0, bytes(BLOCK_BYTES))
        writer.give_up()
        assert landings.due_at_s is None
        assert os.pread(fd, 8, segment.DATA_OFFSET) == bytes(8)
    os.close(fd)
    assert mapped_count() == before


def test_memory_is_asked_for_before_anything_comes_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the caller's work: it does not wait for the kernel until the bytes are there, and then only for that. What is not a
    memory segment, or gone, is nobody's business here."""
    gate, asked = threading.Event(), []

    def collapse(_pages: HugePages, _mapped: memoryview, start: int, stop: int) -> None:
        assert gate.wait(10)
        asked.append((start // HUGE_BYTES, stop // HUGE_BYTES))

    monkeypatch.setattr(HugePages, "collapse", collapse)
    landings = landing.Landings()
    fd = memfd(DIRECT)
    log = os.memfd_create("log")
    os.ftruncate(log, segment.PAGE_BYTES + SEGMENT_BYTES)
    before = mapped_count()
    for path in (memory_path(log), "/proc/self/fd/9999", "/nowhere"):
        landings.expect(path, 0, SEGMENT_BYTES)
    assert mapped_count() == before
    landings.expect(memory_path(fd), 0, SEGMENT_BYTES // 2)
    landings.expect(memory_path(fd), SEGMENT_BYTES // 2, SEGMENT_BYTES)
    assert asked == []
    assert mapped_count() == before + 1
    threading.Timer(0.2, gate.set).start()
    for nth in range(2):
        with landings.open(memory_path(fd), DIRECT, 0, "v") as writer:
            fill(writer, nth * SEGMENT_BYTES // 2, bytes(BLOCK_BYTES))
        assert sorted(asked) == [(chunk, chunk + 1) for chunk in range(5)]
    os.close(fd)
    os.close(log)
