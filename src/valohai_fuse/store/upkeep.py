"""Looks after a cache directory from outside of any mount: what is in it, whether it is sound, and less of it.

Everything here is safe beside daemons that read, land and evict in the same directory at the same time: it uses nothing but
the format's own rules (an entry that does not verify is set to 0, a segment goes by unlink and truncation).

Blocking, for commands. Must not know the store's bookkeeping, mounts, or what an input is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from valohai_fuse.model import segment
from valohai_fuse.model.eviction import Segment
from valohai_fuse.model.extents import BLOCK_BYTES, SEGMENT_BLOCKS
from valohai_fuse.store.evictor import choose, evict, fan_outs, scan, scan_fan_out

YOUNG_S = 60.0
"""A file without a sound header that is younger than this may just be in the making."""
_CLEAR_ROUNDS_MAX = 10
_ALONE_MAX = 20_000
"""Fewer segments than these are looked at in less time than a process takes to begin."""
_PROCESSES_MAX = 4
_PAGES_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Held:
    """One segment file. `header` is None where there is no sound one, or nobody looked; `blocks` counts the table's entries."""

    file: Segment
    digest_hex: str
    header: segment.Header | None
    blocks: int
    content_bytes: int
    """Of the object, by the table."""


@dataclass(slots=True)
class Verified:
    """What `verify` found and did so far."""

    segments: int = 0
    blocks: int = 0
    content_bytes: int = 0
    bad_blocks: int = 0
    bad_segments: int = 0
    """Without a sound header for their name; removed."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What `prune` and `clear` took away."""

    segments: int
    bytes_on_disk: int


@dataclass(slots=True)
class Holding:
    """What is held of one object, or of all."""

    blocks: int = 0
    content_bytes: int = 0
    bytes_on_disk: int = 0

    def add(self, other: Holding | Held) -> None:
        """Adds it up."""
        self.blocks += other.blocks
        self.content_bytes += other.content_bytes
        self.bytes_on_disk += other.bytes_on_disk if isinstance(other, Holding) else other.file.bytes_on_disk


@dataclass(slots=True)
class Summary:
    """What a cache holds. `used_first_ns` and `used_last_ns` are 0 where there is nothing."""

    segments: int = 0
    objects: int = 0
    total: Holding = field(default_factory=Holding)
    used_first_ns: int = 0
    used_last_ns: int = 0
    of: dict[str, Holding] = field(default_factory=dict)
    """By digest, in hex: of the objects that were asked for."""

    def add(self, held: Held) -> None:
        """Counts a segment."""
        self._use(held.file.used_at_ns, held.file.used_at_ns)
        self.segments += 1
        self.total.add(held)

    def merge(self, other: Summary) -> None:
        """Adds that of other objects."""
        if other.segments:
            self._use(other.used_first_ns, other.used_last_ns)
        self.segments += other.segments
        self.objects += other.objects
        self.total.add(other.total)
        self.of |= other.of

    def _use(self, first_ns: int, last_ns: int) -> None:
        self.used_first_ns = min(self.used_first_ns, first_ns) if self.segments else first_ns
        self.used_last_ns = max(self.used_last_ns, last_ns)


def summarize(cache_dir: str, wanted: AbstractSet[str] = frozenset()) -> Summary:
    """What is held in all, and of each object whose digest is `wanted`. A large cache is looked at by as many processes as
    there are processors; for a program without threads."""
    parts = fan_outs(cache_dir)
    several = min(_PROCESSES_MAX, len(os.sched_getaffinity(0)))
    if several == 1 or not parts or len(parts) * _files_in(cache_dir, parts[0]) < _ALONE_MAX:
        return _summarize(cache_dir, wanted, parts)
    found = Summary()
    forked = multiprocessing.get_context("fork")
    looking = []
    for nth in range(several):
        ours, theirs = forked.Pipe(duplex=False)
        arguments = (theirs, cache_dir, wanted, parts[nth::several])
        process = forked.Process(target=_send_summary, args=arguments, daemon=True)
        process.start()
        theirs.close()
        looking.append((ours, process))
    for pipe, process in looking:
        found.merge(pipe.recv())
        pipe.close()
        process.join()
        process.close()
    return found


def _send_summary(pipe: Connection, cache_dir: str, wanted: AbstractSet[str], parts: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    pipe.send(_summarize(cache_dir, wanted, parts))


def _files_in(cache_dir: str, part: str) -> int:
    return sum(1 for _ in scan_fan_out(cache_dir, part))


def _summarize(cache_dir: str, wanted: AbstractSet[str], parts: list[str]) -> Summary:
    found = Summary()
    for part in parts:
        digests: set[str] = set()
        for held in _survey_part(cache_dir, part, looks_at_all=False):
            found.add(held)
            digests.add(held.digest_hex)
            if held.digest_hex in wanted:
                found.of.setdefault(held.digest_hex, Holding()).add(held)
        found.objects += len(digests)
    return found


def survey(cache_dir: str) -> Iterator[Held]:
    """Every segment, with its header and table as they were a moment ago; some 20 us each."""
    for part in fan_outs(cache_dir):
        yield from _survey_part(cache_dir, part, looks_at_all=True)


def _survey_part(cache_dir: str, part: str, *, looks_at_all: bool) -> Iterator[Held]:
    """`looks_at_all`: otherwise a file that has room for one block only is not opened but believed to hold it, which a million
    small objects are counted by in a fraction of the time."""
    opened: deque[tuple[Segment, int]] = deque()
    try:
        for found in scan_fan_out(cache_dir, part):
            if not looks_at_all and segment.DATA_OFFSET < found.length <= segment.DATA_OFFSET + BLOCK_BYTES:
                digest_hex = found.name.rpartition("/")[2].partition(".")[0]
                yield Held(found, digest_hex, None, 1, found.length - segment.DATA_OFFSET)
                continue
            with contextlib.suppress(OSError):  # gone meanwhile
                fd = _open(cache_dir, found.name, os.O_RDONLY)
                opened.append((found, fd))
                # The first page and no other; many at once, for a disk that is asked for one after the other takes twice as long.
                os.posix_fadvise(fd, 0, segment.PAGE_BYTES, os.POSIX_FADV_WILLNEED)
            if len(opened) > _PAGES_AHEAD:
                yield _look(*opened.popleft())
        while opened:
            yield _look(*opened.popleft())
    finally:
        for _, fd in opened:
            os.close(fd)


def _look(found: Segment, fd: int) -> Held:
    """Closes `fd`."""
    try:
        page = os.pread(fd, segment.PAGE_BYTES, 0)
    except OSError:
        page = b""
    finally:
        os.close(fd)
    digest_hex, _, index_text = found.name.rpartition("/")[2].partition(".")
    header = segment.decode_header(page) if len(page) == segment.PAGE_BYTES else None
    if header is None or not _is_named_right(header, digest_hex, index_text):
        return Held(found, digest_hex, None, 0, 0)
    length = segment.segment_bytes(header.size, header.segment_index)
    # Counted as a whole: a loop over the entries of 130,000 segments takes seconds.
    entries = segment.decode_table(page)[: segment.blocks_in(length)]
    blocks = len(entries) - entries.count(0)
    content = blocks * BLOCK_BYTES
    if entries and entries[-1]:
        content -= len(entries) * BLOCK_BYTES - length
    return Held(found, digest_hex, header, blocks, content)


def _is_named_right(header: segment.Header, digest_hex: str, index_text: str) -> bool:
    if header.segment_index != int(index_text, 16):
        return False
    if header.stable_id.startswith(b"blake2b-256:"):
        return True  # a long identity stands there as its hash, which does not lead back to the name
    identity = header.stable_id.decode("utf-8", "surrogatepass")
    return segment.object_digest(identity, header.size).hex() == digest_hex


def _open(cache_dir: str, name: str, mode: int) -> int:
    path = os.path.join(cache_dir, segment.FORMAT_DIRECTORY, name)
    return os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def verify(cache_dir: str, progress: Callable[[Verified], None] | None = None) -> Verified:
    """Hashes every block that is present. One that is not what its entry says loses the entry, a file that is no segment of
    its name is removed: either is fetched again when somebody reads it. `progress` is called after each segment."""
    done = Verified()
    for held in survey(cache_dir):
        done.segments += 1
        if held.header is None:
            old = time.time() - held.file.used_at_ns / 1e9 > YOUNG_S
            if old and held.file.bytes_on_disk and evict(cache_dir, held.file):
                done.bad_segments += 1
        else:
            with contextlib.suppress(OSError):  # gone meanwhile
                _verify_segment(cache_dir, held, done)
        if progress is not None:
            progress(done)
    return done


def _verify_segment(cache_dir: str, held: Held, done: Verified) -> None:
    header = held.header
    assert header is not None
    seed = segment.hash_seed(bytes.fromhex(held.digest_hex), header.version)
    length = segment.segment_bytes(header.size, header.segment_index)
    fd = _open(cache_dir, held.file.name, os.O_RDONLY)
    try:
        table = segment.decode_table(_padded(fd))
        for block, entry in enumerate(table):
            if not entry:
                continue
            wanted = min(BLOCK_BYTES, length - block * BLOCK_BYTES)
            if wanted > 0 and _is_sound(fd, block, wanted, entry, seed, header.segment_index):
                done.blocks += 1
                done.content_bytes += wanted
            elif _still_says(fd, block, entry) and os.fstat(fd).st_nlink:
                done.bad_blocks += 1
                _clear_entry(cache_dir, held.file.name, os.fstat(fd), block)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _padded(fd: int) -> bytes:
    return os.pread(fd, segment.PAGE_BYTES, 0).ljust(segment.PAGE_BYTES, b"\0")


def _is_sound(fd: int, block: int, byte_count: int, entry: int, seed: int, index: int) -> bool:
    try:
        data = os.pread(fd, byte_count, segment.DATA_OFFSET + block * BLOCK_BYTES)
    except OSError:
        return False
    return len(data) == byte_count and segment.block_entry(data, seed, index * SEGMENT_BLOCKS + block) == entry


def _still_says(fd: int, block: int, entry: int) -> bool:
    """Whether the entry is what it was: not so when the file was evicted, or the block landed anew, while we looked."""
    return segment.decode_table(_padded(fd))[block] == entry


def _clear_entry(cache_dir: str, name: str, seen: os.stat_result, block: int) -> None:
    fd = _open(cache_dir, name, os.O_WRONLY)
    try:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) == (seen.st_dev, seen.st_ino):
            os.pwrite(fd, segment.ABSENT_ENTRY, segment.entry_offset(block))
    finally:
        os.close(fd)


def prune(cache_dir: str, *, to_bytes: int | None = None, older_than_s: float | None = None) -> Removed:
    """Takes away what was not used for `older_than_s`, and the least recently used until at most `to_bytes` are held."""
    going: dict[str, Segment] = {}
    before_ns = 0 if older_than_s is None else time.time_ns() - int(older_than_s * 1e9)
    held_bytes = 0
    for found in scan(cache_dir):
        held_bytes += found.bytes_on_disk
        if found.used_at_ns < before_ns:
            going[found.name] = found
    if to_bytes is not None and held_bytes > to_bytes:
        going |= {found.name: found for found in choose(scan(cache_dir), held_bytes - to_bytes, frozenset())}
    return _remove(cache_dir, going.values())


def clear(cache_dir: str) -> Removed:
    """Takes away everything of this format; what daemons land meanwhile may stay."""
    segments = bytes_on_disk = 0
    for _ in range(_CLEAR_ROUNDS_MAX):
        removed = _remove(cache_dir, scan(cache_dir))
        segments += removed.segments
        bytes_on_disk += removed.bytes_on_disk
        if not any(True for _ in scan(cache_dir)):
            break
    return Removed(segments, bytes_on_disk)


def _remove(cache_dir: str, going: Iterable[Segment]) -> Removed:
    gone = [found.bytes_on_disk for found in going if evict(cache_dir, found)]
    return Removed(len(gone), sum(gone))
