"""A process that touches a mount so that the tests need not: what hangs, hangs here. Standard library only; run with `-I -S`.

One JSON line in (`op` and its arguments), one JSON line out ({"bytes": n} or {"errno": n} or {"value": ...}), followed by n raw
bytes. Descriptors are named by the caller.
"""

import ctypes
import json
import mmap
import os
import sys

PIECE_BYTES = 1 << 20
opened: dict[str, int] = {}


def read_exactly(descriptor: int, start: int, size: int) -> bytes:
    """Bytes [start, start + size), fewer at the end of the file only. Raises OSError, also after a part."""
    pieces = []
    while size:
        piece = os.pread(descriptor, min(size, PIECE_BYTES), start)
        if not piece:
            break
        pieces.append(piece)
        start += len(piece)
        size -= len(piece)
    return b"".join(pieces)


def read_mapped(descriptor: int, start: int, size: int) -> bytes:
    """The same through a mapping, copied by write(2) into a pipe: EFAULT where a load from a page that fails would be SIGBUS."""
    length = os.fstat(descriptor).st_size
    stop = min(start + size, length)
    if start >= stop:
        return b""
    with mmap.mmap(descriptor, length, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        reader, writer = os.pipe()
        try:
            copied = bytearray()
            view = memoryview(mapped)
            try:
                while start < stop:
                    count = os.write(writer, view[start : min(stop, start + 65536)])
                    copied += os.read(reader, count)
                    start += count
            finally:
                view.release()
            return bytes(copied)
        finally:
            os.close(reader)
            os.close(writer)


def act(request: dict) -> tuple[object, bytes | None]:  # type: ignore[type-arg]  # JSON
    """Carries one out: a value, or bytes. Raises OSError, KeyError."""
    op = request["op"]
    if op == "open":
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if request["direct"] else 0)
        opened[request["name"]] = os.open(request["path"], flags)
        return None, None
    if op == "close":
        os.close(opened.pop(request["name"]))
        return None, None
    if op == "pread":
        return None, read_exactly(opened[request["name"]], request["start"], request["size"])
    if op == "seek_read":
        descriptor = opened[request["name"]]
        os.lseek(descriptor, request["start"], os.SEEK_SET)
        pieces = []
        left = request["size"]
        while left and (piece := os.read(descriptor, min(left, PIECE_BYTES))):
            pieces.append(piece)
            left -= len(piece)
        return None, b"".join(pieces)
    if op == "mmap":
        return None, read_mapped(opened[request["name"]], request["start"], request["size"])
    if op == "forget_pages":
        os.posix_fadvise(opened[request["name"]], 0, 0, os.POSIX_FADV_DONTNEED)
        return None, None
    if op == "listdir":
        return sorted(os.listdir(request["path"])), None
    if op == "stat":
        found = os.stat(request["path"])
        return [found.st_mode, found.st_size, found.st_nlink, found.st_ino], None
    if op == "getxattr":
        return os.getxattr(request["path"], request["attribute"]).decode(), None
    raise KeyError(op)


def main() -> None:
    """Until the end of the input; dies with its parent."""
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    for line in sys.stdin.buffer:
        data = None
        try:
            value, data = act(json.loads(line))
            answer: dict[str, object] = {"value": value} if data is None else {"bytes": len(data)}
        except OSError as error:
            answer = {"errno": error.errno}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + (data or b""))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
