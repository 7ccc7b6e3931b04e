"""The loop that people write: `requests`, one session per thread, streamed to files. argv: LIST THREADS [CA].

LIST holds `url TAB path` lines. Runs in the peers' own environment; imports nothing of this project.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import requests


def fetch(lines: list[str], ca: str) -> None:
    """Downloads each line's URL to its path, in order, over one session."""
    with requests.Session() as session:
        for line in lines:
            url, path = line.split("\t")
            with session.get(url, stream=True, timeout=60, verify=ca or True) as response:
                response.raise_for_status()
                with open(path, "wb") as out:
                    out.writelines(response.iter_content(1 << 20))


def main() -> None:
    """Spreads the list over the threads."""
    listed, threads, ca = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with open(listed) as text:
        lines = text.read().splitlines()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fetch, [lines[n::threads] for n in range(threads)], [ca] * threads))


main()
