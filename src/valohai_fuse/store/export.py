"""Makes plain files of what is completely cached, verifying every byte on the way; no network, no mount."""

from __future__ import annotations

import contextlib
import os

from valohai_fuse.model.extents import SEGMENT_BYTES, Extent
from valohai_fuse.ports import NotHere, ObjectKey
from valohai_fuse.store.landing import write_all
from valohai_fuse.store.segments import SegmentStore


def export(store: SegmentStore, key: ObjectKey, path: str) -> bool:
    """Writes the object to `path`, which appears only when it is complete; its directory must be there.

    False: some of it is not cached, or not in one version. Raises OSError.
    """
    version = store.version(key, 0) if key.size else ""
    if version is None:
        return False
    partial = f"{path}.partial-{os.getpid()}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        for start in range(0, key.size, SEGMENT_BYTES):
            data = store.read_blocking(key, version, Extent(start, min(start + SEGMENT_BYTES, key.size)))
            if isinstance(data, NotHere):
                return False
            write_all(fd, data, start)
        os.replace(partial, path)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return True
