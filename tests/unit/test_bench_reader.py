"""The bench's reader reads what a pattern says and does not accept wrong bytes: else its numbers would mean nothing."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from benchmarks.dataset import RAMP_MODULUS, Dataset, Sizes, ramp
from benchmarks.reader import WrongBytesError, offsets_of, perform, share_of
from hypothesis import given
from hypothesis import strategies as st

_TINY = Sizes(
    big_bytes=300_000,
    quarter_bytes=70_000,
    half_bytes=200_000,
    fresh_count=2,
    small_count=5,
    small_bytes=3000,
    name_count=7,
    zip_members=3,
    table_row_groups=3,
    table_columns=4,
    table_chunk_bytes=8000,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A data set of a few hundred kilobytes."""
    made = Dataset(tmp_path, _TINY, Path(sys.executable))
    made.make()
    return made


def _task(pattern: str, files: list[tuple[str, int, int | None]], **more: Any) -> dict[str, Any]:
    return {
        "pattern": pattern,
        "files": files,
        "threads": 1,
        "batch": 1,
        "block_bytes": 65536,
        "count": 0,
        "seed": 1,
        **more,
    }


@given(st.integers(0, 10**12), st.integers(0, 2000), st.integers(0, RAMP_MODULUS - 1))
def test_the_ramp_is_its_formula(start: int, length: int, phase: int) -> None:
    """At any offset, so that a sample anywhere can be checked."""
    assert ramp(start, start + length, phase) == bytes((i + phase) % 251 for i in range(start, start + length))


def test_files_are_ramps_of_their_own_phase(dataset: Dataset) -> None:
    """What is on the disk is what the reader will expect."""
    for file in (dataset.big, dataset.half, *dataset.quarters, *dataset.small):
        assert (dataset.root / file.path).read_bytes() == ramp(0, file.size, file.phase or 0)


def test_making_the_data_set_again_changes_nothing(dataset: Dataset) -> None:
    """A second run of the bench is quick."""
    before = {p: p.stat().st_mtime_ns for p in dataset.root.rglob("*") if p.is_file()}
    dataset.make()
    assert {p: p.stat().st_mtime_ns for p in dataset.root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("pattern", ["forward", "backward", "mmap-forward"])
def test_complete_patterns_read_each_byte_once(dataset: Dataset, pattern: str) -> None:
    """Whatever the order."""
    file = dataset.big
    answer = perform(_task(pattern, [(str(dataset.root / file.path), file.size, file.phase)]))
    assert answer["bytes"] == file.size
    assert len(answer["latencies_s"]) == 5


@given(size=st.integers(1, 10**9), block=st.sampled_from([4096, 131072, 1 << 20]))
def test_backward_mirrors_forward(size: int, block: int) -> None:
    """The same blocks, from the end to the start."""
    task = {"block_bytes": block}
    assert list(offsets_of("backward", size, task, 0)) == list(offsets_of("forward", size, task, 0))[::-1]


@pytest.mark.parametrize(
    ("batch", "shares"), [(1, ["adg", "be", "cf"]), (2, ["abg", "cd", "ef"]), (32, ["abcdefg", "", ""])]
)
def test_readers_take_batches_in_turn(batch: int, shares: list[str]) -> None:
    """Each file once; one by one where a batch is one."""
    files: list[tuple[str, int, int | None]] = [(name, 1, None) for name in "abcdefg"]
    task = {"threads": 3, "batch": batch}
    assert ["".join(name for name, _, _ in share_of(files, task, number)) for number in range(3)] == shares


def test_threads_draw_different_offsets_and_each_run_the_same() -> None:
    """Every peer is asked for the same blocks; no two threads walk together."""
    task = {"block_bytes": 4096, "count": 100, "threads": 2, "seed": 3}
    first, second = (list(offsets_of("random", 1 << 30, task, lane)) for lane in (0, 1))
    assert len(first) == len(second) == 50
    assert first != second
    assert first == list(offsets_of("random", 1 << 30, task, 0))


def test_skips_read_a_block_of_each_step(dataset: Dataset) -> None:
    """Read one, jump some."""
    file = dataset.big
    task = _task(
        "forward", [(str(dataset.root / file.path), file.size, file.phase)], block_bytes=1000, step_bytes=100_000
    )
    assert perform(task)["bytes"] == 3000


def test_small_files_are_shared_out_among_readers(dataset: Dataset) -> None:
    """Each is read once, by one of them."""
    files = [(str(dataset.root / f.path), f.size, f.phase) for f in dataset.small]
    answer = perform(_task("whole", list(files), threads=2))
    assert (answer["files"], answer["bytes"], len(answer["latencies_s"])) == (5, 15_000, 5)


def test_a_primed_task_does_not_count_its_first_file(dataset: Dataset) -> None:
    """That one only warms a connection."""
    files = [(str(dataset.root / f.path), f.size, f.phase) for f in dataset.fresh]
    assert perform(_task("first", list(files), block_bytes=4096, primed=True))["files"] == 1


def test_zip_members_and_names_are_counted(dataset: Dataset) -> None:
    """Members are read through zipfile, which checks them; names by find."""
    archive = dataset.inputs()["archive"][0]
    answer = perform(_task("zip", [(str(dataset.root / archive.path), archive.size, None)]))
    assert (answer["files"], answer["bytes"]) == (3, 9000)
    for pattern in ("find", "ls"):
        assert perform(_task(pattern, [(str(dataset.root / "names"), 7, None)]))["files"] == 7


def test_records_are_read_where_they_lie(dataset: Dataset) -> None:
    """Through a buffered file, and none of it is believed unchecked."""
    file = dataset.big
    task = _task("records", [(str(dataset.root / file.path), file.size, file.phase)], block_bytes=1000, count=20)
    answer = perform(task)
    assert (answer["bytes"], len(answer["latencies_s"])) == (20_000, 20)
    with pytest.raises(WrongBytesError, match="wrong bytes at"):
        perform(task | {"files": [(str(dataset.root / file.path), file.size, 77)]})


def test_a_column_is_read_out_of_all_row_groups(dataset: Dataset) -> None:
    """And its values are looked at."""
    (table,) = dataset.inputs()["table"]
    path = dataset.root / table.path
    assert table.size > 3 * 4 * 8000
    answer = perform(_task("parquet", [(str(path), table.size, None)]))
    assert answer["files"] == 1
    assert 3 * 8000 <= answer["bytes"] <= 3 * 8200  # with a bit for each value that says whether there is one
    damaged = path.with_name("damaged.parquet")
    first, wrong = ((column << 40).to_bytes(8, "little") for column in (2, 3))
    damaged.write_bytes(path.read_bytes().replace(first, wrong))
    with pytest.raises(WrongBytesError, match="wrong values in column_2"):
        perform(_task("parquet", [(str(damaged), table.size, None)]))


@pytest.mark.parametrize("damage", ["shifted", "zeros", "short"])
def test_wrong_bytes_fail_the_run(dataset: Dataset, damage: str) -> None:
    """A peer that returns other bytes gets no number."""
    file = dataset.big
    path = dataset.root / file.path
    whole = path.read_bytes()
    path.write_bytes({"shifted": whole[1:] + b"x", "zeros": bytes(len(whole)), "short": whole[:-1]}[damage])
    with pytest.raises(WrongBytesError):
        perform(_task("forward", [(str(path), file.size, file.phase)]))


def test_a_missing_name_fails_the_run(dataset: Dataset) -> None:
    """A listing that lost files is not a fast listing."""
    next((dataset.root / "names").iterdir()).unlink()
    with pytest.raises(WrongBytesError, match="6 files instead of 7"):
        perform(_task("find", [(str(dataset.root / "names"), 7, None)]))


def test_a_broken_archive_fails_the_run(dataset: Dataset) -> None:
    """zipfile's own check is the sample here."""
    path = dataset.root / dataset.archive.path
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(zipfile.BadZipFile):
        perform(_task("zip", [(str(path), len(damaged), None)]))
