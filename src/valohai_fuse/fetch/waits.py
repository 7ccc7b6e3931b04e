"""How long this thread has waited for anything but a processor: the clock, less the time that the kernel says it ran or stood
ready to run. So a disk that holds a landing up is told from a machine that is merely busy.

Where the kernel does not say (no schedstat), nothing has ever waited.
"""

from __future__ import annotations

import os
import threading
import time

_state = threading.local()


def waited_s() -> float:
    """A figure that grows by what the thread waits; only the difference of two means something. Some 3 us."""
    fd = getattr(_state, "fd", None)
    if fd is None:
        try:
            fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            fd = -1
        _state.fd = fd
    if fd < 0:
        return 0.0
    now_ns = time.monotonic_ns()
    try:
        ran_ns, ready_ns, _ = os.pread(fd, 100, 0).split()
    except (OSError, ValueError):
        return 0.0
    return (now_ns - int(ran_ns) - int(ready_ns)) / 1e9
