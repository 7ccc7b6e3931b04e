"""api.json: what is accepted, and that each refusal names the file and the place in it, and no secret."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from valohai_fuse.errors import ConfigurationError
from valohai_fuse.sources import api_file


def test_the_sample(tmp_path: Path) -> None:
    """As Valohai writes it; its repr tells nothing."""
    shutil.copy(Path(__file__).parents[1] / "samples" / "api.json", tmp_path)
    request = api_file.load(str(tmp_path))
    assert request is not None
    assert request.method == "POST"
    assert request.url.endswith("?execution=019a17c0-7b11-4d3f-9a51-0d2f6b2f8c11")
    assert request.headers == (("Authorization", "Execution-Token vhx-not-a-real-token"),)
    assert "vhx" not in repr(request)
    assert "execution" not in repr(request)


def test_missing_is_none(tmp_path: Path) -> None:
    """It is needed only once a URL has expired."""
    assert api_file.load(str(tmp_path)) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"input_request": {"url": "https://v/x?execution=1"}}',
        '\ufeff{"input_request": {"url": " https://v/x?execution=1 ", "headers": null, "method": null}, "more": 1}',
    ],
)
def test_defaults(tmp_path: Path, text: str) -> None:
    """POST without a method; no headers; a BOM and blanks do not matter."""
    (tmp_path / "api.json").write_text(text)
    assert api_file.load(str(tmp_path)) == api_file.ApiRequest("POST", "https://v/x?execution=1", ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("<html>S3CR3T", "not JSON"),
        ('{"more": ' + "[" * 100_000, "nested too deeply"),
        ("\udcff", "not JSON"),
        ("[]", "$: expected `object`"),
        ("{}", "input_request"),
        ('{"input_request": "S3CR3T"}', "$.input_request: expected `object`"),
        ('{"input_request": {}}', "`url`"),
        ('{"input_request": {"url": 7}}', "$.input_request.url: expected `str`"),
        ('{"input_request": {"url": "file:///S3CR3T"}}', "$.input_request.url: its location is file:"),
        ('{"input_request": {"url": "https://h/\\r\\nS3CR3T"}}', "$.input_request.url: its URL holds"),
        ('{"input_request": {"url": "https://h/", "method": "P T"}}', "$.input_request.method"),
        ('{"input_request": {"url": "https://h/", "headers": {"A": 1}}}', "$.input_request.headers"),
        ('{"input_request": {"url": "https://h/", "headers": {"A": "S3CR3T\\r\\nB: c"}}}', "headers.A: a value"),
        ('{"input_request": {"url": "https://h/", "headers": {"A": "S3CR3T\u20ac"}}}', "headers.A: a value"),
        ('{"input_request": {"url": "https://h/", "headers": {"S3CR3T x": "b"}}}', "headers: a header has a name"),
        (" " * 2_000_000, "more than"),
    ],
)
def test_errors(tmp_path: Path, text: str, words: str) -> None:
    """One line that says where to look."""
    (tmp_path / "api.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigurationError) as caught:
        api_file.load(str(tmp_path))
    assert str(tmp_path / "api.json") in caught.value.message
    assert words in caught.value.message
    assert "S3CR3T" not in caught.value.message.replace(str(tmp_path), "")


def test_unreadable(tmp_path: Path) -> None:
    """A directory in its place, for example."""
    (tmp_path / "api.json").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        api_file.load(str(tmp_path))
