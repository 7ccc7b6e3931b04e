"""Writes a parquet file as tables are laid out: row groups, in each a chunk of every column. A process of its own: it needs
pyarrow.

Usage: python parquet_table.py PATH ROW_GROUPS COLUMNS CHUNK_BYTES. Values are 64-bit integers, stored as they are, so that a
chunk has the size it is told.
"""

from __future__ import annotations

import array
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_VALUE_BYTES = 8


def main(path: Path, row_groups: int, columns: int, chunk_bytes: int) -> None:
    """Column `c` counts up from `c * 2**40`."""
    rows = chunk_bytes // _VALUE_BYTES
    schema = pa.schema([(f"column_{number}", pa.int64()) for number in range(columns)])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as out:
        for group in range(row_groups):
            chunks = []
            for column in range(columns):
                first = column * 2**40 + group * rows
                chunks.append(pa.array(memoryview(array.array("q", range(first, first + rows)))))
            out.write_table(pa.table(chunks, schema=schema), row_group_size=rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:5]))
