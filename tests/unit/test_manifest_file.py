"""Reading inputs.json and inputs.yaml: what is kept, what is refused, and how that is said."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from valohai_fuse.errors import ConfigurationError, UsageError
from valohai_fuse.model.manifest import Manifest
from valohai_fuse.sources import manifest_file

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """An empty configuration directory."""
    return tmp_path


def one_file(**fields: Any) -> str:
    """A manifest of one input, `train`, with one file."""
    return json.dumps({"train": {"files": [{"name": "a", **fields}]}})


def records(manifest: Manifest) -> Iterator[Any]:
    """Every record, and the manifest closed after them."""
    for index in range(len(manifest)):
        yield manifest.record(index)
    manifest.close()


def test_the_sample_is_read_whole(config: Path) -> None:
    """All that Valohai says of a file comes back from `record`, sizes 0 and null as unknown."""
    (config / "inputs.json").write_bytes((SAMPLES / "inputs.json").read_bytes())
    os.utime(config / "inputs.json", ns=(5, 1_700_000_000_123_456_789))
    manifest = manifest_file.load(str(config))
    assert manifest.mtime_ns == 1_700_000_000_123_456_789
    assert [(span.name, span.start, span.stop) for span in manifest.inputs] == [
        ("large_dataset", 0, 2),
        ("checkpoint", 2, 3),
        ("labels", 3, 4),
        ("config", 4, 5),
    ]
    assert manifest.warnings == ()
    every = list(records(manifest))
    assert [record.size for record in every] == [1828388, None, 13476850247, None, 412]
    assert [record.position for record in every] == [0, 1, 0, 0, 0]
    original = json.loads((SAMPLES / "inputs.json").read_text())
    for record in every:
        said = original[record.input_name]["files"][record.position]
        for field in ("name", "path", "uri", "storage_uri", "datum_id", "input_id", "download_intent", "metadata"):
            assert getattr(record, field) == said[field]
        assert record.checksums == said.get("checksums", {})


def test_yaml_says_the_same_as_json(config: Path) -> None:
    """inputs.yaml is read where there is no inputs.json, with the same outcome but for the order of its keys."""
    (config / "inputs.yaml").write_bytes((SAMPLES / "inputs.yaml").read_bytes())
    from_yaml = {(record.input_name, record.name): record for record in records(manifest_file.load(str(config)))}
    (config / "inputs.json").write_bytes((SAMPLES / "inputs.json").read_bytes())
    from_json = {(record.input_name, record.name): record for record in records(manifest_file.load(str(config)))}
    assert from_yaml.keys() == from_json.keys()
    for key, record in from_json.items():
        assert (record.ref(), record.size, record.metadata, record.checksums) == (
            from_yaml[key].ref(),
            from_yaml[key].size,
            from_yaml[key].metadata,
            from_yaml[key].checksums,
        )


def test_the_odd_sample_survives(config: Path) -> None:
    """Missing ids, nulls everywhere, empty inputs: each becomes None or an empty input, nothing fails."""
    (config / "inputs.json").write_bytes((SAMPLES / "inputs.odd-cases.json").read_bytes())
    manifest = manifest_file.load(str(config))
    by_name = {(record.input_name, record.position): record for record in records(manifest)}
    nulls = by_name["null_everything", 0]
    assert (nulls.size, nulls.uri, nulls.storage_uri, nulls.datum_id, nulls.input_id) == (None,) * 5
    assert (nulls.metadata, nulls.checksums) == ([], {})
    assert by_name["legacy_no_input_id", 0].download_intent is None
    assert next(span for span in manifest.inputs if span.name == "empty_optional").start == 1


@pytest.mark.parametrize("indent", [None, 3])
def test_records_are_found_however_the_json_is_laid_out(config: Path, indent: int | None) -> None:
    """Braces and quotes in values, blanks between elements, other keys around `files`: each record is its own."""
    files = [{"name": f'{i}{{"}}],[{{', "metadata": [{"n": i, "text": "{}[]"}], "size": i} for i in range(1, 50)]
    data = {
        "other": {"files": [{"name": "x"}]},
        "in": {"note": '"files": [{', "files": files, "z": [{}]},
        "last": {"files": []},
    }
    (config / "inputs.json").write_text(json.dumps(data, indent=indent))
    manifest = manifest_file.load(str(config), ["in", "last"])
    assert len(manifest) == 49
    for index, record in enumerate(records(manifest)):
        assert (record.name, record.size, record.metadata) == (
            files[index]["name"],
            files[index]["size"],
            files[index]["metadata"],
        )


def test_only_the_inputs_named_are_decoded(config: Path) -> None:
    """An input that nobody asked for may be of any shape: the others work."""
    (config / "inputs.json").write_text('{"bad": {"files": 5}, "good": {"files": [{"name": "a"}]}}')
    manifest = manifest_file.load(str(config), ["good"])
    assert [span.name for span in manifest.inputs] == ["good"]
    manifest.close()
    with pytest.raises(ConfigurationError, match=r"\$\.bad\.files: expected array, got int"):
        manifest_file.load(str(config))


def test_an_unknown_input_is_a_usage_error_that_lists_the_others(config: Path) -> None:
    """`no such input`, and the names that exist as the hint."""
    (config / "inputs.json").write_bytes((SAMPLES / "inputs.json").read_bytes())
    with pytest.raises(UsageError, match="no such input: 'nope'") as caught:
        manifest_file.load(str(config), ["nope", "labels"])
    assert caught.value.hint is not None
    assert "'checkpoint', 'config', 'labels', 'large_dataset'" in caught.value.hint


DEEP = "[" * 100_000
SECRET = "https://user:pw@host/x?X-Amz-Signature=topsecret"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"inputs\.json: the file is empty$"),
        ("\ufeff", r"inputs\.json: the file is empty$"),
        ("not json", r"inputs\.json: not JSON: invalid character at line 1, column 5 \(byte 4\)$"),
        ('{"train":\n  {"files": ]}', r"not JSON: invalid character at line 2, column 13 \(byte 22\)$"),
        ('{"train": {"files": [', r"not JSON: it ends too early, after 21 bytes$"),
        ('{"a": {"files": []}} x', r"not JSON: trailing characters at line 1, column 23"),
        ("[]", r"inputs\.json: \$: expected object, got array$"),
        ("null", r"\$: expected object, got null$"),
        ('{"train": 5}', r"\$\.train: expected object, got int$"),
        ('{"train": {}}', r"\$\.train: object missing required field files$"),
        ('{"my train": {"files": {}}}', r"\$\['my train'\]\.files: expected array, got object$"),
        ('{"train": {"input_id": 5, "files": []}}', r"\$\.train\.input_id: expected str \| null, got int$"),
        ('{"train": {"files": [5]}}', r"\$\.train\.files\[0\]: expected object, got int$"),
        ('{"train": {"files": [{"name": "a"}, null]}}', r"\$\.train\.files\[1\]: expected object, got null$"),
        ('{"train": {"files": [{}]}}', r"\$\.train\.files\[0\]: object missing required field name$"),
        (one_file(name=7), r"\$\.train\.files\[0\]\.name: expected str, got int$"),
        (one_file(name=None), r"\$\.train\.files\[0\]\.name: expected str, got null$"),
        (one_file(size="12"), r"\$\.train\.files\[0\]\.size: expected int \| null, got str$"),
        (one_file(size=True), r"\$\.train\.files\[0\]\.size: expected int \| null, got bool$"),
        (one_file(uri=[]), r"\$\.train\.files\[0\]\.uri: expected str \| null, got array$"),
        (DEEP, r"\$: expected object, got array$"),
        ('{"a":' * 100_000, r"\$: nested too deeply$"),
        ('{"train": {"files": [{"name": "a", "metadata": ' + DEEP, r"\$: nested too deeply$"),
        ('{"a": {"files": [{"name": "' + "x" * 9 + '", "uri": "' + SECRET + '", "size": {}}]}}', r"got object$"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_path(config: Path, text: str, message: str) -> None:
    """Missing, empty, not JSON, wrong shape, nonsense: one ConfigurationError that names the file and the JSON path, and
    never a value of the manifest."""
    (config / "inputs.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        manifest_file.load(str(config)).close()
    assert caught.value.message.startswith(str(config / "inputs.json"))
    assert "topsecret" not in f"{caught.value.message}{caught.value.hint}"


def test_the_summary_finds_the_same_fault(config: Path) -> None:
    """`list_inputs` names the file of the manifest that is wrong, as `load` does."""
    (config / "inputs.json").write_text('{"t": {"files": [{"name": "a"}, {"name": "b", "size": "big"}]}}')
    with pytest.raises(ConfigurationError, match=r"\$\.t\.files\[1\]\.size: expected int \| null, got str$"):
        manifest_file.list_inputs(str(config))
    (config / "inputs.json").write_text('{"t": {"files": [{"name": "a"}, {"name": "b", "download_intent": 4}]}}')
    with pytest.raises(ConfigurationError, match=r"\$\.t\.files\[1\]\.download_intent: expected str \| null, got int$"):
        manifest_file.list_inputs(str(config))


def test_the_summary_counts(config: Path) -> None:
    """Files, those that are on demand, and the bytes that are known, per input, in the order of the file."""
    (config / "inputs.json").write_bytes((SAMPLES / "inputs.json").read_bytes())
    found = manifest_file.list_inputs(str(config))
    assert [(one.name, one.files, one.on_demand_files, one.bytes_known) for one in found] == [
        ("large_dataset", 2, 2, 1828388),
        ("checkpoint", 1, 1, 13476850247),
        ("labels", 1, 1, 0),
        ("config", 1, 0, 412),
    ]
    assert found[0].input_id == "5c83f6fb-1cb2-4fc3-bda6-2cbd7461f16f"
    assert [one.name for one in manifest_file.list_inputs(str(config), ["labels"])] == ["labels"]
    with pytest.raises(UsageError):
        manifest_file.list_inputs(str(config), ["nope"])


def test_a_missing_file_names_the_place_and_the_way_out(config: Path) -> None:
    """Neither JSON nor YAML, or no directory at all: the path that was tried, and --config-dir as the hint."""
    for directory in (config, config / "none"):
        with pytest.raises(ConfigurationError, match=re.escape(f"{directory}/inputs.json: no such file")) as caught:
            manifest_file.load(str(directory))
        assert "--config-dir" in (caught.value.hint or "")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(config: Path, make: Any) -> None:
    """A directory or a pipe of that name is an error, not a hang, and YAML is not a way around it."""
    make(config / "inputs.json")
    (config / "inputs.yaml").write_bytes((SAMPLES / "inputs.yaml").read_bytes())
    with pytest.raises(ConfigurationError, match=r"inputs\.json: not a regular file"):
        manifest_file.load(str(config))


def test_only_a_missing_json_makes_way_for_yaml(config: Path) -> None:
    """A broken link is a missing file; a loop of links is a fault."""
    (config / "inputs.yaml").write_bytes((SAMPLES / "inputs.yaml").read_bytes())
    (config / "inputs.json").symlink_to("inputs.json")
    with pytest.raises(ConfigurationError, match=r"inputs\.json: cannot be read: Too many levels"):
        manifest_file.load(str(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"inputs\.yaml: the file is empty$"),
        ("a: [", r"inputs\.yaml: not YAML: .* at line 2, column 1$"),
        ("a: 'https://h/x?sig=topsecret\nb: 1\n", r"inputs\.yaml: not YAML: found unexpected end of stream at line 3"),
        ("- 1", r"inputs\.yaml: \$: expected object, got array$"),
        ("t:\n  files:\n  - name: 7\n", r"\$\.t\.files\[0\]\.name: expected str, got int$"),
        ("&a [*a]", r"inputs\.yaml: not a manifest: nested more than 64 levels deep"),
        ("? [1, 2]\n: 3\n", r"inputs\.yaml: not a manifest|not YAML"),
        ("a: \x01", r"inputs\.yaml: not YAML: "),
        ("!!python/object/apply:os.system ['false']", r"not YAML: could not determine a constructor"),
        ("[" * 3000, r"inputs\.yaml: "),
    ],
)
def test_bad_yaml_is_said_without_quoting_it(config: Path, text: str, message: str) -> None:
    """The place of the problem, never the line itself, which may hold a signed URL; and nothing in it is executed."""
    (config / "inputs.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        manifest_file.load(str(config))
    assert "topsecret" not in caught.value.message


def test_a_byte_order_mark_is_passed_over(config: Path) -> None:
    """Editors on Windows write one."""
    (config / "inputs.json").write_bytes(b"\xef\xbb\xbf" + one_file(size=3).encode())
    assert [record.size for record in records(manifest_file.load(str(config)))] == [3]


def test_half_a_character_spoils_its_own_name_only(config: Path) -> None:
    """A lone surrogate escape is no UTF-8: that file becomes unnameable, all others and their records are untouched."""
    text = r'{"t": {"files": [{"name": "a\ud800"}, {"name": "\ud83d\ude00.jpg"}, {"name": "\\ud800"}, {"name": "z\udc00\ud800"}]}}'
    (config / "inputs.json").write_text(text)
    manifest = manifest_file.load(str(config))
    assert manifest.names(manifest.inputs[0]) == [b"", "😀.jpg".encode(), b"\\ud800", b""]
    assert [manifest.unwritable_name(index) for index in range(4)] == ["a\0", None, None, "z\0\0"]
    assert [record.name for record in records(manifest)][1] == "😀.jpg"


def test_text_that_is_not_utf8_is_a_fault_with_its_path(config: Path) -> None:
    """Latin-1 in a name; in metadata, which only informs, it costs the metadata of that file."""
    (config / "inputs.json").write_bytes(b'{"t": {"files": [{"name": "ok"}, {"name": "l\xe4bel"}]}}')
    with pytest.raises(ConfigurationError, match=r"\$\.t\.files\[1\]: not UTF-8$"):
        manifest_file.load(str(config))
    (config / "inputs.json").write_bytes(b'{"t": {"files": [{"name": "ok", "size": 4, "metadata": [{"k": "\xe4"}]}]}}')
    assert [(one.size, one.metadata) for one in records(manifest_file.load(str(config)))] == [(4, [])]


def test_of_duplicate_keys_the_last_wins(config: Path) -> None:
    """Inputs and fields alike, as in every JSON reader of the Python world."""
    text = '{"t": {"files": [{"name": "x"}]}, "u": {"files": []}, "t": {"files": [{"name": "a", "name": "b"}]}}'
    (config / "inputs.json").write_text(text)
    assert [record.name for record in records(manifest_file.load(str(config)))] == ["b"]


def test_the_original_may_change_once_it_is_loaded(config: Path) -> None:
    """Records come from a private copy: rewritten, truncated or removed, the original no longer matters."""
    path = config / "inputs.json"
    path.write_bytes((SAMPLES / "inputs.json").read_bytes())
    manifest = manifest_file.load(str(config))
    before = manifest.record(2)
    os.truncate(path, 0)
    assert manifest.record(2) == before
    path.unlink()
    assert manifest.record(2) == before
    manifest.close()


def test_nothing_is_left_behind(config: Path) -> None:
    """The copy has no name in any directory, and no descriptor outlives `close` or an error."""
    spool = config / "spool"
    spool.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for text in (one_file(), "[", "[]", one_file(name=3), '{"a": {"files": 7}}', ""):
        (config / "inputs.json").write_text(text)
        with contextlib.suppress(ConfigurationError):
            manifest_file.load(str(config), spool_dir=str(spool)).close()
        assert os.listdir(spool) == []
        assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_directory_for_the_copy_memory_does(config: Path) -> None:
    """A missing or read-only directory for temporary files is no reason not to mount."""
    (config / "inputs.json").write_text(one_file(size=5, metadata={"k": 1}))
    manifest = manifest_file.load(str(config), spool_dir=str(config / "none"))
    assert [(one.size, one.metadata) for one in records(manifest)] == [(5, [{"k": 1}])]
