"""When signed URLs say that they expire: every form of the sample file, odd writings, and any text at all."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.expiry import expires_at_s, signed_at_s

SAMPLES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "samples" / "signed_urls.json").read_text())
TEN_OCLOCK_S = 1761991200.0  # 2025-11-01T10:00:00Z


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: str(sample["store"]))
def test_every_store_of_the_sample_file(sample: dict[str, Any]) -> None:
    """Each form expires when the sample says so, or never."""
    expected = datetime.fromisoformat(sample["expires"]).timestamp() if sample["expires"] else None
    assert expires_at_s(sample["url"]) == expected


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: str(sample["store"]))
def test_query_keys_count_in_any_case(sample: dict[str, Any]) -> None:
    """A store, or a proxy, may write its keys in capitals or small letters."""
    head, _, query = sample["url"].partition("?")
    for change in (str.upper, str.lower):
        pairs = [pair.partition("=") for pair in query.split("&")]
        changed = head + "?" + "&".join(change(key) + equals + value for key, equals, value in pairs)
        assert expires_at_s(changed) == expires_at_s(sample["url"])


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("se=2025-11-01T10:00Z&sig=x", TEN_OCLOCK_S),
        ("se=2025-11-01T10%3A00%3A00.0000000Z&sig=x", TEN_OCLOCK_S),
        ("se=2025-11-01&sig=x", TEN_OCLOCK_S - 36000),
        ("se=2025-11-01T12:00:00%2B02:00&sig=x", TEN_OCLOCK_S),
        ("se=2025-11-01T12:00:00+02:00&sig=x", TEN_OCLOCK_S),
        ("se=2025-11-01T08:00:00-0200&sig=x", TEN_OCLOCK_S),
        ("se=2025-11-01T10:00:00Z", None),  # somebody else's parameter
        ("temp_url_expires=2025-11-01T10:00:00", TEN_OCLOCK_S),
        ("temp_url_expires=2025-11-01", TEN_OCLOCK_S - 36000),
        ("md5=AbC&expires=1761991200", TEN_OCLOCK_S),
        ("expires=1761991200&Expires=1999999999", TEN_OCLOCK_S),
        ("X-Amz-Date=20251101T090000Z&X-Amz-Expires=3600&Expires=1761990000", 1761990000.0),
        ("%58-Amz-Date=20251101T090000Z&X%2DAmz%2DExpires=3600", TEN_OCLOCK_S),
        ("X-Amz-Date=20251101T090000Z", None),
        ("X-Amz-Expires=3600", None),
        ("X-Amz-Date=20251301T090000Z&X-Amz-Expires=3600", None),
        ("X-Amz-Date=20251101T090000Z&X-Amz-Expires=-1", None),
        ("X-Amz-Date=20251101T090000Z&X-Amz-Expires=999999999999999", None),
        ("X-Amz-Date=20251101T090000Z&X-Amz-Expires=٣٦٠٠", None),
        ("Expires=3600", None),  # a duration
        ("Expires=1761991200000", None),  # milliseconds
        ("Expires=", None),
        ("Expires=soon", None),
        ("se=2025-02-30&sig=x", None),
        ("se=9999-12-31T23:59:59-14:00&sig=x", None),
        ("", None),
    ],
)
def test_odd_writings(query: str, expected: float | None) -> None:
    """Forms that the stores accept are read, anything else is no expiry."""
    assert expires_at_s(f"https://h/k?{query}") == expected
    assert expires_at_s(f"https://h/k?{query}#Expires=1761000000") == expected


def test_signed_at() -> None:
    """From what instant on the URL counts, where it says so."""
    assert signed_at_s(SAMPLES[0]["url"]) == TEN_OCLOCK_S - 3600
    assert signed_at_s("https://h/k?st=2025-11-01T09%3A00%3A00Z&se=2025-11-01T10:00:00Z&sig=x") == TEN_OCLOCK_S - 3600
    assert signed_at_s("https://h/k?Expires=1761991200&Signature=x") is None


KEYS = st.sampled_from(["X-Amz-Date", "X-Amz-Expires", "x-goog-date", "X-Goog-Expires", "Expires", "se", "st", "sig"])
VALUES = st.one_of(
    st.text(),
    st.from_regex(r"[0-9T:.Zz+-]{0,30}"),
    st.datetimes().map(datetime.isoformat),
    st.integers().map(str),
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=8), st.text())
def test_never_raises(pairs: list[tuple[str, str]], tail: str) -> None:
    """Whatever the query holds: an instant of this era, or None."""
    url = "https://h/k?" + "&".join(f"{key}={value}" for key, value in pairs) + tail
    for found in (expires_at_s(url), signed_at_s(url)):
        assert found is None or 946_684_800 <= found < 253_402_300_800


@given(st.datetimes(min_value=datetime(2001, 1, 1), max_value=datetime(2100, 1, 1)), st.integers(0, 604800))  # noqa: DTZ001 - UTC is written into the text
def test_sigv4_is_date_plus_duration(signed: datetime, duration_s: int) -> None:
    """For any date and any duration that S3 permits."""
    signed = signed.replace(microsecond=0)
    url = f"https://h/k?X-Amz-Date={signed:%Y%m%dT%H%M%SZ}&X-Amz-Expires={duration_s}"
    epoch_s = (signed - datetime(1970, 1, 1)).total_seconds()  # noqa: DTZ001 - the same
    assert expires_at_s(url) == epoch_s + duration_s
