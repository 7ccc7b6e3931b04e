"""The files that other people's programs read in the tests: real formats, made by the libraries that own them.

Made once per session in a plain directory, which is the source that every read through a mount is compared with. Random
bytes come from one seed, so a failure can be repeated.
"""

from __future__ import annotations

import sqlite3
import tarfile
import zipfile
from pathlib import Path

SEED = 20251101
IMAGES = 60
ZIP_MEMBERS = 100
MEBIBYTE = 1024 * 1024


def make(directory: Path) -> Path:
    """Fills `directory`, made here, with about 350 MB; returns it."""
    import numpy as np  # noqa: PLC0415 - only the client tests need these libraries

    rng = np.random.default_rng(SEED)
    for name in ("table", "dataset", "archive", "arrays", "images/dogs", "images/cats", "model", "db", "text"):
        (directory / name).mkdir(parents=True)
    _tables(directory, rng)
    _arrays(directory, rng)
    _images(directory, rng)
    _archives(directory, rng)
    _database(directory / "db" / "catalogue.sqlite")
    _texts(directory / "text")
    return directory


def _tables(directory: Path, rng: object) -> None:
    import numpy as np  # noqa: PLC0415
    import pandas as pd  # type: ignore[import-untyped]  # noqa: PLC0415 - ships no types

    assert isinstance(rng, np.random.Generator)
    small = pd.DataFrame({"id": np.arange(100_000), "value": rng.normal(size=100_000), "name": "ä row"})
    small.to_csv(directory / "table" / "rows.csv", index=False)
    wide = pd.DataFrame({f"column_{index}": rng.normal(size=1_000_000) for index in range(16)})
    wide.to_parquet(directory / "table" / "wide.parquet", row_group_size=250_000, compression=None)
    for year in (2023, 2024, 2025):
        part = directory / "dataset" / f"year={year}"
        part.mkdir()
        pd.DataFrame({"id": np.arange(50_000), "value": rng.normal(size=50_000)}).to_parquet(part / "part-0.parquet")


def _arrays(directory: Path, rng: object) -> None:
    import h5py  # type: ignore[import-untyped]  # noqa: PLC0415 - ships no types
    import numpy as np  # noqa: PLC0415
    from safetensors.numpy import save_file  # noqa: PLC0415

    assert isinstance(rng, np.random.Generator)
    np.save(directory / "arrays" / "matrix.npy", rng.normal(size=(4096, 1024)))
    with h5py.File(directory / "arrays" / "cube.h5", "w") as file:
        file.create_dataset("cube", data=rng.normal(size=(64, 128, 128)), chunks=(1, 128, 128), compression="gzip")
        file.create_dataset("labels", data=np.arange(64))
    layers = {f"layer.{index}": rng.normal(size=(512, 1024)).astype(np.float32) for index in range(12)}
    save_file(layers, directory / "model" / "model.safetensors")


def _images(directory: Path, rng: object) -> None:
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    assert isinstance(rng, np.random.Generator)
    for index in range(IMAGES):
        pixels = rng.integers(0, 256, size=(96, 128, 3), dtype=np.uint8)
        kind, ending = (("dogs", "png"), ("cats", "jpg"))[index % 2]
        Image.fromarray(pixels).save(directory / "images" / kind / f"{index:04} ä (1).{ending}")


def _archives(directory: Path, rng: object) -> None:
    import numpy as np  # noqa: PLC0415

    assert isinstance(rng, np.random.Generator)
    with zipfile.ZipFile(directory / "archive" / "big.zip", "w", zipfile.ZIP_STORED) as archive:
        for index in range(ZIP_MEMBERS):
            archive.writestr(f"folder/member-{index:03}.bin", rng.bytes(MEBIBYTE))
    with tarfile.open(directory / "archive" / "images.tar", "w") as archive_of_images:
        archive_of_images.add(directory / "images", arcname="images")


def _database(path: Path) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("create table datums (id integer primary key, name text, bytes integer)")
        rows = ((index, f"datum-{index:06}", index * 37 % 1009) for index in range(100_000))
        connection.executemany("insert into datums values (?, ?, ?)", rows)
        connection.execute("create index by_bytes on datums (bytes)")
    connection.close()


def _texts(directory: Path) -> None:
    for index in range(40):
        folder = directory / f"chapter {index % 4}" / "päge+%20"
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f"line {line} of text {index}{' with a needle' if line == 7 * index else ''}\n" for line in range(300))
        (folder / f"text-{index}.txt").write_text("".join(lines), encoding="utf-8")
    (directory / "empty.txt").touch()
    ramp = bytes(range(251)) * 40_000
    (directory / "ramp.bin").write_bytes(ramp)
