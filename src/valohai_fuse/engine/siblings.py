"""Fetches the next small files ahead of a reader that opens a directory's files one after the other.

`model.siblings` recognises the order; this room keeps one of those for each directory in use, asks the reader to fetch what
it names, and holds the bounds: only the beginning of large files, nothing while as much is in flight as readahead may take,
and no waiting: an open never takes longer because of this.

What is opened in no order is completed as `engine.fill` completes a file that is read at random, and within the same limits: small
files only, with few requests under way, and no more of a directory than `FillLimits.bytes_max`.

State changes only on the trio thread, in functions that do not await.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from valohai_fuse.engine.fill import FillLimits
from valohai_fuse.engine.reader import Ahead
from valohai_fuse.model.readahead import FIRST_READ_BYTES
from valohai_fuse.model.shuffle import Shuffle
from valohai_fuse.model.siblings import Directories, Siblings
from valohai_fuse.model.tree import Inode, Tree

FILES_MAX = 1_000_000
"""In the directories that are followed at once, 14 bytes for each; the least recently used directory is forgotten. A data loader
that shuffles over a thousand directories comes back to each: following it anew each time would sort its names each time."""


_DIRECTORY_FILES = 256
"""A directory itself costs as much as so many files, 3.6 KB."""
SMALL_BYTES_MAX = FIRST_READ_BYTES
"""What is fetched of a file that nobody has opened; of a larger one that would be the beginning only."""
PRESENT_PER_OPEN = 4
"""Of files that are cached already, so many are looked at upon one open at the most: each look takes some 0.1 ms, and with a whole
window of them at once one open in a hundred took 15 ms. It is more than one, so that the looks get ahead of the opens."""


@dataclass(slots=True)
class _Directory:
    files: array[int]  # inodes, ascending, which is the order of the listing
    siblings: Siblings
    filled_bytes: int = 0
    """Fetched of it while its files were opened in no order."""


class SiblingAhead:
    """Follows the opens of each directory. `fetch_ahead` is the reader's; `requests_ahead()`: how many are under way that nobody
    waits for."""

    def __init__(
        self,
        tree: Tree,
        fetch_ahead: Callable[[Inode], Ahead],
        *,
        requests_ahead: Callable[[], int],
        fill: FillLimits,
    ) -> None:
        self._tree = tree
        self._fetch_ahead = fetch_ahead
        self._requests_ahead = requests_ahead
        self._fill = fill
        self._common = Directories()
        self._directories: LRUCache[Inode, _Directory] = LRUCache(FILES_MAX, getsizeof=_weight)

    def on_open(self, inode: Inode, opener: int = 0) -> None:
        """A file was opened, by the thread `opener` (0: of a process that cannot be seen from here): begins fetching those that
        will be opened next, if an order shows."""
        parent = self._tree.parent(inode)
        directory = self._directories.get(parent)
        if directory is None:
            directory = self._directories[parent] = self._directory(parent)
        position = bisect_left(directory.files, inode)
        present = 0
        for position_next in directory.siblings.on_open(position, opener):
            if present == PRESENT_PER_OPEN:
                return
            sibling = Inode(directory.files[position_next])
            if self._is_to_fetch(sibling):
                outcome = self._fetch_ahead(sibling)
                if outcome is Ahead.FULL:
                    return
                present += outcome is Ahead.PRESENT
        shuffle = directory.siblings.shuffle
        if shuffle is not None and shuffle.requests_max:
            self._complete(directory, shuffle)

    def _complete(self, directory: _Directory, shuffle: Shuffle) -> None:
        """Files are opened in no order: begins fetching some of the others."""
        limits = self._fill
        requests_max = min(shuffle.requests_max, limits.connections // 2)
        if limits.bytes_max <= 0 or not limits.is_kept():
            return
        for position in shuffle.next(requests_max - self._requests_ahead()):
            sibling = Inode(directory.files[position])
            size = self._tree.size(sibling) or 0
            if size > SMALL_BYTES_MAX or directory.filled_bytes + size > limits.bytes_max:
                continue
            if self._is_to_fetch(sibling) and self._fetch_ahead(sibling) is Ahead.BEGUN:
                directory.filled_bytes += size

    def _is_to_fetch(self, inode: Inode) -> bool:
        return bool(self._tree.size(inode)) and not self._tree.local(inode)

    def _directory(self, parent: Inode) -> _Directory:
        children = sorted(
            ((inode, name) for name, inode in self._tree.children(parent) if not self._tree.is_dir(inode)),
            key=lambda child: child[0],
        )
        return _Directory(
            array("I", [inode for inode, _ in children]), Siblings([name for _, name in children], self._common)
        )


def _weight(directory: _Directory) -> int:
    return min(len(directory.files) + _DIRECTORY_FILES, FILES_MAX)
