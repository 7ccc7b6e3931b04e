"""The format of a cache file: one file holds one segment (8 MiB) of one object, and every block in it certifies itself.

    0     header: magic, format, identity (object, size, segment), version (ETag), checksum of all of this
    3072  table: one entry of 8 bytes per block, 0 = absent, else the hash of the block
    4096  the blocks, each at its place; what is absent is a hole

An entry is xxh3_64 of the block's bytes under a seed made of the object's identity, its version and the block's number.
So a block that verifies is the right block of the right version of the right object, whoever wrote it, in whatever order the
writes reached the disk, and whatever happened to the file since. That is why cache files are written in place, by any number
of processes at once, without locks, renames or fsync: any state that a crash leaves is a valid state with fewer blocks.

Invariants: a header never changes meaning (same identity and version give the same bytes); an entry for one block is either
0 or always the same number; a hash that happens to be 0 is stored as 1. docs/cache-format.md is the prose; a test holds
golden bytes.

Pure: bytes in, numbers out. Knows no path but the relative name, no descriptor, no clock.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from xxhash import xxh3_64, xxh3_64_intdigest

from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES

MAGIC = b"\x89VFSEG\r\n"
"""Eight bytes that no text file starts with and that a transfer in text mode would break (the idea is PNG's)."""
FORMAT = 1
FORMAT_DIRECTORY = f"v{FORMAT}"
"""Below the cache directory; another format lives in another directory and is left alone."""

PAGE_BYTES = 4096
"""Header and table together: one page, read in one call."""
TABLE_OFFSET = 3072
HEADER_BYTES = TABLE_OFFSET
DATA_OFFSET = PAGE_BYTES
ENTRY_BYTES = 8
ABSENT_ENTRY = bytes(ENTRY_BYTES)
EMPTY_TABLE = bytes(PAGE_BYTES - TABLE_OFFSET)

STABLE_ID_BYTES_MAX = 2000
"""A longer identity is stored as its hash: it only has to compare equal."""
VERSION_BYTES_MAX = 1024
"""An ETag has to come back exactly as it went in, so a longer one cannot be stored; no store sends such a thing."""

_FIXED = struct.Struct("<8sIIQQHH4x")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = _FIXED.size
_TEXT_OFFSET = _CHECKSUM_OFFSET + _CHECKSUM.size
_TABLE = struct.Struct(f"<{SEGMENT_BLOCKS}Q")
_UINT64_MAX = 2**64 - 1
_CODEC_ERRORS = "surrogatepass"  # JSON can spell lone surrogates; an identity must not fail on them


@dataclass(frozen=True, slots=True)
class Header:
    """What a cache file says it holds."""

    stable_id: bytes
    """As `stored_id` makes it."""
    size: int
    """Bytes of the whole object."""
    segment_index: int
    version: str


def stored_id(stable_id: str) -> bytes:
    """The form in which an identity stands in a header: itself, or its hash when it is too long."""
    encoded = stable_id.encode("utf-8", _CODEC_ERRORS)
    if len(encoded) <= STABLE_ID_BYTES_MAX:
        return encoded
    return b"blake2b-256:" + hashlib.blake2b(encoded, digest_size=32).hexdigest().encode()


@functools.lru_cache(maxsize=256)
def object_digest(stable_id: str, size: int) -> bytes:
    """20 bytes that name an object in the cache: blake2b-160 of identity NUL size."""
    text = stable_id.encode("utf-8", _CODEC_ERRORS) + b"\0" + str(size).encode()
    return hashlib.blake2b(text, digest_size=20).digest()


def segment_name(digest_hex: str, segment_index: int) -> str:
    """Path of a segment below the format's directory.

    256 directories, one level: a million small objects are 4,000 names each, which any indexed directory finds in
    microseconds, and costs 60-80 bytes of directory per name. 65,536 directories would cost a block of 4 KiB for every
    15 names and a mkdir for nearly every object. All segments of one object share a directory, so that what is cached of
    a large file is found with one listing.
    """
    return f"{digest_hex[:2]}/{digest_hex}.{segment_index:x}"


def segment_bytes(size: int, segment_index: int) -> int:
    """Bytes of the object that fall into the segment; the last one may be short, beyond the object it is 0."""
    return max(0, min(SEGMENT_BYTES, size - segment_index * SEGMENT_BYTES))


def blocks_in(byte_count: int) -> int:
    """How many blocks hold `byte_count` bytes that start at a block's start."""
    return -(-byte_count // BLOCK_BYTES)


def bytes_on_disk_max(byte_count: int) -> int:
    """What `byte_count` bytes, landed in one segment, add to what the disk holds at the most: their own pages, the header's,
    and one for the file system's notes on a file in several pieces."""
    pages = -(-byte_count // PAGE_BYTES) + 1 + (byte_count > BLOCK_BYTES)
    return pages * PAGE_BYTES


def encode_header(stable_id: str, size: int, segment_index: int, version: str) -> bytes:
    """The HEADER_BYTES that stand before the table. The same arguments always give the same bytes.

    Raises ValueError for a version of more than VERSION_BYTES_MAX bytes.
    """
    identity, encoded_version = stored_id(stable_id), version.encode("utf-8", _CODEC_ERRORS)
    if len(encoded_version) > VERSION_BYTES_MAX:
        raise ValueError(f"a version of {len(encoded_version)} bytes cannot be stored")
    fixed = _FIXED.pack(MAGIC, FORMAT, BLOCK_BYTES, segment_index, size, len(identity), len(encoded_version))
    text = (identity + encoded_version).ljust(HEADER_BYTES - _TEXT_OFFSET, b"\0")
    return fixed + _CHECKSUM.pack(xxh3_64_intdigest(fixed + text)) + text


def decode_header(page: bytes | bytearray) -> Header | None:
    """What `page` (at least HEADER_BYTES, from the start of a file) says; None when it is not a whole, sound header."""
    if len(page) < HEADER_BYTES:
        return None
    magic, form, block_bytes, segment_index, size, id_bytes, version_bytes = _FIXED.unpack_from(page)
    if (magic, form, block_bytes) != (MAGIC, FORMAT, BLOCK_BYTES):
        return None
    (checksum,) = _CHECKSUM.unpack_from(page, _CHECKSUM_OFFSET)
    if checksum != xxh3_64_intdigest(bytes(page[:_CHECKSUM_OFFSET] + page[_TEXT_OFFSET:HEADER_BYTES])):
        return None
    version_offset = _TEXT_OFFSET + id_bytes
    identity = bytes(page[_TEXT_OFFSET:version_offset])
    try:
        version = bytes(page[version_offset : version_offset + version_bytes]).decode("utf-8", _CODEC_ERRORS)
    except UnicodeDecodeError:
        return None
    return Header(identity, size, segment_index, version)


def decode_table(page: bytes | bytearray) -> tuple[int, ...]:
    """The SEGMENT_BLOCKS entries of a whole page (PAGE_BYTES)."""
    return _TABLE.unpack_from(page, TABLE_OFFSET)


def entry_offset(block: int) -> int:
    """Where in the file the entry of the segment's `block`-th block stands."""
    return TABLE_OFFSET + ENTRY_BYTES * block


def hash_seed(digest: bytes, version: str) -> int:
    """The part of a block's seed that all blocks of one version of one object share."""
    text = digest + version.encode("utf-8", _CODEC_ERRORS)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def block_entry(data: bytes | bytearray | memoryview, seed: int, block_number: int) -> int:
    """The entry that certifies `data` as block `block_number` (counted from the start of the object); never 0."""
    return xxh3_64_intdigest(data, (seed + block_number) & _UINT64_MAX) or 1


def encode_entries(data: memoryview, seed: int, block_number: int) -> bytes:
    """The table entries, as they stand in the file, of the consecutive blocks in `data`, the first being `block_number`."""
    entries = [
        block_entry(data[at : at + BLOCK_BYTES], seed, block_number + nth)
        for nth, at in enumerate(range(0, len(data), BLOCK_BYTES))
    ]
    return pack_entries(entries)


def pack_entries(entries: Sequence[int]) -> bytes:
    """Table entries as they stand in the file."""
    return struct.pack(f"<{len(entries)}Q", *entries)


class EntriesInPieces:
    """The entries of consecutive blocks whose bytes come in pieces, in order: as `block_entry` makes them of whole blocks."""

    __slots__ = ("_block_number", "_hash", "_seed", "_wanted_bytes", "entries", "stop")

    def __init__(self, seed: int, start: int) -> None:
        """`start`: where in the object the first piece begins, a block's start."""
        self._seed = seed
        self._block_number = start // BLOCK_BYTES
        self._hash: xxh3_64 | None = None
        self._wanted_bytes = 0
        """Of the block that is not whole."""
        self.stop = start
        """Where in the object the next piece begins."""
        self.entries: list[int] = []
        """Of the blocks that are whole."""

    def add(self, data: bytes | memoryview) -> None:
        """The next piece."""
        self.stop += len(data)
        if self._hash is not None and len(data) < self._wanted_bytes:  # by far the most frequent
            self._hash.update(data)
            self._wanted_bytes -= len(data)
            return
        rest = memoryview(data)
        while rest:
            if self._hash is None:
                self._hash = xxh3_64(seed=(self._seed + self._block_number) & _UINT64_MAX)
                self._wanted_bytes = BLOCK_BYTES
            piece = rest[: self._wanted_bytes]
            self._hash.update(piece)
            self._wanted_bytes -= len(piece)
            rest = rest[len(piece) :]
            if not self._wanted_bytes:
                self.end_block()

    def end_block(self) -> None:
        """What came of the last block is all of it: an object's last one is short. Does nothing between blocks."""
        if self._hash is not None:
            self.entries.append(self._hash.intdigest() or 1)
            self._hash = None
            self._block_number += 1
