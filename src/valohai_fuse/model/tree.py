"""The tree that the mount shows: answers lookup, getattr and readdir from memory, synchronously and for ever the same.

Built once from the manifest and from what is on the disk already. One column per attribute, indexed by inode, and one
dictionary per directory: about 200 bytes a file, so that a million files fit where objects would need a gigabyte.

Invariants: inodes 1 (the root) to `inode_count` are all alive and none is ever freed; they follow from the manifest alone,
for files that only the disk knows come last; children are in the manifest's order, which is the order in which a reader
that goes through the directory will want them. The one thing that changes later is an unknown size that becomes known.

Who wins: of two files of one name the last, of a file and a directory the directory, of a file in the manifest and the same
one on disk the disk (it was downloaded). Each is told in `warnings`, except the last, which is the rule for `always` files.

Must not know: the clock, the disk, FUSE. Used on one thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NewType, overload

from valohai_fuse.model.manifest import UNKNOWN, InputSpan, Manifest
from valohai_fuse.model.names import COMPONENT_BYTES_MAX, UNSAFE_COMPONENTS, below_input, printable, refusal
from valohai_fuse.model.notices import Notices

Inode = NewType("Inode", int)
ROOT = Inode(1)

NO_INDEX = -1
"""`file_index` of what the manifest does not name: directories, and files that are only on the disk."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A regular file that is on the disk below the mount point already."""

    size: int
    mtime_ns: int


class Children(Sequence[tuple[bytes, Inode]]):
    """The entries of one directory, by position; a view of four bytes an entry, made once per directory."""

    __slots__ = ("_inodes", "_names")

    def __init__(self, names: list[bytes], inodes: array[int]) -> None:
        self._names = names
        self._inodes = inodes

    def __len__(self) -> int:
        return len(self._inodes)

    @overload
    def __getitem__(self, position: int) -> tuple[bytes, Inode]: ...
    @overload
    def __getitem__(self, position: slice) -> list[tuple[bytes, Inode]]: ...
    def __getitem__(self, position: int | slice) -> tuple[bytes, Inode] | list[tuple[bytes, Inode]]:
        if isinstance(position, slice):
            return [(self._names[inode], Inode(inode)) for inode in self._inodes[position]]
        inode = self._inodes[position]
        return self._names[inode], Inode(inode)


@dataclass(slots=True)
class _Columns:
    """What the builder grows and the tree then owns. By inode; 0 is no inode; the root is its own parent, as everywhere."""

    notices: Notices = field(default_factory=Notices)
    names: list[bytes] = field(default_factory=lambda: [b"", b""])
    parents: array[int] = field(default_factory=lambda: array("I", (0, ROOT)))
    sizes: array[int] = field(default_factory=lambda: array("q", (0, 0)))
    indices: array[int] = field(default_factory=lambda: array("i", (NO_INDEX, NO_INDEX)))
    entries: dict[int, dict[bytes, int]] = field(default_factory=lambda: {ROOT: {}})
    """By directory: its entries."""
    subdirectories: dict[int, int] = field(default_factory=dict)
    local_mtimes_ns: dict[int, int] = field(default_factory=dict)

    def add_file(self, directory: int, name: bytes, size: int, index: int) -> int:
        """A new inode; the caller knows that the name is free."""
        inode = len(self.names)
        self.names.append(name)
        self.parents.append(directory)
        self.sizes.append(size)
        self.indices.append(index)
        self.entries[directory][name] = inode
        return inode

    def make_directory(self, inode: int) -> None:
        """Turns a new inode, or the file that it was so far, into an empty directory."""
        self.entries[inode] = {}
        self.sizes[inode] = 0
        self.indices[inode] = NO_INDEX
        self.local_mtimes_ns.pop(inode, None)
        parent = self.parents[inode]
        self.subdirectories[parent] = self.subdirectories.get(parent, 0) + 1


class Tree:
    """See the module's docstring. Methods that take an inode raise IndexError for one that was never given out, and
    KeyError where a directory is asked for and the inode is a file."""

    def __init__(self, columns: _Columns, mtime_ns: int) -> None:
        self.notices = columns.notices
        self._mtime_ns = mtime_ns
        self._names = columns.names
        self._parents = columns.parents
        self._sizes = columns.sizes
        self._indices = columns.indices
        self._entries = columns.entries
        self._subdirectories = columns.subdirectories
        self._local_mtimes_ns = columns.local_mtimes_ns
        self._children: dict[int, Children] = {}
        self._files = self.inode_count - len(self._entries)
        self._unknown_size_files = self._sizes.count(UNKNOWN)
        self._bytes_known = sum(self._sizes) - UNKNOWN * self._unknown_size_files

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about names refused, duplicates, clashes and odd sizes; bounded in number."""
        return self.notices.lines()

    @property
    def inode_count(self) -> int:
        """How many inodes there are, directories and the root included; they are 1 to this, closed."""
        return len(self._names) - 1

    def lookup(self, parent: Inode, name: bytes) -> Inode | None:
        """The inode of `name` in the directory `parent`; `.` and `..` are answered. None: no such name, or no directory."""
        entries = self._entries.get(parent)
        if entries is None:
            return None
        found = entries.get(name)
        if found is not None:
            return Inode(found)
        if name == b".":
            return parent
        return self.parent(parent) if name == b".." else None

    def is_dir(self, inode: Inode) -> bool:
        """Whether the inode is a directory."""
        return inode in self._entries

    def local(self, inode: Inode) -> bool:
        """Whether the inode is a file that is on the disk below the mount point, and to be read from there."""
        return inode in self._local_mtimes_ns

    def size(self, inode: Inode) -> int | None:
        """Bytes of a file; None: not known yet. 0 for a directory."""
        size = self._sizes[inode]
        return None if size == UNKNOWN else size

    def set_size(self, inode: Inode, size: int) -> None:
        """Makes the size of a file known, in bytes. Raises ValueError for a directory or a negative size."""
        if size < 0 or inode in self._entries:
            raise ValueError(f"inode {inode} cannot have the size {size}")
        before = self._sizes[inode]
        self._sizes[inode] = size
        if before == UNKNOWN:
            self._unknown_size_files -= 1
            before = 0
        self._bytes_known += size - before

    def nlink(self, inode: Inode) -> int:
        """Links: 1 for a file; for a directory its own `.`, its name in the parent and the `..` of each directory in it."""
        return 2 + self._subdirectories.get(inode, 0) if inode in self._entries else 1

    def mtime_ns(self, inode: Inode) -> int:
        """Nanoseconds since the epoch: that of the file on disk for a local one, else that of the manifest."""
        return self._local_mtimes_ns.get(inode, self._mtime_ns)

    def children(self, inode: Inode) -> Children:
        """The entries of a directory without `.` and `..`; the same order at each call, cheap to call and to index."""
        view = self._children.get(inode)
        if view is None:
            view = self._children[inode] = Children(self._names, array("I", self._entries[inode].values()))
        return view

    def child_count(self, inode: Inode) -> int:
        """Number of entries of a directory."""
        return len(self._entries[inode])

    def parent(self, inode: Inode) -> Inode:
        """The directory that holds the inode; the root holds itself."""
        return Inode(self._parents[inode])

    def file_index(self, inode: Inode) -> int:
        """Where the manifest names this file (for `Manifest.record`), or NO_INDEX."""
        return self._indices[inode]

    def path(self, inode: Inode) -> str:
        """The path relative to the root, without a leading `/`; "" for the root. Bytes that are no UTF-8 as surrogates."""
        components = []
        while inode != ROOT:
            components.append(self._names[inode])
            inode = self.parent(inode)
        return b"/".join(reversed(components)).decode("utf-8", "surrogateescape")

    def find(self, path: str) -> Inode | None:
        """The inode at a path relative to the root, as `path` gives it; empty components and `.` are passed over."""
        try:
            components = path.encode("utf-8", "surrogateescape").split(b"/")
        except UnicodeEncodeError:
            return None
        inode: Inode | None = ROOT
        for component in components:
            if component and inode is not None:
                inode = self.lookup(inode, component)
        return inode

    def walk_files(self, inode: Inode) -> Iterator[Inode]:
        """Every file below a directory, depth first, in the order of `children`; the file itself for a file."""
        if inode not in self._entries:
            yield inode
            return
        stack = [iter(self._entries[inode].values())]
        while stack:
            for child in stack[-1]:
                if child in self._entries:
                    stack.append(iter(self._entries[child].values()))
                    break
                yield Inode(child)
            else:
                stack.pop()

    def tell_unreachable(self, manifest: Manifest, because: str) -> None:
        """Adds a warning per input and kind of location that cannot be fetched, and has to be: `because` says why there will be
        no other URL. What is on the disk already is not meant."""
        if not manifest.has_obstacles():
            return
        found: dict[tuple[str, str], list[int]] = {}
        for inode in range(ROOT, len(self._names)):
            index = self._indices[inode]
            if index != NO_INDEX and inode not in self._local_mtimes_ns and (obstacle := manifest.obstacle(index)):
                found.setdefault((manifest.span(index).name, obstacle), []).append(inode)
        for (name, obstacle), inodes in found.items():
            first = printable(self.path(Inode(inodes[0])).encode("utf-8", "surrogateescape"))
            which = first if len(inodes) == 1 else f"{len(inodes)} files ({first}, ...)"
            self.notices.add(
                f"input {printable(name)}: {which} cannot be read unless cached: {obstacle}, and {because}"
            )

    def totals(self) -> tuple[int, int, int]:
        """Number of files, sum of the sizes that are known in bytes, number of files whose size is not known."""
        return self._files, self._bytes_known, self._unknown_size_files


def build(manifest: Manifest, *, as_root: bool, local: Mapping[str, LocalFile], inputs_dir: str) -> Tree:
    """The tree of a manifest. Pure, and never fails on a name: what cannot be shown is told in `Tree.warnings`.

    `as_root`: each input is a top directory; otherwise the manifest holds one input, which is the root itself (ValueError
    for more). `local`: regular files on the disk by path relative to the mount point. `inputs_dir`: below which a file's
    `path` is believed.
    """
    if not as_root and len(manifest.inputs) > 1:
        raise ValueError(f"{len(manifest.inputs)} inputs cannot share one root")
    builder = _Builder(manifest, inputs_dir)
    for span in manifest.inputs:
        builder.add_input(span, as_root=as_root)
    builder.add_local(local)
    return Tree(builder.columns, manifest.mtime_ns)


class _Builder:
    def __init__(self, manifest: Manifest, inputs_dir: str) -> None:
        self.columns = _Columns()
        self.columns.notices.extend(manifest.notices)
        self._manifest = manifest
        self._inputs_dir = inputs_dir

    def add_input(self, span: InputSpan, *, as_root: bool) -> None:
        top: int = ROOT
        if as_root:
            name = span.name.encode()
            reason = "the name holds '/'" if b"/" in name else refusal(name)
            if reason is not None:
                self._notice(f"input {printable(span.name)}", name, f"is not shown: {reason}")
                return
            top = self._directories(f"input {printable(span.name)}", ROOT, name)
        self._add_files(span, top, self._tree_paths(span))

    def _tree_paths(self, span: InputSpan) -> list[bytes]:
        """Where each file goes below its input: where `path` says when it lies below the inputs directory, else `name`."""
        names = self._manifest.names(span)
        for position, path in enumerate(self._manifest.paths(span) or ()):
            below = below_input(path.decode(), self._inputs_dir, span.name) if path else None
            if below is not None:
                names[position] = below
        return names

    def _add_files(self, span: InputSpan, top: int, names: list[bytes]) -> None:
        columns, sizes = self.columns, self._manifest.sizes
        label = f"input {printable(span.name)}"
        directories = {b"": top}  # by the part of a name up to and with its last slash: checked and made once
        for index, name in enumerate(names, span.start):
            cut = name.rfind(b"/") + 1
            leaf = name[cut:]
            directory = directories.get(name[:cut])
            if directory is None or len(leaf) > COMPONENT_BYTES_MAX or leaf in UNSAFE_COMPONENTS:
                reason = refusal(name)
                if reason is not None:
                    self._refused(label, index, name, reason)
                    continue
                directory = directories[name[:cut]] = self._directories(label, top, name[: cut - 1])
            inode = columns.entries[directory].get(leaf)
            if inode is None:
                columns.add_file(directory, leaf, sizes[index], index)
            elif inode in columns.entries:
                self._notice(label, name, _CLASH)
            else:
                columns.sizes[inode] = sizes[index]
                columns.indices[inode] = index
                self._notice(label, name, "is listed more than once: the last one is shown")

    def add_local(self, local: Mapping[str, LocalFile]) -> None:
        """Files on the disk, in the order of their paths so that their inodes do not depend on the mapping's order."""
        columns, label = self.columns, "on the disk"
        for path in sorted(local):
            file = local[path]
            name = path.encode("utf-8", "surrogateescape")
            reason = refusal(name)
            if reason is not None:
                self._notice(label, name, f"is not shown: {reason}")
                continue
            prefix, _, leaf = name.rpartition(b"/")
            directory = self._directories(label, ROOT, prefix)
            inode = columns.entries[directory].get(leaf)
            if inode in columns.entries:
                self._notice(label, name, _CLASH)
                continue
            if inode is None:
                inode = columns.add_file(directory, leaf, file.size, NO_INDEX)
            columns.sizes[inode] = file.size
            columns.local_mtimes_ns[inode] = file.mtime_ns

    def _directories(self, label: str, top: int, path: bytes) -> int:
        """The directory at a checked path below `top`, made where missing, also in the place of a file."""
        columns = self.columns
        for component in path.split(b"/") if path else ():
            inode = columns.entries[top].get(component)
            if inode is None:
                inode = columns.add_file(top, component, 0, NO_INDEX)
                columns.make_directory(inode)
            elif inode not in columns.entries:
                columns.make_directory(inode)
                self._notice(label, path, f"{_CLASH} ({printable(component)})")
            top = inode
        return top

    def _refused(self, label: str, index: int, name: bytes, reason: str) -> None:
        unwritable = self._manifest.unwritable_name(index)
        if unwritable is not None:
            name, reason = unwritable.encode(), "the name holds a NUL character or half of a surrogate pair"
        self._notice(label, name, f"is not shown: {reason}")

    def _notice(self, label: str, name: bytes, what: str) -> None:
        self.columns.notices.add(f"{label}: {printable(name)} {what}")


_CLASH = "is both a file and a directory: the directory is shown"
