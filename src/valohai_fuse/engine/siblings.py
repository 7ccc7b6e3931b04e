"""Fetches the next small files ahead of a reader that opens a directory's files one after the other.

`model.siblings` recognises the order; this room keeps one of those for each directory in use, asks the reader to fetch what
it names, and holds the bounds: only the beginning of large files, nothing while as much is in flight as readahead may take,
and no waiting: an open never takes longer because of this.

State changes only on the trio thread, in functions that do not await.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from valohai_fuse.model.siblings import Siblings
from valohai_fuse.model.tree import Inode, Tree

DIRECTORIES_MAX = 64
"""Directories followed at once; the least recently used one is forgotten."""


@dataclass(frozen=True, slots=True)
class _Directory:
    files: list[Inode]  # ascending by inode, which is the order of the listing
    siblings: Siblings


class SiblingAhead:
    """Follows the opens of each directory. `fetch_ahead(inode)` begins fetching a file, False: enough is in flight."""

    def __init__(self, tree: Tree, fetch_ahead: Callable[[Inode], bool]) -> None:
        self._tree = tree
        self._fetch_ahead = fetch_ahead
        self._directories: LRUCache[Inode, _Directory] = LRUCache(DIRECTORIES_MAX)

    def on_open(self, inode: Inode) -> None:
        """A file was opened: begins fetching those that will be opened next, if an order shows."""
        parent = self._tree.parent(inode)
        directory = self._directories.get(parent)
        if directory is None:
            directory = self._directories[parent] = self._directory(parent)
        position = bisect_left(directory.files, inode)
        for position_next in directory.siblings.on_open(position):
            sibling = directory.files[position_next]
            if self._tree.size(sibling) and not self._tree.local(sibling) and not self._fetch_ahead(sibling):
                return

    def _directory(self, parent: Inode) -> _Directory:
        children = sorted(
            ((inode, name) for name, inode in self._tree.children(parent) if not self._tree.is_dir(inode)),
            key=lambda child: child[0],
        )
        return _Directory([inode for inode, _ in children], Siblings([name for _, name in children]))
