"""Readers for load tests, in processes of their own. Standard library only; run with `-I -S`; files are ramps modulo 251.

`waiting COUNT FLAGS PATH SIZE STRIDE`: COUNT threads read one block each, STRIDE apart; prints `up` when all have begun, and the
number that failed when all have ended.
`checking SECONDS SEED PATH SIZE...`: reads random pieces of random files until the time is up and compares every byte; prints how
many reads and bytes, exits with 1 and what was wrong at the first error.
`holding COUNT PATH SIZE`: opens the file COUNT times, reads a little through each in turn, prints `up` and holds them until the end
of its input.
"""

import os
import random
import sys
import threading
import time

RAMP = bytes(range(251)) * 4200


def expected(start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a ramp."""
    first = start % 251
    return RAMP[first : first + stop - start]


def waiting(count: int, flags: int, path: str, size: int, stride: int) -> None:
    """Many threads, each in one read."""
    threading.stack_size(128 * 1024)
    descriptor = os.open(path, os.O_RDONLY | flags)
    failed = []

    def read(start: int) -> None:
        try:
            if os.pread(descriptor, 4096, start) != expected(start, start + 4096):
                failed.append(start)
        except OSError:
            failed.append(start)

    threads = [threading.Thread(target=read, args=(number * stride % (size - 4096),)) for number in range(count)]
    for thread in threads:
        thread.start()
    print("up", flush=True)
    for thread in threads:
        thread.join()
    print(len(failed), flush=True)


def checking(seconds: float, seed: int, files: list[tuple[str, int]]) -> int:
    """Random reads, each compared."""
    dice = random.Random(seed)
    until = time.monotonic() + seconds
    reads = total = 0
    while time.monotonic() < until:
        path, size = dice.choice(files)
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if dice.random() < 0.2 else 0))
        try:
            start = dice.randrange(size)
            for _ in range(dice.randrange(1, 6)):
                stop = min(size, start + dice.choice([1, 4096, 65536, 1000_000]))
                got = b""
                while len(got) < stop - start:
                    piece = os.pread(descriptor, stop - start - len(got), start + len(got))
                    if not piece:
                        break
                    got += piece
                if got != expected(start, stop):
                    print(f"{path}: wrong bytes in [{start}, {stop})", flush=True)
                    return 1
                reads, total = reads + 1, total + len(got)
                start = stop if stop < size and dice.random() < 0.5 else dice.randrange(size)
        except OSError as error:
            print(f"{path}: {error}", flush=True)
            return 1
        finally:
            os.close(descriptor)
    print(reads, total, flush=True)
    return 0


def holding(count: int, path: str, size: int) -> None:
    """Many handles, each reading in sequence from a place of its own."""
    descriptors = [os.open(path, os.O_RDONLY) for _ in range(count)]
    for number, descriptor in enumerate(descriptors):
        start = number * (size // count)
        for step in range(3):
            where = start + step * 4096
            if os.pread(descriptor, 4096, where) != expected(where, where + 4096):
                print(f"wrong bytes at {where}", flush=True)
                return
    print("up", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    if mode == "waiting":
        waiting(int(rest[0]), int(rest[1]), rest[2], int(rest[3]), int(rest[4]))
    elif mode == "holding":
        holding(int(rest[0]), rest[1], int(rest[2]))
    else:
        pairs = [(rest[i], int(rest[i + 1])) for i in range(2, len(rest), 2)]
        sys.exit(checking(float(rest[0]), int(rest[1]), pairs))
