"""Reads of several threads come in the order in which they were asked for, whole, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from support.mounts import wait_until
from valohai_fuse.store.in_turn import ReadsInTurn

PIECES = [(start, start + 10) for start in range(0, 40, 10)]


class Disk:
    """Answers a read of `fd` at `offset` once `answer` or `answer_all` has said so. Descriptors are any numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self._answers: dict[tuple[int, int], int | OSError] = {}
        self._answers_all = False
        monkeypatch.setattr(os, "preadv", self._preadv)

    def answer(self, fd: int, offset: int, result: int | OSError = 10) -> None:
        with self._changed:
            self._answers[fd, offset] = result
            self._changed.notify_all()

    def answer_all(self) -> None:
        with self._changed:
            self._answers_all = True
            self._changed.notify_all()

    def wait_asked(self, fd: int, offset: int) -> None:
        wait_until(f"{fd} is read at {offset}", lambda: (fd, offset) in self.asked)

    def _preadv(self, fd: int, into: list[memoryview], offset: int) -> int:
        with self._changed:
            self.asked.append((fd, offset))
            assert self._changed.wait_for(lambda: self._answers_all or (fd, offset) in self._answers, 30)
            result = self._answers.get((fd, offset), len(into[0]))
        if isinstance(result, OSError):
            raise result
        into[0][:] = bytes([fd]) * len(into[0])
        return result


class Readers:
    """Requests whose turn and descriptor are one number, each in a thread."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._reads = ReadsInTurn()
        self._executor = executor

    def begin(self, number: int, pieces: list[tuple[int, int]] = PIECES) -> Future[bool]:
        return self._executor.submit(self._reads.read, number, number, memoryview(bytearray(40)), pieces)


@pytest.fixture
def readers() -> Iterator[Readers]:
    with ThreadPoolExecutor(4) as executor:
        yield Readers(executor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.answer_all()


def test_all_threads_read_what_was_asked_for_first(readers: Readers, disk: Disk) -> None:
    """Whoever began before, for something that is wanted later, goes on with that only when nothing earlier is left to begin."""
    later = readers.begin(5)
    disk.wait_asked(5, 0)
    first = readers.begin(1)
    disk.wait_asked(1, 0)
    disk.answer(5, 0)
    disk.wait_asked(1, 10)
    disk.answer_all()
    assert first.result(10)
    assert later.result(10)
    assert [offset for fd, offset in disk.asked if fd == 1] == [0, 10, 20, 30]
    assert [fd for fd, _ in disk.asked] == [5, 1, 1, 1, 1, 5, 5, 5]


def test_a_request_is_over_when_the_pieces_that_others_read_are(readers: Readers, disk: Disk) -> None:
    first = readers.begin(1, PIECES[:2])
    disk.wait_asked(1, 0)
    second = readers.begin(2, PIECES[:1])
    disk.wait_asked(1, 10)
    disk.answer(1, 0)
    disk.answer(2, 0)
    with pytest.raises(TimeoutError):
        first.result(0.2)
    disk.answer(1, 10)
    assert first.result(10)
    assert second.result(10)


@pytest.mark.parametrize("result", [9, OSError(errno.EIO, "bad"), OSError(errno.EINVAL, "no direct reads")])
def test_a_failure_is_of_its_request_whoever_met_it(readers: Readers, disk: Disk, result: int | OSError) -> None:
    """Nothing more of it is read, and nothing of the others is missed."""
    failing = readers.begin(1)
    disk.wait_asked(1, 0)
    other = readers.begin(2)
    disk.wait_asked(1, 10)
    disk.answer(1, 10, result)
    disk.wait_asked(2, 0)
    disk.answer_all()
    assert other.result(10)
    if isinstance(result, OSError):
        with pytest.raises(OSError, match=result.strerror):
            failing.result(10)
    else:
        assert not failing.result(10)
    assert [offset for fd, offset in disk.asked if fd == 1] == [0, 10]


def test_every_byte_is_at_its_place(tmp_path: Path) -> None:
    """Files of any pieces, some of which end early, by more threads than there are processors."""
    chance = random.Random(8)
    reads = ReadsInTurn()
    size = 200_000
    contents = [chance.randbytes(size if number % 4 else size - 1) for number in range(40)]

    def read(number: int) -> None:
        cuts = sorted({0, size, *(chance.randrange(size) for _ in range(20))})
        into = memoryview(bytearray(size))
        path = tmp_path / str(number)
        path.write_bytes(contents[number])
        fd = os.open(path, os.O_RDONLY)
        is_whole = reads.read(number, fd, into, list(pairwise(cuts)))
        os.close(fd)
        assert is_whole == (number % 4 != 0)
        assert not is_whole or into == contents[number]

    with ThreadPoolExecutor(6) as executor:
        for future in [executor.submit(read, number) for number in range(40)]:
            future.result(30)
