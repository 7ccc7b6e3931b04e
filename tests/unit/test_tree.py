"""The tree: which names it shows, who wins a clash, and that it answers the same for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.manifest import Manifest
from valohai_fuse.model.manifest_json import from_json
from valohai_fuse.model.names import below_input, printable, refusal
from valohai_fuse.model.tree import NO_INDEX, ROOT, Inode, LocalFile, Tree, build

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def manifest_of(*files: str | dict[str, Any], name: str = "train") -> Manifest:
    """One input; a text stands for a file of that name and a size of 1."""
    entries = [{"name": file, "size": 1} if isinstance(file, str) else file for file in files]
    return from_json(json.dumps({name: {"files": entries}}).encode(), mtime_ns=7)


def tree_of(*files: str | dict[str, Any], local: dict[str, LocalFile] | None = None) -> Tree:
    """The tree of one input at its own mount point."""
    return build(manifest_of(*files), as_root=False, local=local or {}, inputs_dir="/valohai/inputs")


def paths(tree: Tree) -> list[str]:
    """Every file, as `find` would list them."""
    return [tree.path(inode) for inode in tree.walk_files(ROOT)]


def found(tree: Tree, path: str) -> Inode:
    """The inode at a path that is known to be there."""
    inode = tree.find(path)
    assert inode is not None, path
    return inode


def test_slashes_make_directories() -> None:
    """Attributes, links and entries of a small tree, in the manifest's order."""
    tree = tree_of("b/c/1", "a", {"name": "b/2", "size": 0}, "b/c/3")
    assert paths(tree) == ["b/c/1", "b/c/3", "b/2", "a"]
    b, c = found(tree, "b"), found(tree, "b/c")
    assert list(tree.children(ROOT)) == [(b"b", b), (b"a", found(tree, "a"))]
    assert tree.children(b)[1:] == [(b"2", found(tree, "b/2"))]
    assert tree.children(b)[-1] == (b"2", found(tree, "b/2"))
    assert [tree.nlink(inode) for inode in (ROOT, b, c, found(tree, "a"))] == [3, 3, 2, 1]
    assert [tree.child_count(inode) for inode in (ROOT, b, c)] == [2, 2, 2]
    assert tree.size(found(tree, "a")) == 1
    assert tree.size(found(tree, "b/2")) is None
    assert {tree.mtime_ns(Inode(inode)) for inode in range(1, tree.inode_count + 1)} == {7}
    assert tree.totals() == (4, 3, 1)
    assert tree.inode_count == 7
    assert tree.warnings == ()


def test_lookup() -> None:
    """`.` and `..` as everywhere, nothing below a file, None for what is not there."""
    tree = tree_of("d/f")
    d, f = found(tree, "d"), found(tree, "d/f")
    assert tree.lookup(d, b"f") == f
    assert (tree.lookup(d, b"."), tree.lookup(d, b".."), tree.lookup(ROOT, b"..")) == (d, ROOT, ROOT)
    assert [tree.lookup(f, name) for name in (b"x", b".", b"..")] == [None] * 3
    assert tree.lookup(d, b"F") is None
    assert tree.lookup(d, b"") is None
    assert tree.is_dir(d)
    assert not tree.is_dir(f)
    assert (tree.file_index(d), tree.file_index(f)) == (NO_INDEX, 0)
    with pytest.raises(KeyError):
        tree.children(f)


def test_find_takes_paths_as_people_write_them() -> None:
    """Leading, trailing and double slashes, `.` and `..`, the empty path; text that is no name is not found."""
    tree = tree_of("d/e/f")
    for path in ("d/e/f", "/d//e/f", "./d/e/f/", "d/../d/e/f"):
        assert tree.find(path) == found(tree, "d/e/f")
    assert tree.find("") == tree.find("/") == ROOT
    assert tree.find("d/x/f") is tree.find("d/e/f/g") is tree.find("\ud800") is None


def test_a_size_becomes_known_once() -> None:
    """The one thing that changes later, and the totals with it."""
    tree = tree_of({"name": "u"}, "k")
    tree.set_size(found(tree, "u"), 0)
    assert tree.size(found(tree, "u")) == 0
    assert tree.totals() == (2, 1, 0)
    tree.set_size(found(tree, "u"), 41)
    assert tree.totals() == (2, 42, 0)
    for inode, size in ((ROOT, 1), (found(tree, "k"), -1)):
        with pytest.raises(ValueError, match="cannot have the size"):
            tree.set_size(inode, size)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "the name is empty"),
        ("/etc/passwd", "the name is absolute"),
        ("/", "the name is absolute"),
        ("..", "the name holds '..'"),
        ("a/../b", "the name holds '..'"),
        ("../../etc/passwd", "the name holds '..'"),
        (".", "the name holds the component '.'"),
        ("a/./b", "the name holds the component '.'"),
        ("a//b", "the name holds an empty component ('//')"),
        ("a/", "the name ends in '/'"),
        ("a\0b", "the name holds a NUL character or half of a surrogate pair"),
        ("a\ud800", "the name holds a NUL character or half of a surrogate pair"),
        ("d/" + "x" * 256, "a component of the name is 256 bytes long, the limit is 255"),
        ("ä" * 128 + "/f", "a component of the name is 256 bytes long, the limit is 255"),
        ("a\n\x1b[31m/..", "the name holds '..'"),
    ],
)
def test_names_that_cannot_be_shown_are_refused_one_by_one(name: str, reason: str) -> None:
    """Each with a warning that names the input and the file, control characters escaped; the rest of the mount works."""
    tree = tree_of("before/x", name, "after", {"name": name, "path": f"/valohai/inputs/train/{name}"})
    assert paths(tree) == ["before/x", "after"]
    assert len(tree.warnings) == 2
    assert tree.warnings[0].startswith("input 'train': ")
    assert tree.warnings[0].endswith(f"is not shown: {reason}")
    assert tree.warnings[0].isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "ä b+c (1).jpg",
        "100%.txt",
        "a%2Fb",
        "...",
        ".hidden",
        "..a",
        "a\nb",
        " ",
        "x" * 255,
        "/".join("d" * 3000),
        "\U0001f600",
        "a\\b",
        "-rf",
        "~",
    ],
)
def test_names_that_are_merely_unusual_are_shown(name: str) -> None:
    """Any UTF-8, blanks, `%`, control characters, and paths longer than PATH_MAX."""
    tree = tree_of(name)
    assert paths(tree) == [name]
    assert tree.warnings == ()
    assert tree.find(name) is not None


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (None, "n"),
        ("", "n"),
        ("/valohai/inputs/train/n", "n"),
        ("/valohai/inputs/train/sub/m", "sub/m"),
        ("/valohai/inputs/train/sub/train/n", "sub/train/n"),
        ("/valohai/./inputs//train/sub/./m", "sub/m"),
        ("/valohai/inputs/train/../train/m", "n"),
        ("/valohai/inputs/other/m", "n"),
        ("/valohai/inputs/trainer/m", "n"),
        ("/valohai/inputs/train", "n"),
        ("/valohai/inputs/train/", "n"),
        ("/elsewhere/train/m", "n"),
        ("train/m", "n"),
        ("/valohai/inputs/train/" + "x" * 256, "n"),
        ("/valohai/inputs/train/a\0", "n"),
        ("/valohai/inputs/train/\ud800", "n"),
    ],
)
def test_path_is_believed_below_the_input_only(path: str | None, shown: str) -> None:
    """Where it lies below inputs directory and input it says where the file goes, else input and name do."""
    assert paths(tree_of({"name": "n", "path": path})) == [shown]


def test_path_with_another_inputs_directory() -> None:
    """The comparison is with the directory that is configured, which may itself hold the input's name."""
    manifest = manifest_of(
        {"name": "n", "path": "/data/train/in/train/s/m"}, {"name": "o", "path": "/data/train/in/train/o"}
    )
    tree = build(manifest, as_root=False, local={}, inputs_dir="/data/train/in/")
    assert paths(tree) == ["s/m", "o"]


def test_a_bad_name_with_a_good_path_is_shown() -> None:
    """`path` is what clients open; a NUL in the name is not their concern."""
    tree = tree_of({"name": "a\0", "path": "/valohai/inputs/train/good"})
    assert paths(tree) == ["good"]
    assert tree.warnings == ()


def test_of_duplicates_the_last_wins() -> None:
    """With a warning, at the place and with the inode of the first."""
    manifest = manifest_of({"name": "s", "size": 3}, "t", {"name": "s", "size": 5})
    tree = build(manifest, as_root=False, local={}, inputs_dir="/i")
    assert paths(tree) == ["s", "t"]
    assert tree.size(found(tree, "s")) == 5
    assert tree.file_index(found(tree, "s")) == 2
    assert tree.warnings == ("input 'train': 's' is listed more than once: the last one is shown",)
    assert tree.totals() == (2, 6, 0)


@pytest.mark.parametrize("names", [("a", "a/b/c"), ("a/b/c", "a"), ("a/b", "a/b/c"), ("a/b/c", "a/b")])
def test_of_a_file_and_a_directory_the_directory_wins(names: tuple[str, str]) -> None:
    """In either order and at any depth, with a warning; the file's size no longer counts."""
    tree = tree_of(*({"name": name, "size": 10} for name in names))
    assert paths(tree) == ["a/b/c"]
    assert len(tree.warnings) == 1
    assert "is both a file and a directory: the directory is shown" in tree.warnings[0]
    assert tree.totals() == (1, 10, 0)
    assert (tree.nlink(ROOT), tree.nlink(found(tree, "a")), tree.nlink(found(tree, "a/b"))) == (3, 3, 2)
    assert tree.file_index(found(tree, "a/b")) == NO_INDEX


def test_an_empty_input_is_an_empty_directory() -> None:
    """At its own mount point and below a root."""
    assert list(tree_of().children(ROOT)) == []
    assert tree_of().totals() == (0, 0, 0)
    tree = build(manifest_of(), as_root=True, local={}, inputs_dir="/i")
    assert tree.child_count(found(tree, "train")) == 0
    assert (tree.nlink(ROOT), tree.nlink(found(tree, "train"))) == (3, 2)


def test_inputs_side_by_side() -> None:
    """`as_root` makes each input a top directory; an input whose name cannot be one is left out with a warning."""
    data = {name: {"files": [{"name": "f", "size": 2}]} for name in ("a", "b/c", "..", "ä")}
    manifest = from_json(json.dumps(data).encode())
    tree = build(manifest, as_root=True, local={}, inputs_dir="/i")
    assert paths(tree) == ["a/f", "ä/f"]
    assert tree.file_index(found(tree, "ä/f")) == 3
    assert [line.partition(" is not shown")[0] for line in tree.warnings] == ["input 'b/c': 'b/c'", "input '..': '..'"]
    with pytest.raises(ValueError, match="4 inputs cannot share one root"):
        build(manifest, as_root=False, local={}, inputs_dir="/i")


def test_what_is_on_the_disk_is_read_there() -> None:
    """With the disk's size and time; files that the manifest does not name come last and keep no one else's inode."""
    local = {"k/known": LocalFile(99, 5), "z/extra": LocalFile(3, 6), "a-extra": LocalFile(4, 8)}
    bare, tree = tree_of("k/known", "far"), tree_of("k/known", "far", local=local)
    assert paths(tree) == ["k/known", "far", "a-extra", "z/extra"]
    for inode in range(1, bare.inode_count + 1):
        assert tree.path(Inode(inode)) == bare.path(Inode(inode))
    known, extra = found(tree, "k/known"), found(tree, "z/extra")
    assert (tree.local(known), tree.size(known), tree.mtime_ns(known), tree.file_index(known)) == (True, 99, 5, 0)
    assert (tree.local(extra), tree.size(extra), tree.mtime_ns(extra), tree.file_index(extra)) == (True, 3, 6, NO_INDEX)
    assert not tree.local(found(tree, "far"))
    assert not tree.local(ROOT)
    assert tree.warnings == ()
    assert tree.totals() == (4, 107, 0)


def test_clashes_with_the_disk() -> None:
    """A directory wins here too, whichever side it is on; names on disk need not be UTF-8."""
    local = {"d": LocalFile(1, 1), "f/x": LocalFile(2, 2), "l\udce4": LocalFile(3, 3), "../up": LocalFile(4, 4)}
    tree = tree_of("d/a", "f", local=local)
    assert paths(tree) == ["d/a", "f/x", "l\udce4"]
    assert tree.lookup(ROOT, b"l\xe4") == tree.find("l\udce4")
    assert len(tree.warnings) == 3
    assert tree.totals() == (3, 6, 0)


def test_the_odd_sample() -> None:
    """Every oddity at once, below one root: what can be shown is, and each of the rest has its warning."""
    tree = build(
        from_json((SAMPLES / "inputs.odd-cases.json").read_bytes()),
        as_root=True,
        local={},
        inputs_dir="/valohai/inputs",
    )
    assert paths(tree) == [
        "legacy_no_input_id/t10k-images-idx3-ubyte.gz",
        "duplicate_names/same.bin",
        "machine_role/x.bin",
        "null_everything/n.bin",
        "file_and_dir_clash/a/b",
    ]
    assert tree.size(found(tree, "duplicate_names/same.bin")) == 5
    assert [name for name, _ in tree.children(ROOT)][1] == b"empty_optional"
    assert tree.child_count(found(tree, "hostile_path")) == 0
    assert len(tree.warnings) == 3


def test_warnings_are_bounded() -> None:
    """A manifest full of bad names does not fill the log."""
    tree = tree_of(*("../x" for _ in range(1000)), "ok")
    assert len(tree.warnings) == 101
    assert tree.warnings[-1] == "and 900 more warnings like these"


COMPONENT = st.sampled_from(["a", "b", "c", "", ".", "..", "ä", "x" * 256, "y" * 255, "n\0", "\ud800", "\n"]) | st.text(
    max_size=4
)
NAME = st.lists(COMPONENT, max_size=4).map("/".join) | st.text(alphabet=st.characters(codec=None))
FILES = st.lists(
    st.fixed_dictionaries(
        {"name": NAME},
        optional={
            "size": st.none() | st.integers(-3, 2**63),
            "path": st.none() | NAME | NAME.map("/valohai/inputs/train/".__add__),
        },
    ),
    max_size=30,
)
LOCAL = st.dictionaries(
    NAME.filter(lambda name: not any("\ud800" <= c <= "\udfff" for c in name)),
    st.builds(LocalFile, st.integers(0, 9), st.integers(0, 9)),
    max_size=5,
)


@given(FILES, LOCAL)
def test_any_manifest_makes_a_sound_tree(files: list[dict[str, Any]], local: dict[str, LocalFile]) -> None:
    """Building never fails, every inode is reached once and by its path, counts and links agree, and a second build, or
    one that knows nothing of the disk, gives the same inodes."""
    manifest = manifest_of(*files)
    tree, again = (build(manifest, as_root=False, local=local, inputs_dir="/valohai/inputs") for _ in range(2))
    reached, pending = {ROOT}, [ROOT]
    while pending:
        directory = pending.pop()
        subdirectories = 0
        for name, inode in tree.children(directory):
            assert inode not in reached
            reached.add(inode)
            assert 0 < len(name) <= 255
            assert name not in {b".", b".."}
            assert b"/" not in name
            assert b"\0" not in name
            assert tree.lookup(directory, name) == inode
            assert tree.parent(inode) == directory
            assert tree.find(tree.path(inode)) == inode
            if tree.is_dir(inode):
                subdirectories += 1
                pending.append(inode)
        assert tree.nlink(directory) == 2 + subdirectories
        assert tree.child_count(directory) == len(tree.children(directory))
    assert reached == set(range(1, tree.inode_count + 1))
    shown = list(tree.walk_files(ROOT))
    sizes = [tree.size(inode) for inode in shown]
    assert tree.totals() == (len(shown), sum(size for size in sizes if size is not None), sizes.count(None))
    assert paths(tree) == paths(again)
    without_disk = build(manifest, as_root=False, local={}, inputs_dir="/valohai/inputs")
    for number in range(1, without_disk.inode_count + 1):
        assert tree.path(Inode(number)) == without_disk.path(Inode(number))


def _acceptable(name: str) -> bool:
    try:
        return refusal(name.encode()) is None
    except UnicodeEncodeError:
        return False


@given(st.lists(NAME, max_size=20))
def test_every_acceptable_name_is_found(names: list[str]) -> None:
    """A name without fault is in the tree as a file, or as a directory where another name lies below it."""
    tree = tree_of(*names)
    acceptable = [name for name in names if _acceptable(name)]
    for name in acceptable:
        inode = found(tree, name)
        assert tree.path(inode) == name
        assert tree.is_dir(inode) == any(other.startswith(name + "/") for other in acceptable)


@given(st.text(alphabet=st.characters(codec=None)) | st.binary())
def test_any_name_can_be_printed(name: str | bytes) -> None:
    """On one line, without control characters, and not endless."""
    assert printable(name).isprintable()
    assert len(printable("\ud800" * 10**6)) < 1500


@given(NAME)
def test_what_is_below_an_input_never_leads_out_of_it(path: str) -> None:
    """Whatever is believed of a `path` would be accepted as a name."""
    below = below_input("/i/train/" + path, "/i", "train")
    assert below is None or refusal(below) is None


def located(name: str, storage_uri: str | None, uri: str | None = None) -> dict[str, Any]:
    """A file of one byte at a location."""
    return {"name": name, "size": 1, "storage_uri": storage_uri, "uri": uri}


def unreachable(*files: dict[str, Any], local: dict[str, LocalFile] | None = None) -> tuple[str, ...]:
    """The warnings of a tree without anyone to ask for another URL."""
    manifest = manifest_of(*files)
    tree = build(manifest, as_root=False, local=local or {}, inputs_dir="/valohai/inputs")
    tree.tell_unreachable(manifest, "nobody to ask")
    return tree.warnings


def test_locations_that_nobody_can_fetch_are_told_once_per_kind() -> None:
    """Few sentences however many files; one file is named alone, several by their number and the first."""
    told = unreachable(
        located("a/1", "s3://bucket/1?token=S3CR3T"),
        located("a/2", "s3://bucket/2", "datum://x"),
        located("b", "ftp://user:S3CR3T@h/b"),
        located("c", None, "datum://x"),
        located("good", "https://h/good"),
        located("public", "s3://bucket/3", "https://h/public"),
    )
    start, end = "cannot be read unless cached:", "which cannot be fetched from here, and nobody to ask"
    assert told == (
        f"input 'train': 2 files ('a/1', ...) {start} its location is s3:, {end}",
        f"input 'train': 'b' {start} its location is ftp:, {end}",
        f"input 'train': 'c' {start} it has no URL, and nobody to ask",
    )


def test_what_is_on_the_disk_or_shadowed_needs_no_location() -> None:
    """An `always` file is read from where it is; of a name listed twice only the last one counts."""
    here = {"x": LocalFile(size=1, mtime_ns=1)}
    assert unreachable(located("x", "s3://b/x"), local=here) == ()
    told = unreachable(located("y", "s3://b/y"), located("y", "https://h/y"))
    assert len(told) == 1
    assert "more than once" in told[0]


def test_more_kinds_of_locations_than_a_byte_can_number() -> None:
    """The last number stands for all that came later; each file still counts."""
    files = [located(f"f{n}", f"x{n}://b/k") for n in range(400)]
    manifest = manifest_of(*files, located("fine", "https://h/k"))
    assert [manifest.obstacle(n) for n in (0, 253, 400)] == [
        "its location is x0:, which cannot be fetched from here",
        "its location is x253:, which cannot be fetched from here",
        "",
    ]
    assert {manifest.obstacle(n) for n in range(254, 400)} == {"its URL is none that can be fetched"}
    assert unreachable(*files)[-1] == "and 155 more warnings like these"
