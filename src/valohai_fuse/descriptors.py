"""Makes room for a process's descriptors while it has one thread.

The kernel's table of them begins with 64 places and grows as they are used up. In a process of several threads it then waits
until no processor can still be looking at the old one (fs/file.c: expand_fdtable, synchronize_rcu): 6 to 25 ms, in which
whoever opened the file that was one too many stands still, and with it every reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource

DESCRIPTORS_EXPECTED = 2048
"""Twice what the store keeps open at the most (`store.segments`), for the sockets and all else. 16 KiB of the kernel's memory."""


def expand_descriptor_table() -> None:
    """Before the first thread starts. Does nothing where the limits forbid it."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_EXPECTED if soft_limit == resource.RLIM_INFINITY else min(DESCRIPTORS_EXPECTED, soft_limit)
    with contextlib.suppress(OSError):
        any_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.close(fcntl.fcntl(any_fd, fcntl.F_DUPFD_CLOEXEC, wanted - 1))
        finally:
            os.close(any_fd)
