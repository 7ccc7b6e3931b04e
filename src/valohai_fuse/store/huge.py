"""Memory segments in huge pages, mapped where one entry of the page table stands for 2 MiB.

A memfd has pages of 4 KiB unless it is asked for more (`shmem_enabled` is `never` nearly everywhere, and nothing that a process
may change). Once they are collapsed into huge ones (MADV_COLLAPSE, Linux 6.1) a direct read or write of 8 MiB is four pieces
for the disk instead of 2,048, and a new mapping takes four faults. A chunk is collapsed when it holds one page, so that nothing
is copied: that costs 0.1 ms, less than the faults that it saves.

It is an offer to the kernel: where it refuses (no memory in one piece, an old kernel) all goes on with small pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
import weakref
from typing import Final

HUGE_BYTES: Final = 2 * 1024 * 1024
_MADV_COLLAPSE: Final = 25
_MAP_FIXED: Final = 0x10
_PROT_NONE: Final = 0
_RETRY_S: Final = 60.0
"""A kernel that has no memory in one piece looks for some each time that it is asked."""
_SLOW_S: Final = 0.05
"""One that came only after moving pages about for so long: the next will as well, and readers wait."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def map_whole(fd: int, byte_count: int) -> memoryview:
    """The first `byte_count` bytes of the file, shared and writable, at an address that huge pages can have. Unmapped with the
    last view of it. Raises OSError."""
    reserved = byte_count + HUGE_BYTES
    base = _map(None, reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    start = -(-base // HUGE_BYTES) * HUGE_BYTES
    try:
        _map(start, byte_count, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(base, reserved)
        raise
    mapped = (ctypes.c_char * byte_count).from_address(start)
    # At exit the kernel does it, and views may be about that still serve.
    weakref.finalize(mapped, _libc.munmap, base, reserved).atexit = False
    return memoryview(mapped).cast("B")


def _map(address: int | None, byte_count: int, protection: int, flags: int, fd: int) -> int:
    got = _libc.mmap(address, byte_count, protection, flags, fd, 0)
    if got == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    assert isinstance(got, int), "address 0 is never given"
    return got


class HugePages:
    """Asks for huge pages; after a refusal, or one that took long to get, not again for a while. Any thread."""

    def __init__(self) -> None:
        self._not_before_s = 0.0

    def collapse(self, mapped: memoryview, start: int, stop: int) -> None:
        """Has the whole chunks of `HUGE_BYTES` that lie about bytes [start, stop) of a `map_whole` made huge, if it can be."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        first = start // HUGE_BYTES * HUGE_BYTES
        last = min(-(-stop // HUGE_BYTES), len(mapped) // HUGE_BYTES) * HUGE_BYTES
        for at in range(first, last, HUGE_BYTES):
            began_s = time.monotonic()
            if began_s < self._not_before_s:
                return
            mapped[at]  # a chunk without a page is refused
            refused = _libc.madvise(address + at, HUGE_BYTES, _MADV_COLLAPSE)
            now_s = time.monotonic()
            if refused or now_s - began_s > _SLOW_S:
                self._not_before_s = now_s + _RETRY_S
