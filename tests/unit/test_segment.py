"""The format of a cache file, byte for byte (docs/cache-format.md): a change here is a change of format and needs a new one."""

from __future__ import annotations

import hashlib

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model import segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES

ID = "datum:golden-é"
SIZE = 3 * SEGMENT_BYTES + BLOCK_BYTES + 5
ETAG = '"e-tag"'
DIGEST = "7ddfa837cee1c0948eb578b6ff5523530a857692"

GOLDEN_HEADER_START = bytes.fromhex(
    "89 56 46 53 45 47 0d 0a"  # magic
    "01 00 00 00  00 00 01 00"  # format 1, blocks of 64 KiB
    "03 00 00 00 00 00 00 00"  # segment 3
    "05 00 81 01 00 00 00 00"  # bytes of the object
    "0f 00  07 00  00 00 00 00"  # bytes of identity and version, padding
    "67 32 f0 39 25 c0 40 fc"  # checksum
    "64 61 74 75 6d 3a 67 6f 6c 64 65 6e 2d c3 a9"  # identity
    "22 65 2d 74 61 67 22"  # version
)


def header(stable_id: str = ID, size: int = SIZE, index: int = 3, version: str = ETAG) -> bytes:
    return segment.encode_header(stable_id, size, index, version)


def test_golden_header() -> None:
    assert header() == GOLDEN_HEADER_START.ljust(3072, b"\0")


def test_golden_names() -> None:
    digest = segment.object_digest(ID, SIZE)
    assert digest.hex() == DIGEST == hashlib.blake2b(f"{ID}\0{SIZE}".encode(), digest_size=20).hexdigest()
    assert segment.segment_name(DIGEST, 3) == f"7d/{DIGEST}.3"
    assert segment.segment_name(DIGEST, 255) == f"7d/{DIGEST}.ff"


def test_golden_entries() -> None:
    """By the constants, and by the prose: xxh3_64 under the seed blake2b-64(digest, version) + number of the block."""
    seed = segment.hash_seed(bytes.fromhex(DIGEST), ETAG)
    assert seed == 0x13E6BDFD536A8D6B
    block = bytes(range(256)) * 256
    assert segment.block_entry(block, seed, 384) == 0x57C3EF97317052DB
    assert segment.block_entry(block, seed, 384) == xxhash.xxh3_64(block, seed + 384).intdigest()
    assert segment.encode_entries(memoryview(block + b"hello"), seed, 384).hex() == (
        "db52703197efc357" + (0x05725FFD3190989B).to_bytes(8, "little").hex()
    )


def test_golden_layout() -> None:
    assert (segment.TABLE_OFFSET, segment.DATA_OFFSET, segment.PAGE_BYTES) == (3072, 4096, 4096)
    assert segment.TABLE_OFFSET + SEGMENT_BLOCKS * 8 == segment.DATA_OFFSET
    assert segment.entry_offset(127) == 4088
    assert segment.FORMAT_DIRECTORY == "v1"


texts = st.text(st.characters(min_codepoint=0, max_codepoint=0xFFFF, categories=None), max_size=250)


@given(
    stable_id=texts,
    version=texts,
    size=st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**64 - 1),
    table=st.binary(min_size=1024, max_size=1024),
)
def test_a_header_says_what_was_put_in(stable_id: str, version: str, size: int, index: int, table: bytes) -> None:
    said = segment.decode_header(header(stable_id, size, index, version) + table)
    assert said == segment.Header(segment.stored_id(stable_id), size, index, version)


@given(at=st.integers(0, segment.HEADER_BYTES - 1), flip=st.integers(1, 255))
def test_no_changed_byte_of_a_header_goes_unnoticed(at: int, flip: int) -> None:
    page = bytearray(header())
    page[at] ^= flip
    assert segment.decode_header(page) is None


@given(st.binary(max_size=5000))
def test_rubbish_is_no_header(rubbish: bytes) -> None:
    assert segment.decode_header(rubbish) is None
    assert segment.decode_header(header()[:8] + rubbish) is None


@pytest.mark.parametrize("length", [0, 1, 39, 48, segment.HEADER_BYTES - 1])
def test_a_cut_header_is_none(length: int) -> None:
    assert segment.decode_header(header()[:length]) is None


def test_long_identities_are_stored_as_their_hash_and_stay_apart() -> None:
    longest, too_long = "u" * segment.STABLE_ID_BYTES_MAX, "u" * (segment.STABLE_ID_BYTES_MAX + 1)
    assert segment.stored_id(longest) == longest.encode()
    assert segment.stored_id(too_long).startswith(b"blake2b-256:")
    assert segment.stored_id(too_long) != segment.stored_id(too_long + "u")
    said = segment.decode_header(header(too_long, version="v" * segment.VERSION_BYTES_MAX))
    assert said == segment.Header(segment.stored_id(too_long), SIZE, 3, "v" * segment.VERSION_BYTES_MAX)


def test_a_version_too_long_to_store_is_refused() -> None:
    with pytest.raises(ValueError, match="1025 bytes"):
        header(version="v" * 1025)


def test_an_entry_depends_on_object_version_place_and_bytes() -> None:
    """What lets any of these differ must not verify: a block of another file, of another version, at another place."""
    one, other = segment.object_digest("a", 10), segment.object_digest("a", 11)
    seeds = [segment.hash_seed(one, "v1"), segment.hash_seed(one, "v2"), segment.hash_seed(other, "v1")]
    data = b"x" * BLOCK_BYTES
    entries = [segment.block_entry(block, seed, n) for block in (data, data[:-1]) for seed in seeds for n in (0, 1)]
    assert len(set(entries)) == len(entries)


def test_a_hash_of_zero_is_stored_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 means absent."""

    def zero(data: bytes, seed: int) -> int:
        return 0

    monkeypatch.setattr(segment, "xxh3_64_intdigest", zero)
    assert segment.block_entry(b"x", 5, 5) == 1
    assert segment.encode_entries(memoryview(b"x"), 5, 5) == b"\1" + bytes(7)


@given(
    st.integers(0, 3 * BLOCK_BYTES + 17),
    st.lists(st.integers(0, BLOCK_BYTES + 9) | st.integers(0, 4 * BLOCK_BYTES), max_size=12),
    st.integers(0, 2**64 - 1),
    st.integers(0, 5),
)
def test_entries_of_pieces_are_those_of_the_whole(length: int, cuts: list[int], seed: int, first_block: int) -> None:
    """However the bytes are cut."""
    data = bytes(i * 7 % 251 for i in range(1000)) * (length // 1000 + 1)
    data = data[:length]
    pieces = segment.EntriesInPieces(seed, first_block * BLOCK_BYTES)
    at = 0
    for cut in [*cuts, length]:
        pieces.add(data[at : at + cut])
        at = min(length, at + cut)
        assert pieces.stop == first_block * BLOCK_BYTES + at
        assert len(pieces.entries) == at // BLOCK_BYTES
    pieces.end_block()
    pieces.end_block()
    assert segment.pack_entries(pieces.entries) == segment.encode_entries(memoryview(data), seed, first_block)


@pytest.mark.parametrize(
    ("size", "index", "expected"),
    [
        (0, 0, 0),
        (1, 0, 1),
        (SEGMENT_BYTES, 0, SEGMENT_BYTES),
        (SEGMENT_BYTES, 1, 0),
        (SEGMENT_BYTES + 1, 1, 1),
        (SEGMENT_BYTES + 1, 7, 0),
    ],
)
def test_bytes_of_a_segment(size: int, index: int, expected: int) -> None:
    assert segment.segment_bytes(size, index) == expected


@pytest.mark.parametrize(("count", "blocks"), [(0, 0), (1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2)])
def test_blocks_in(count: int, blocks: int) -> None:
    assert segment.blocks_in(count) == blocks
