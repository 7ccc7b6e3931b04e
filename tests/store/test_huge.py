"""Memory in huge pages: what is asked of the kernel, what it gives, and what goes on without it."""

from __future__ import annotations

import gc
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from valohai_fuse.model import segment
from valohai_fuse.model.extents import SEGMENT_BYTES
from valohai_fuse.store.huge import HUGE_BYTES, HugePages, map_whole
from valohai_fuse.store.mappings import KEPT_S, Mappings

FULL = segment.PAGE_BYTES + SEGMENT_BYTES
NAME = "valohai-fuse-huge-test"


@pytest.fixture
def memory() -> Iterator[int]:
    """A memfd of a segment's size, without a page."""
    fd = os.memfd_create(NAME)
    os.ftruncate(fd, FULL)
    yield fd
    os.close(fd)


def regions() -> list[tuple[int, int]]:
    """Of each mapping of such a memfd: its address, and its bytes that one page table entry maps by 2 MiB."""
    gc.collect()
    found = []
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if NAME in part.splitlines()[0]:
            huge = re.search(r"ShmemPmdMapped: +(\d+) kB", part)
            assert huge is not None
            found.append((int(part.partition("-")[0], 16), int(huge[1]) * 1024))
    return found


def test_a_mapping_is_shared_aligned_and_goes_with_its_last_view(memory: int) -> None:
    mapped = map_whole(memory, FULL)
    view = mapped[FULL - 3 :]
    view[:] = b"end"
    assert os.pread(memory, 10, FULL - 3) == b"end"
    os.pwrite(memory, b"head", 0)
    assert bytes(mapped[:4]) == b"head"
    ((address, _),) = regions()
    assert address % HUGE_BYTES == 0
    del mapped
    assert len(regions()) == 1
    assert bytes(view) == b"end"
    del view
    assert regions() == []


def test_what_cannot_be_mapped_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    before = Path("/proc/self/maps").read_text().count("---p")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(PermissionError):
        map_whole(fd, 100)
    os.close(fd)
    assert Path("/proc/self/maps").read_text().count("---p") == before


def needs_huge_pages() -> None:
    fd = os.memfd_create(NAME)
    os.ftruncate(fd, HUGE_BYTES)
    mapped = map_whole(fd, HUGE_BYTES)
    HugePages().collapse(mapped, 0, HUGE_BYTES)
    has = regions()[0][1] == HUGE_BYTES
    os.close(fd)
    if not has:
        pytest.skip("this kernel gives no huge pages to a memfd (MADV_COLLAPSE: Linux 6.1)")


def test_the_chunks_about_a_range_become_huge_and_keep_what_they_hold(memory: int) -> None:
    """The last page of a segment, behind the fourth chunk, is a chunk of its own that is too short."""
    needs_huge_pages()
    mapped = map_whole(memory, FULL)
    mapped[5] = 7
    mapped[3 * HUGE_BYTES - 1] = 9
    pages = HugePages()
    pages.collapse(mapped, HUGE_BYTES - 1, 2 * HUGE_BYTES)
    assert regions()[0][1] == 2 * HUGE_BYTES
    pages.collapse(mapped, 0, FULL)
    assert regions()[0][1] == 4 * HUGE_BYTES
    held = bytes(mapped)
    assert (held[5], held[3 * HUGE_BYTES - 1]) == (7, 9)
    assert held.count(0) == FULL - 2


def test_after_a_refusal_none_are_asked_for_a_while(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_huge_pages()
    mapped = map_whole(memory, FULL)
    now_s = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    pages = HugePages()
    pages.collapse(mapped[1:], 0, HUGE_BYTES)  # no such address can have one
    pages.collapse(mapped, 0, FULL)
    assert regions()[0][1] == 0
    now_s += 61
    pages.collapse(mapped, 0, FULL)
    assert regions()[0][1] == 4 * HUGE_BYTES


def test_nor_after_one_that_took_long(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_huge_pages()
    mapped = map_whole(memory, FULL)
    ticks_s = itertools.count(1000.0, 0.06)
    monkeypatch.setattr("time.monotonic", lambda: next(ticks_s))
    HugePages().collapse(mapped, 0, FULL)
    assert regions()[0][1] == HUGE_BYTES


def test_a_worker_asks_for_what_it_lands_in_and_keeps_the_mapping(memory: int) -> None:
    needs_huge_pages()
    mappings = Mappings()
    first = mappings.map(memory, segment.DATA_OFFSET, 1024 * 1024, now_s=10)
    assert regions()[0][1] == HUGE_BYTES
    again = mappings.map(memory, 3 * HUGE_BYTES, FULL, now_s=11)
    ((_, huge_bytes),) = regions()
    assert huge_bytes == 2 * HUGE_BYTES
    again[100] = 1
    assert first[100] == 1
    del first, again
    mappings.expire(10 + KEPT_S)
    assert len(regions()) == 1
    assert mappings.due_at_s == 11 + KEPT_S
    mappings.expire(11 + KEPT_S)
    assert regions() == []


def test_a_short_segment_is_mapped_for_its_order_only() -> None:
    """It is not used again, so neither is its mapping, and it has no huge pages to fill."""
    fd = os.memfd_create(NAME)
    os.ftruncate(fd, FULL - HUGE_BYTES)
    mappings = Mappings()
    mapped = mappings.map(fd, segment.DATA_OFFSET, HUGE_BYTES, now_s=10)
    mapped[FULL - HUGE_BYTES - 1] = 1
    assert [huge for _, huge in regions()] == [0]
    assert mappings.due_at_s is None
    del mapped
    assert regions() == []
    os.close(fd)


def test_what_is_forgotten_is_let_go(memory: int) -> None:
    mappings = Mappings()
    mappings.map(memory, segment.DATA_OFFSET, HUGE_BYTES, now_s=10)
    assert len(regions()) == 1
    mappings.forget(memory)
    assert regions() == []
