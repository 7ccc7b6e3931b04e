"""The files that are read: made once, deterministic, and checkable at any offset.

Byte `i` of a file is `(i + phase) % 251`, with a phase of its own per file: a shifted range, a mixed-up file or a page of
zeros all show in any sample of a few bytes. The directory is laid out as the inputs are, `<input>/<name>`, so that a mount
of the whole store and one mount per input give the same paths.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

RAMP_MODULUS = 251
_RAMP = bytes(range(RAMP_MODULUS))
_TABLE_MAKER = Path(__file__).with_name("parquet_table.py")
_CHUNK_BYTES = RAMP_MODULUS * 4096
"""A multiple of the modulus, so that each chunk of a file is the same bytes."""

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the data set is; `FULL` is what the documented numbers are measured on, `QUICK` proves that all works."""

    big_bytes: int
    quarter_bytes: int
    half_bytes: int
    fresh_count: int
    small_count: int
    small_bytes: int
    name_count: int
    zip_members: int
    table_row_groups: int
    table_columns: int
    table_chunk_bytes: int
    """Of one column in one row group."""


FULL = Sizes(
    big_bytes=1024 * MIB,
    quarter_bytes=256 * MIB,
    half_bytes=512 * MIB,
    fresh_count=33,
    small_count=1000,
    small_bytes=100 * 1024,
    name_count=200_000,
    zip_members=400,
    table_row_groups=32,
    table_columns=16,
    table_chunk_bytes=MIB,
)
QUICK = Sizes(
    big_bytes=24 * MIB,
    quarter_bytes=4 * MIB,
    half_bytes=16 * MIB,
    fresh_count=5,
    small_count=40,
    small_bytes=100 * 1024,
    name_count=500,
    zip_members=20,
    table_row_groups=4,
    table_columns=4,
    table_chunk_bytes=MIB // 4,
)


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file: `input_name/name` below the data directory, below the store's URL and below a mount."""

    input_name: str
    name: str
    size: int
    phase: int | None
    """None: not a ramp, its content is not checked."""

    @property
    def path(self) -> str:
        """Relative to the data directory."""
        return f"{self.input_name}/{self.name}"


def ramp(start: int, stop: int, phase: int) -> bytes:
    """The bytes [start, stop) of a file with this phase."""
    first = (start + phase) % RAMP_MODULUS
    length = stop - start
    return (_RAMP * ((first + length) // RAMP_MODULUS + 1))[first : first + length]


class Dataset:
    """The data directory `root` with the sizes `sizes`. `make()` is idempotent; a change of sizes needs another root.

    `pyarrow`: a Python that has it, or there is no table.
    """

    def __init__(self, root: Path, sizes: Sizes, pyarrow: Path | None = None) -> None:
        self.root = root
        self._pyarrow = pyarrow
        self.sizes = sizes
        self.big = DataFile("big", "one.bin", sizes.big_bytes, 1)
        self.quarters = tuple(DataFile("quarters", f"{i}.bin", sizes.quarter_bytes, 10 + i) for i in range(4))
        self.half = DataFile("half", "half.bin", sizes.half_bytes, 2)
        self.fresh = tuple(DataFile("fresh", f"{i:02}.bin", sizes.big_bytes, 1) for i in range(sizes.fresh_count))
        self.small = tuple(
            DataFile("small", f"{i:06}.bin", sizes.small_bytes, i % RAMP_MODULUS) for i in range(sizes.small_count)
        )
        self.archive = DataFile("archive", "members.zip", 0, None)
        self.table = DataFile("table", "columns.parquet", 0, None)

    def inputs(self) -> dict[str, tuple[DataFile, ...]]:
        """Every input that is read; `names` is only listed and is made apart."""
        archive = DataFile("archive", "members.zip", (self.root / self.archive.path).stat().st_size, None)
        table_path = self.root / self.table.path
        tables = [DataFile("table", self.table.name, table_path.stat().st_size, None)] if table_path.exists() else []
        return {
            "big": (self.big,),
            "quarters": self.quarters,
            "half": (self.half,),
            "fresh": self.fresh,
            "small": self.small,
            "archive": (archive,),
            "table": tuple(tables),
            "names": tuple(
                DataFile("names", f"{i:06}.bin", self.sizes.small_bytes, None) for i in range(self.sizes.name_count)
            ),
        }

    def make(self) -> None:
        """Writes what is missing. A file appears under its name only when it is complete."""
        for file in (self.big, self.half, *self.quarters, *self.small):
            self._make_ramp(file)
        for file in self.fresh:
            self._link(self.root / self.big.path, self.root / file.path)
        self._make_archive()
        self._make_table()
        self._make_names()

    def _make_ramp(self, file: DataFile) -> None:
        path = self.root / file.path
        if path.exists() and path.stat().st_size == file.size:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        chunk = ramp(0, _CHUNK_BYTES, file.phase or 0)
        with unfinished.open("wb") as out:
            written = 0
            while written < file.size:
                written += out.write(chunk[: file.size - written])
        unfinished.rename(path)

    def _make_archive(self) -> None:
        path = self.root / self.archive.path
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for i in range(self.sizes.zip_members):
                stamp = zipfile.ZipInfo(f"member-{i:06}.bin", (2025, 1, 1, 0, 0, 0))
                archive.writestr(stamp, ramp(0, self.sizes.small_bytes, i % RAMP_MODULUS))
        unfinished.rename(path)

    def _make_table(self) -> None:
        path, sizes = self.root / self.table.path, self.sizes
        if path.exists() or self._pyarrow is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        shape = [sizes.table_row_groups, sizes.table_columns, sizes.table_chunk_bytes]
        subprocess.run([self._pyarrow, _TABLE_MAKER, unfinished, *map(str, shape)], check=True)
        unfinished.rename(path)

    def _make_names(self) -> None:
        """Sparse files: they are listed, never read."""
        directory = self.root / "names"
        done = directory.with_name("names.complete")
        if done.exists():
            return
        directory.mkdir(parents=True, exist_ok=True)
        for i in range(self.sizes.name_count):
            with (directory / f"{i:06}.bin").open("wb") as out:
                out.truncate(self.sizes.small_bytes)
        done.touch()

    @staticmethod
    def _link(target: Path, link: Path) -> None:
        """A hard link costs no disk: to the store and to every peer it is another object."""
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.link(target, link)
