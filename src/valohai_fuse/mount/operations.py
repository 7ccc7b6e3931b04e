"""FUSE words in, engine words out: a thin translation, no decisions.

Names and attributes are answered from the tree, in memory, for ever the same; so the kernel may keep them for ever and
`forget` is a no-op. The exception is a file whose size is not known yet: it is sized when it is first looked up, and until
then the kernel is told not to keep its attributes.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ReaddirToken,
    RequestContext,
    StatvfsData,
)

from valohai_fuse.engine.objects import Handle
from valohai_fuse.engine.reader import Bytes, Reader
from valohai_fuse.engine.siblings import SiblingAhead
from valohai_fuse.engine.sizing import Sizing
from valohai_fuse.model.tree import Inode, Tree
from valohai_fuse.mount.errnos import guarded
from valohai_fuse.mount.under_way import RequestsUnderWay
from valohai_fuse.ports import Metrics

log = logging.getLogger(__name__)

FOREVER_S = 10 * 365 * 86400.0
"""Nothing of the tree changes while it is mounted."""

STAT_BLOCK_BYTES = 512
PREFERRED_READ_BYTES = 128 * 1024
"""st_blksize: what cp and cat read at a time, and the buffered files of Python and C for each record at a new place, which fetches
two or three blocks."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Who owns every file of the mount."""

    uid: int
    gid: int


@dataclass(slots=True)
class _RemoteHandle:
    handle: Handle


@dataclass(slots=True)
class _LocalHandle:
    descriptor: int
    size: int


class Operations(pyfuse3.Operations):
    """The handlers of one mount. `open_local(path)` opens a file that lies on the disk below the mount point;
    `attributes_of(inode)` gives the user.valohai.* attributes, or is None when they are switched off; `get_ready` is called
    when somebody shows an interest in a file: what reading needs, and takes time to start, is started then."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        *,
        tree: Tree,
        reader: Reader,
        sizing: Sizing,
        siblings: SiblingAhead,
        metrics: Metrics,
        owner: Ownership,
        open_local: Callable[[str], int],
        attributes_of: Callable[[Inode], dict[bytes, bytes]] | None,
        get_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._get_ready = get_ready
        self._tree = tree
        self._reader = reader
        self._sizing = sizing
        self._siblings = siblings
        self._owner = owner
        self._open_local = open_local
        self._attributes_of = attributes_of
        self._handles: dict[int, _RemoteHandle | _LocalHandle] = {}
        self._directories: dict[int, Sequence[tuple[bytes, Inode]]] = {}
        self._next_handle = 1
        self.metrics = metrics
        self.under_way = RequestsUnderWay()

    # --- names and attributes ---

    @guarded(naming=True)
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:  # noqa: ARG002
        """A name in a directory; an unknown size is asked for here."""
        self.metrics.count("lookups")
        inode = self._tree.lookup(Inode(parent_inode), name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if not self._tree.is_dir(inode):
            self._get_ready()
            if self._tree.size(inode) is None:
                await self._sizing.wait_known(inode)
        return self._entry(inode, EntryAttributes())

    @guarded(naming=True)
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:  # noqa: ARG002
        """Attributes of an inode."""
        own = Inode(inode)
        if not self._tree.is_dir(own) and self._tree.size(own) is None:
            await self._sizing.wait_known(own)
        return self._entry(own, EntryAttributes())

    def _entry(self, inode: Inode, entry: EntryAttributes) -> EntryAttributes:
        tree = self._tree
        entry.st_ino = InodeT(inode)
        if tree.is_dir(inode):
            entry.st_mode = stat.S_IFDIR | 0o555
            entry.st_nlink = tree.nlink(inode)
            size: int | None = 4096
        else:
            entry.st_mode = stat.S_IFREG | 0o444
            entry.st_nlink = 1
            size = tree.size(inode)
        entry.st_size = size or 0
        entry.st_blocks = -(-(size or 0) // STAT_BLOCK_BYTES)
        entry.st_blksize = PREFERRED_READ_BYTES
        entry.st_uid = self._owner.uid
        entry.st_gid = self._owner.gid
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = tree.mtime_ns(inode)
        entry.entry_timeout = FOREVER_S
        entry.attr_timeout = 0 if size is None else FOREVER_S
        return entry

    # --- directories ---

    @guarded(naming=True)
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:  # noqa: ARG002
        """A snapshot of the names, so that readdir continues where it was."""
        own = Inode(inode)
        self._get_ready()  # the names come with their attributes: of a file that was listed no look-up will tell
        number = self._number()
        names = [(b".", own), (b"..", self._tree.parent(own)), *self._tree.children(own)]
        self._directories[number] = names
        return FileHandleT(number)

    @guarded()
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """Names with attributes; an entry whose size is not known is told so and asked for when it is stat-ed."""
        children = self._directories[fh]
        entry = EntryAttributes()  # filled anew for each name: the reply copies it
        for position in range(start_id, len(children)):
            name, inode = children[position]
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._entry(inode, entry), position + 1):
                break

    @guarded()
    async def releasedir(self, fh: FileHandleT) -> None:
        """Forgets the snapshot."""
        del self._directories[fh]

    # --- files ---

    @guarded(naming=True)
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Opens for reading; the kernel keeps the pages of former opens, for the bytes do not change."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND):
            raise pyfuse3.FUSEError(errno.EROFS)
        own = Inode(inode)
        keep_cache = True
        opened: _RemoteHandle | _LocalHandle
        if self._tree.local(own):
            descriptor = await trio.to_thread.run_sync(self._open_local, self._tree.path(own))
            opened = _LocalHandle(descriptor, self._tree.size(own) or 0)
        else:
            self._get_ready()  # what was started may have ended for idleness, and the kernel does not look a name up twice
            if self._tree.size(own) is None:
                await self._sizing.wait_known(own)
            handle, keep_cache = self._reader.open(own)
            opened = _RemoteHandle(handle)
            self._siblings.on_open(own, ctx.pid)
        self.metrics.count("opens")
        number = self._number()
        self._handles[number] = opened
        return FileInfo(fh=FileHandleT(number), keep_cache=keep_cache)

    @guarded()
    async def read(self, fh: FileHandleT, off: int, size: int) -> Bytes:  # type: ignore[override]  # any buffer is accepted
        """Exactly the bytes asked for, fewer only at the end."""
        opened = self._handles[fh]
        if isinstance(opened, _RemoteHandle):
            return await self._reader.read(opened.handle, off, size)
        return await trio.to_thread.run_sync(os.pread, opened.descriptor, size, off)

    @guarded()
    async def release(self, fh: FileHandleT) -> None:
        """The last descriptor of an open is gone."""
        opened = self._handles.pop(fh)
        if isinstance(opened, _RemoteHandle):
            self._reader.close(opened.handle)
        else:
            os.close(opened.descriptor)

    async def flush(self, fh: FileHandleT) -> None:  # noqa: ARG002
        """Nothing is ever written; answered once, after ENOSYS the kernel does not ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @guarded()
    async def statfs(self, ctx: RequestContext) -> StatvfsData:  # noqa: ARG002
        """A full, read-only file system of the size of what it shows."""
        files, size, _ = self._tree.totals()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = -(-size // 4096)
        data.f_bfree = data.f_bavail = 0
        data.f_files = files
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:  # noqa: ARG002
        """The kernel checks modes itself (default_permissions)."""
        return not mode & os.W_OK

    # --- extended attributes ---

    @guarded()
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:  # noqa: ARG002
        """What Valohai knows of a file. ENOSYS when switched off: the kernel then never asks again (`ls -l` asks twice a file)."""
        if self._attributes_of is None:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        value = self._attributes_of(Inode(inode)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @guarded()
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> list[bytes]:  # noqa: ARG002
        """The names of those attributes."""
        if self._attributes_of is None:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return list(self._attributes_of(Inode(inode)))

    def _number(self) -> int:
        number = self._next_handle
        self._next_handle += 1
        return number

    @property
    def open_handles(self) -> int:
        """Files open now, local ones included."""
        return len(self._handles)


def _refuse(name: str) -> None:
    async def refused(self: Operations, *args: object, **kwargs: object) -> None:  # noqa: ARG001
        raise pyfuse3.FUSEError(errno.EROFS)

    refused.__name__ = name
    refused.__doc__ = "This file system is read-only."
    setattr(Operations, name, refused)


# The kernel refuses these itself on a read-only mount; this is for a mount that somebody remounted read-write.
for _name in (
    "mkdir",
    "rmdir",
    "create",
    "mknod",
    "unlink",
    "rename",
    "symlink",
    "link",
    "setattr",
    "write",
    "setxattr",
    "removexattr",
):
    _refuse(_name)
