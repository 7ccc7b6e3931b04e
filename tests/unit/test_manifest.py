"""What a manifest makes of sizes, metadata and identities, without a file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.identity import stable_id as identity
from valohai_fuse.model.identity import without_secrets
from valohai_fuse.model.manifest import FileRecord, Manifest, stable_id
from valohai_fuse.model.manifest_json import from_json, without_lone_surrogates
from valohai_fuse.model.notices import NOTICES_MAX, Notices


def manifest_of(*files: dict[str, Any], input_id: str | None = "in-1") -> Manifest:
    """One input, `train`, with these files; `name` is filled in where it is missing."""
    named = [{"name": f"f{position}", **file} for position, file in enumerate(files)]
    return from_json(json.dumps({"train": {"input_id": input_id, "files": named}}).encode())


def record_of(**fields: Any) -> FileRecord:
    """The record of a single file."""
    return manifest_of(fields).record(0)


@pytest.mark.parametrize(
    ("written", "size", "warned"),
    [
        ("0", None, False),
        ("null", None, False),
        ("0.0", None, False),
        ("1", 1, False),
        ("5.0", 5, False),
        ("1e18", 10**18, False),
        ("1152921504606846976", 2**60, False),
        ("9223372036854775807", 2**63 - 1, False),
        ("9223372036854775808", None, True),
        ("1" + "0" * 4000, None, True),
        ("-1", None, True),
        ("-0.5", None, True),
        ("5.5", None, True),
    ],
)
def test_sizes(written: str, size: int | None, warned: bool) -> None:
    """0, null and what cannot be a size are unknown, the latter with a warning; up to the largest offset all is exact."""
    manifest = from_json(b'{"train": {"files": [{"name": "odd\\n", "size": %s}]}}' % written.encode())
    assert manifest.size(0) == manifest.record(0).size == size
    assert bool(manifest.warnings) == warned
    if warned:
        assert manifest.warnings[0].startswith(r"input 'train': 'odd\n': the size cannot be ")
        assert len(manifest.warnings[0]) < 200


def test_a_missing_size_is_unknown() -> None:
    """Older installs write none."""
    assert record_of().size is None


@pytest.mark.parametrize(
    ("written", "metadata"),
    [
        (None, []),
        ([], []),
        ({}, []),
        ({"a": 1}, [{"a": 1}]),
        ([{"a": 1}, 5, None, {"b": []}], [{"a": 1}, {"b": []}]),
        ("x", []),
    ],
)
def test_metadata_is_always_a_list_of_objects(written: Any, metadata: list[dict[str, Any]]) -> None:
    """null, one object and nonsense included: metadata informs, it never stops a mount."""
    assert record_of(metadata=written).metadata == metadata


def test_checksums_are_text() -> None:
    """Anything else is left out."""
    assert record_of(checksums={"md5": "a", "sha1": None}).checksums == {"md5": "a"}
    assert record_of(checksums=[1]).checksums == {}


def test_ids_fall_back_to_the_input() -> None:
    """A file without an input id has its input's; empty texts count as missing."""
    assert record_of(input_id="own").input_id == "own"
    assert record_of(input_id="").input_id == "in-1"
    assert manifest_of({"input_id": None}, input_id=None).record(0).input_id is None
    bare = record_of(uri="", storage_uri="", datum_id="")
    assert (bare.uri, bare.storage_uri, bare.datum_id) == (None, None, None)


def test_the_reference_for_sources() -> None:
    """Counts from the start of its input, not of the manifest."""
    manifest = from_json(
        b'{"a": {"files": [{"name": "x"}]}, "b": {"files": [{"name": "y"}, {"name": "z", "uri": "datum://d"}]}}'
    )
    ref = manifest.record(2).ref()
    assert (ref.input_name, ref.name, ref.uri, ref.index) == ("b", "z", "datum://d", 1)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            manifest.record(index)


def test_no_location_shows_in_a_repr() -> None:
    """A location may be signed, and reprs end in logs."""
    record = record_of(uri="https://h/a?token=topsecret", storage_uri="https://h/b?sig=topsecret")
    assert "topsecret" not in repr(record)
    assert "topsecret" not in repr(record.ref())


S3 = "https://b.s3.amazonaws.com/k/a%20b.bin"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"datum_id": "d1", "uri": "datum://d2", "storage_uri": S3}, "datum:d1"),
        ({"uri": "datum://d2", "storage_uri": S3}, "datum:d2"),
        ({"uri": "DATUM://d2/?x=1#y"}, "datum:d2"),
        ({"uri": "https://h/a", "storage_uri": S3}, "uri:https://h/a"),
        ({"uri": "https://user:pw@h/a#f"}, "uri:https://h/a"),
        ({"uri": "", "storage_uri": S3 + "?X-Amz-Date=1&x-amz-signature=2"}, f"uri:{S3}"),
        (
            {"storage_uri": "https://acc.blob.core.windows.net/c/k?sv=1&st=2&se=3&sr=b&sp=r&sig=4"},
            "uri:https://acc.blob.core.windows.net/c/k",
        ),
        ({"storage_uri": "https://h/v1/c/k?temp_url_sig=1&temp_url_expires=2"}, "uri:https://h/v1/c/k"),
        ({"uri": "s3://bucket/key"}, "uri:s3://bucket/key"),
        ({"uri": "datum://"}, "uri:datum://"),
        ({}, "input:in-1/f0"),
    ],
)
def test_identity(fields: dict[str, Any], expected: str) -> None:
    """Datum id, else the location without credentials, query and fragment, else the name within the input."""
    assert stable_id(record_of(**fields)) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{S3}?versionId=1", f"{S3}?versionId=2"),
        ("https://h/download?id=1", "https://h/download?id=2"),
        ("s3://bucket/a#1", "s3://bucket/a#2"),
        ("s3://bucket/a?1", "s3://bucket/a"),
    ],
)
def test_a_query_that_says_which_object_keeps_objects_apart(one: str, other: str) -> None:
    """Two objects under one id would be one's bytes served for the other."""
    assert stable_id(record_of(uri=one)) != stable_id(record_of(uri=other))


def test_signing_again_changes_nothing() -> None:
    """The same version of the same object, signed on two days."""
    one, other = (f"{S3}?versionId=7&X-Amz-Date={day}&X-Amz-Signature={day}" for day in (1, 2))
    assert stable_id(record_of(storage_uri=one)) == stable_id(record_of(storage_uri=other))


@given(
    st.text(st.characters(exclude_characters="?#")),
    st.text(),
    st.text(st.characters(exclude_characters="/?#")),
)
def test_no_query_or_credential_is_ever_part_of_an_identity(path: str, query: str, password: str) -> None:
    """Whatever stands after `?`, and before `@` in the authority."""
    for location in (
        f"https://u:topsecret{password}@host/{path}?topsecret{query}",
        f"datum://x{path}?topsecret{query}",
    ):
        found = identity(datum_id=None, uri=location, storage_uri=None, within="i", name="n")
        assert "topsecret" not in found


@given(st.text())
def test_any_text_can_be_a_location(text: str) -> None:
    """No location makes identification fail, and cleaning twice is cleaning once."""
    assert identity(datum_id=None, uri=text, storage_uri=text, within="i", name="n").partition(":")[0] in {
        "datum",
        "uri",
        "input",
    }
    assert without_secrets(without_secrets(text)) == without_secrets(text)


@given(st.text(alphabet=st.characters(codec=None), max_size=8))
def test_mending_keeps_length_and_all_whole_characters(text: str) -> None:
    """After mending, JSON with any escapes decodes; without lone surrogates it is left alone."""
    written = json.dumps(text).encode()
    mended = without_lone_surrogates(written)
    halves = [c for c in text if "\ud800" <= c <= "\udfff"]
    if not halves:
        assert mended is None
    elif mended is not None:
        assert len(mended) == len(written)
        json.loads(mended).encode("utf-8")


def test_notices_are_bounded() -> None:
    """A hundred sentences, and how many more there were."""
    notices, more = Notices(), Notices()
    for number in range(NOTICES_MAX + 20):
        notices.add(str(number))
    assert len(notices.lines()) == NOTICES_MAX + 1
    assert notices.lines()[-1] == "and 20 more warnings like these"
    more.add("first")
    more.extend(notices)
    assert len(more) == NOTICES_MAX + 21
    assert more.lines()[-1] == "and 21 more warnings like these"
