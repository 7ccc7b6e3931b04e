"""Whatever stands in inputs.json, inputs.yaml or api.json: a manifest, or a sentence; never a crash, a hang or a flood of memory.

What decodes is taken all the way: every record, the tree, and a walk over each name of it.
"""

# ruff: noqa: PT017 - both outcomes are right here, so pytest.raises, which demands one, does not fit

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from valohai_fuse.errors import ConfigurationError, UsageError
from valohai_fuse.model.tree import ROOT, Inode, Tree, build
from valohai_fuse.sources import api_file, manifest_file

EXAMPLES = settings(max_examples=50, deadline=None)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["..", "/", "a/../b", "a//b", "\0", "a\0b", "\ud800", "x" * 256, "datum://", "file:///etc/passwd"]
    )
    | st.sampled_from([-1, 0, 2**63 - 1, 2**63, 10**18, 1e18, 0.5, -0.5, "12", "1EB"])
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)
files = st.fixed_dictionaries(
    {"name": scalars | st.text()},
    optional=dict.fromkeys(
        ("path", "size", "uri", "storage_uri", "datum_id", "input_id", "download_intent", "metadata", "checksums"),
        scalars | anything,
    ),
)
manifests = st.dictionaries(
    st.text(max_size=8),
    st.fixed_dictionaries({"files": st.lists(files, max_size=4)}, optional={"input_id": scalars}) | anything,
    max_size=3,
)


def load(**contents: bytes) -> Tree | None:
    """The tree of a configuration directory with these files (`json`, `yaml`); None where it is refused with a sentence."""
    with tempfile.TemporaryDirectory() as directory:
        for kind, content in contents.items():
            Path(directory, f"inputs.{kind}").write_bytes(content)
        try:
            summaries = manifest_file.list_inputs(directory)
            manifest = manifest_file.load(directory)
        except (ConfigurationError, UsageError) as error:
            assert directory in error.message
            assert "\n" not in error.message
            assert len(error.message) < 2000
            return None
        try:
            assert sum(summary.files for summary in summaries) == len(manifest)
            for index in range(len(manifest)):
                manifest.record(index).ref()
            tree = build(manifest, as_root=True, local={}, inputs_dir="/valohai/inputs")
            walk(tree, ROOT)
            return tree
        finally:
            manifest.close()


def walk(tree: Tree, directory: Inode, depth: int = 0) -> None:
    """Every name is one that a kernel takes, and leads back to what it names."""
    assert depth < 5000
    for name, inode in tree.children(directory):
        assert 0 < len(name) <= 255
        assert b"/" not in name
        assert b"\0" not in name
        assert name not in {b".", b".."}
        assert tree.lookup(directory, name) == inode
        size = tree.size(inode)
        assert size is None or 0 <= size < 2**63
        if tree.is_dir(inode):
            walk(tree, inode, depth + 1)


@EXAMPLES
@given(st.binary(max_size=300))
@example(b"")
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"a":{"files":[' + b"[" * 100_000)
@example(b'{"a":{"files":[{"name":"x","metadata":' + b"[" * 5000 + b"]" * 5000 + b"}]}}")
@example(b'{"a":{"files":[{"name":"x","size":' + b"9" * 5000 + b"}]}}")
@example(b'{"a":{"files":[{"name":"x","size":1e999}]}}')
@example(b'{"a":{"files":[{"name":"x","size":-1e999}]}}')
@example(b'{"a":{"files":[{"name":"x","size":NaN}]}}')
def test_any_bytes_as_json(content: bytes) -> None:
    """inputs.json may hold anything."""
    load(json=content)


@EXAMPLES
@given(manifests)
def test_any_manifest_as_json(manifest: dict[str, Any]) -> None:
    """The shape of a manifest with any value anywhere."""
    load(json=json.dumps(manifest).encode())


@EXAMPLES
@given(st.text(alphabet="ab:-?&*!|>'\"{}[],# \n\t<%@`0", max_size=80).map(str.encode) | st.binary(max_size=80))
@example(b"a: &a [*a]")
@example(b"&a : *a")
@example(b"? [a, b]\n: c")
@example(b"a: !!python/object/apply:os.system [true]")
@example(b"a: 1_000:59:59.9\nb: 2001-12-14t21:59:43.10-05:00\nc: !!binary aGVsbG8=\nd: !!set {x, y}\n")
@example(b"a: " + b"9" * 5000)
@example(b"--- {}\n--- {}\n")
def test_any_bytes_as_yaml(content: bytes) -> None:
    """inputs.yaml may hold anything."""
    load(yaml=content)


@settings(max_examples=40, deadline=None)
@given(manifests)
def test_any_manifest_as_yaml(manifest: dict[str, Any]) -> None:
    """What YAML can say of it is the same tree as JSON's, or a sentence."""
    try:
        text = yaml.safe_dump(manifest).encode()
    except UnicodeEncodeError:
        return  # lone surrogates cannot be written as YAML
    load(yaml=text)


def bomb(levels: int, *, merged: bool = False) -> bytes:
    """Each level names the one before nine times: 9^levels of it."""
    lines = ['l0: &l0 {name: "x"}' if merged else 'l0: &l0 ["lol"]']
    for level in range(1, levels):
        names = ", ".join([f"*l{level - 1}"] * 9)
        lines.append(
            f"l{level}: &l{level} {{<<: [{names}], k{level}: 1}}" if merged else f"l{level}: &l{level} [{names}]"
        )
    return "\n".join(lines).encode()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.timeout(20)
def test_a_bomb_of_aliases_is_refused(merged: bool, tmp_path: Path) -> None:
    """A kilobyte of YAML that stands for a petabyte costs neither time nor memory."""
    (tmp_path / "inputs.yaml").write_bytes(bomb(20, merged=merged))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError, match="aliases"):
            manifest_file.load(str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_aliases_that_save_space_are_fine() -> None:
    """What a YAML writer does with a list that two files share."""
    shared = [{"key": "value"}]
    manifest = {"data": {"files": [{"name": f"f{n}", "size": 1, "metadata": shared} for n in range(100)]}}
    text = yaml.safe_dump(manifest).encode()
    assert b"*id001" in text
    tree = load(yaml=text)
    assert tree is not None
    assert tree.totals()[:2] == (100, 100)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[{"])
def test_yaml_that_is_nested_without_end(opening: str, tmp_path: Path) -> None:
    """In a process of its own, for the library's answer to this is a segmentation fault."""
    (tmp_path / "inputs.yaml").write_text(opening * 100_000)
    code = (
        "import sys\n"
        "from valohai_fuse.errors import ConfigurationError\n"
        "from valohai_fuse.sources import manifest_file\n"
        "try:\n    manifest_file.load(sys.argv[1])\n"
        "except ConfigurationError as error:\n    sys.exit(7 if 'nested' in error.message else 8)\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    outcome = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=60, check=False)
    assert outcome.returncode == 7


def test_names_with_every_byte() -> None:
    """Each character up to U+00FF, and beyond: shown byte for byte, or refused with a warning that names it."""
    names = [f"a{chr(code)}b" for code in range(0x180)] + [
        "\u20ac",
        "\U0001f600",
        "e\u0301",
        "\u200b",
        "\ufeff",
        "%2e%2e",
        " ",
    ]
    tree = load(json=json.dumps({"in": {"files": [{"name": name, "size": 1} for name in names]}}).encode())
    assert tree is not None
    inode = tree.find("in")
    assert inode is not None
    shown = {name for name, _ in tree.children(inode)}
    wanted = {name.encode() for name in names if "\0" not in name and "/" not in name}
    assert shown == wanted | {b"a"}  # a/b is a directory
    assert any("NUL" in warning or "\\x00" in warning for warning in tree.warnings)


def test_a_hundred_levels_and_the_longest_names() -> None:
    """100 directories deep, 255 bytes a component, as the kernel allows it; 256 are refused."""
    deep = "/".join(["d" * 255] * 100) + "/" + "f" * 255
    also = ["\u20ac" * 85, "\u20ac" * 86, "x" * 256]
    tree = load(json=json.dumps({"in": {"files": [{"name": name, "size": 7} for name in (deep, *also)]}}).encode())
    assert tree is not None
    inode = tree.find(f"in/{deep}")
    assert inode is not None
    assert tree.size(inode) == 7
    assert tree.find(f"in/{also[0]}") is not None
    assert tree.find(f"in/{also[1]}") is None
    assert tree.totals()[0] == 2
    assert len(tree.warnings) == 2


@pytest.mark.parametrize(
    ("said", "size"),
    [
        (10**18, 10**18),
        (2**63 - 1, 2**63 - 1),
        (2**63, None),
        (2**64, None),
        (10**30, None),
        (-1, None),
        (-(2**70), None),
        (0, None),
        (3.0, 3),
        (3.5, None),
        (1e300, None),
        (None, None),
    ],
)
def test_sizes_of_every_sort(said: object, size: int | None) -> None:
    """1 EB is a size; what is none is unknown, and asked of the store."""
    tree = load(json=json.dumps({"in": {"files": [{"name": "f", "size": said}]}}).encode())
    assert tree is not None
    inode = tree.find("in/f")
    assert inode is not None
    assert tree.size(inode) == size


def test_a_size_in_quotes_is_an_error_with_its_place(tmp_path: Path) -> None:
    """A wrong type concerns the mount, and the message says where it stands, not what it says."""
    (tmp_path / "inputs.json").write_text('{"in": {"files": [{"name": "f", "size": "12"}]}}')
    with pytest.raises(ConfigurationError, match=r"\$\.in\.files\[0\]\.size"):
        manifest_file.load(str(tmp_path))


@EXAMPLES
@given(
    st.binary(max_size=200)
    | st.fixed_dictionaries(
        {
            "input_request": st.fixed_dictionaries(
                {
                    "url": scalars
                    | st.sampled_from(["http://h/x?token=s", "unix:///x", "http://h/\r\nX: y", "http://u:p@h/"])
                },
                optional={"method": scalars, "headers": anything | st.dictionaries(st.text(), st.text())},
            )
            | anything
        }
    ).map(lambda value: json.dumps(value).encode())
)
@example(b'{"input_request": ' + b"[" * 100_000)
def test_any_bytes_as_api_json(content: bytes) -> None:
    """api.json may hold anything; what is taken can be sent as it is."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "api.json").write_bytes(content)
        try:
            request = api_file.load(directory)
        except ConfigurationError as error:
            assert "token=s" not in error.message
            return
        assert request is not None
        lines = [request.method, request.url, *(text for header in request.headers for text in header)]
        assert not any(character in line for line in lines for character in "\r\n\0")
