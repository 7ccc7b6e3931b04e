"""The data set of `valohai-fuse demo`: small to make, large to look at.

Decides what a newcomer sees: a CSV of 200 MB whose lines are computed when they are read, a few pictures and their labels
in nested directories, and a checkpoint larger than most disks. Made in milliseconds, the same on every machine.
"""

from __future__ import annotations

import functools
import json
import struct
import zlib
from collections.abc import Mapping

from valohai_fuse.sandbox.content import Rows, ramp
from valohai_fuse.sandbox.dataset import SandboxFile, SandboxInput

CSV_INPUT, CSV_NAME = "measurements", "2026/readings.csv"
"""The large text file that the demo reads parts of."""
IMAGES_INPUT = "images"
CHECKPOINT_INPUT, CHECKPOINT_NAME = "checkpoint", "model-500gb.safetensors"

_HEADER = b"reading,time_of_day,station,temperature_c,humidity_percent\n"
_ROW_BYTES = len("000000000,00:00:00,station-000,+00.00,00.0\n")
_VALUES_PERIOD = 9973
_CSV_BYTES = 200 * 1000 * 1000
_CHECKPOINT_BYTES = 500 * 1000**3
_KINDS = {"cats": (214, 120, 60), "dogs": (90, 140, 70), "dogs/puppies": (150, 110, 190)}


def demo_inputs() -> Mapping[str, SandboxInput]:
    """The demo's inputs, by name."""
    return {
        CSV_INPUT: SandboxInput(
            [
                SandboxFile(CSV_NAME, readings(), metadata=[{"source": "valohai-fuse demo", "stations": 400}]),
                SandboxFile("README.txt", b"Invented readings of 400 stations, one line a reading.\n"),
            ]
        ),
        IMAGES_INPUT: SandboxInput(_pictures()),
        CHECKPOINT_INPUT: SandboxInput(
            [SandboxFile(CHECKPOINT_NAME, ramp(_CHECKPOINT_BYTES), metadata=[{"epoch": 12, "valohai.tags": ["demo"]}])]
        ),
    }


def readings(size: int = _CSV_BYTES) -> Rows:
    """The CSV, of about `size` bytes: whole lines."""
    rows = max(1, (size - len(_HEADER)) // _ROW_BYTES)
    return Rows(_HEADER, _reading, _ROW_BYTES, rows, seed="readings-1")


def _reading(index: int) -> bytes:
    return b"%09d%b%b" % (index, _times_of_day()[index % 86400], _values()[index % _VALUES_PERIOD])


@functools.cache
def _times_of_day() -> list[bytes]:
    return [b",%02d:%02d:%02d" % (s // 3600, s // 60 % 60, s % 60) for s in range(86400)]


@functools.cache
def _values() -> list[bytes]:
    """The columns that look like noise. Tables make lines three times as fast as computing each: 150 MB/s."""
    values = []
    for index in range(_VALUES_PERIOD):
        mixed = index * 2654435761 & 0xFFFFFFFF  # Knuth's multiplicative hash
        station, degrees, cents = mixed % 400, (mixed >> 9) % 60 - 20, (mixed >> 15) % 100
        percent, tenth = (mixed >> 11) % 80 + 15, (mixed >> 18) % 10
        values.append(b",station-%03d,%+03d.%02d,%02d.%d\n" % (station, degrees, cents, percent, tenth))
    return values


def _pictures() -> list[SandboxFile]:
    files = [
        SandboxFile(f"{kind}/{number:04d}.png", picture(color, number), metadata=[{"kind": kind, "number": number}])
        for kind, color in _KINDS.items()
        for number in range(8)
    ]
    labels = {file.name: file.name.rpartition("/")[0] for file in files}
    return [*files, SandboxFile("labels.json", json.dumps(labels, indent=1).encode())]


def picture(color: tuple[int, int, int], number: int, side_pixels: int = 96) -> bytes:
    """A PNG with a gradient; valid for any viewer, no imaging library needed."""
    lines = []
    for y in range(side_pixels):
        line = bytearray(b"\0")
        for x in range(side_pixels):
            shade = (x * (number + 1) + y * 2) % side_pixels / side_pixels
            line += bytes(int(part * (0.4 + 0.6 * shade)) for part in color)
        lines.append(bytes(line))
    head = struct.pack(">IIBBBBB", side_pixels, side_pixels, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    )
