"""Tells glibc's malloc to keep what it frees, in processes that take and give back buffers of a megabyte all the time.

By default malloc returns such buffers to the kernel (munmap, or brk from the top of the heap) and gets them back page by
page: 256 page faults a megabyte, each with a page to be cleared. The process keeps its peak instead, which for a daemon or a
worker is bounded by the reads and transfers under way.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 64 * 1024 * 1024
"""Blocks up to half of this come from the heap (glibc's limit is 32 MiB), and so much of it may lie free at its top."""


def keep_freed_memory() -> bool:
    """Sets both thresholds for this process. False where the C library has no mallopt (musl)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
