"""Why a target is not reached, and what reaching it would take: shown on the page as long as it is missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_COLD: Final = """\
the processors are the bound (*busy*), and the store and the reader have two fifths of them. What is ours and not floor is the
Python of the daemon and the worker, once for each MiB, and the system calls that go with it. More than *busy* takes both of them in
a compiled language; how far larger and smaller pieces, one process more or less, and other windows go stands in
`docs/decisions.md`."""

LIMITS: Final[Mapping[str, str]] = {
    "seq-near": _COLD,
    "seq-region": _COLD,
    "seq-far": """\
a window is twice what was read, so it takes seven round trips of 0.1 s, 0.7 of the 1.9 s, until it hides one, and after that 96 MiB
come in each. Four times what was read gained a ninth in `scripts/simulate sequential --latency-ms 100`, but a stream that stops
may then have fetched four times what it read.""",
    "seq-capped": "as `seq-region` once the window is full; until then a connection's own rate bounds each piece of it.",
    "seq-tls": """\
what the store encrypts is decrypted beside it on the same two processors, and what is wanted is beyond *busy*. curl, which mounts
nothing, is a few per cent away. It would take a third processor, or a store that is not on this machine.""",
    "files-4": _COLD,
    "seq-warm-kept": """\
nothing of ours runs, the CPU of the mount is 0, and the reader is busy all the time, in the kernel's copies and pages but for
the fifth that is its own Python (profile below, beside that of the local directory). The kernel keeps a FUSE file in single
pages and ext4's in large folios, which shows where memory is quick: on one day a file on ext4 was read at 30,000 MB/s, the same
on a tmpfs of single pages at 16,000. On another, with slower memory (a plain file at 7,100), the mount reached 0.94 of it. *Busy*
is no bound here: one reader has one processor. It would take FUSE in large folios.""",
    "random-4k-8": """\
the first misses cost a round trip each, until a file has proved worth completing; a peer that fetches all that lies behind each
read has the file sooner, for more than twice the bytes (column fetched/read) and at any number of reads.""",
    "zip-random": """\
as `random-4k-8`: the members of a small archive are misses until it is worth completing. s3fs fetches 80 MB for the first.""",
    "random-warm-1": """\
a block that is on the disk and not in memory is read and verified whole, 64 KiB for each 4: 110 us of this disk and not 50. The
rest is some 0.15 ms of the Python of the daemon's one thread. s3fs, in C++, verifies nothing. Less would take a compiled
language.""",
    "random-warm-8": "as `random-warm-1`, by one event loop for all readers.",
    "random-128k-warm-1": "as `random-warm-1`.",
    "random-128k-warm-8": "as `random-warm-8`.",
    "mmap-random-warm": "as `random-warm-1`.",
    "zip-warm": "as `random-warm-1`, for each request of the kernel.",
    "parquet-warm": """\
as `random-warm-1`, for each request of the kernel; it varies threefold from round to round, and eight trials without other mounts
between them took 0.09 to 0.19 s, half of them less than 0.1.""",
    "find-warm": """\
the reader by itself takes a second of a processor for the 200,000 files, here as in the local directory (column reader s, and the
profile below); three times the best peer's rate would leave it two thirds of one. Names and attributes come from the kernel's
own cache; between that and `plain` are the directory listings, which the kernel does not cache for pyfuse3, whose handles lack
`cache_readdir`, and which are what the daemon's CPU goes into.""",
}
