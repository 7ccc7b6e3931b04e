"""What may be fetched, and that nothing secret is left of a URL once it is redacted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.urls import (
    first_supported,
    obstacle,
    redact,
    redact_text,
    scheme,
    supported,
    unsupported_reason,
)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h.example/a/b.bin?X-Amz-Signature=SECRET", "https://h.example/a/b.bin"),
        ("https://h.example/a#SECRET", "https://h.example/a"),
        ("https://user:SECRET@h.example:8443/a", "https://h.example:8443/a"),
        ("https://user:SEC/RET@h.example/a", "https://..."),
        ("HTTPS://H.example?SECRET", "https://H.example"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("file:///etc/passwd", "file:///etc/passwd"),
        ("file:SECRET", "file:..."),
        ("SECRET", "<not a URL>"),
        ("", "<not a URL>"),
        ("https://h/a\r\nX: y", "https://h/a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}X: y"),
    ],
)
def test_redact(url: str, expected: str) -> None:
    """Scheme, host and path are what a person needs; the rest goes."""
    assert redact(url) == expected


def test_redact_shortens_long_paths() -> None:
    """The two ends of a path tell it apart."""
    shown = redact("https://h/" + "d/" * 500 + "name.bin?sig=SECRET")
    assert len(shown) < 100
    assert shown.endswith("name.bin")


def test_redact_text_covers_urls_in_foreign_messages() -> None:
    """Also those with JSON's escaped slashes."""
    text = 'try "https://a.b/c?sig=SECRET" or <https:\\/\\/u:SECRET@a.b\\/d?x=SECRET>, s3://b/k?SECRET'
    assert redact_text(text) == 'try "https://a.b/c" or <https://a.b/d>, s3://b/k'


@given(st.text(), st.text(alphabet="abc/.:@-_", max_size=20), st.sampled_from(["?", "#", "?a=1&sig="]))
def test_what_follows_a_question_mark_is_never_shown(head: str, path: str, mark: str) -> None:
    """For any URL and any text."""
    assert "S3CR3T" not in redact(f"https://h{head}/{path}{mark}S3CR3T")
    assert "S3CR3T" not in redact_text(f"{head} https://h/{path}{mark}S3CR3T {head}")


@given(st.text(alphabet=st.characters(exclude_characters="/?#\\@"), min_size=1, max_size=20))
def test_credentials_are_never_shown(password: str) -> None:
    """Whatever the password is made of."""
    assert redact(f"https://user:Zq{password}Zq@host/a") == "https://host/a"


@pytest.mark.parametrize(
    "url",
    [
        "https://h/k?sig=x",
        "http://127.0.0.1:8080/a%20b",
        "HTTPS://h/k",
        "https://user:pw@h/k",
        "https://h/ä/./x//y",
        "http://[::1]/",
    ],
)
def test_supported(url: str) -> None:
    """Http and https."""
    assert supported(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://acme-data/x.bin", "s3:"),
        ("gs://b/k", "gs:"),
        ("azure://a/c/b", "azure:"),
        ("file:///etc/passwd", "file:"),
        ("datum://x", "datum:"),
        ("https://h/k\r\nAuthorization: x", "control"),
        ("https://h/a b", "blanks"),
        ("https://h/\ud800", "characters"),
        ("https:///k", "no host"),
        ("https:k", "no host"),
        ("https://h:port/k", "no host"),
        ("https://h\\@evil/k?x", None),
        ("//h/k", "not a URL"),
        ("", "not a URL"),
        ("https://h/" + "x" * 20000, "characters"),
    ],
)
def test_unsupported(url: str, words: str | None) -> None:
    """Each with a reason that names no more than the scheme."""
    reason = unsupported_reason(url)
    if words is None:
        assert scheme(url) == "https"
        assert redact(url).startswith("https://h")
    else:
        assert reason is not None
        assert words in reason


@pytest.mark.parametrize(
    ("locations", "usable", "words"),
    [
        (("https://h/k", "datum://x"), "https://h/k", None),
        (("s3://b/k", "https://h/k"), "https://h/k", None),
        ((None, "https://h/k"), "https://h/k", None),
        (("s3://b/k", "gs://b/k"), None, "s3:"),
        (("", "ftp://h/k"), None, "ftp:"),
        (("datum://x", None), None, None),
        ((None, ""), None, None),
    ],
)
def test_of_several_locations(locations: tuple[str | None, str | None], usable: str | None, words: str | None) -> None:
    """The first that can be fetched; else the first that locates anything says what is wrong. A datum: is a name only."""
    assert first_supported(*locations) == usable
    reason = obstacle(*locations)
    assert (reason is None) == (words is None)
    assert words is None or words in (reason or "")


@given(st.text())
def test_nothing_raises(text: str) -> None:
    """Any text is a URL or is not."""
    assert isinstance(redact(text), str)
    assert isinstance(redact_text(text), str)
    assert supported(text) == (unsupported_reason(text) is None)
