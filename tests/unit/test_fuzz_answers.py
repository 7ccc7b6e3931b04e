"""Whatever a store, Valohai's API or a client of the control socket sends: bytes that are right, or a failure; never a crash.

A worker that dies of an answer would take everybody's transfers with it, so only `Rejected` may leave what judges answers.
"""

# ruff: noqa: PT017 - both outcomes are right here, so pytest.raises, which demands one, does not fit

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from valohai_fuse.errors import StoreUnavailableError
from valohai_fuse.fetch import location, response
from valohai_fuse.fetch.response import Head, Rejected, accept
from valohai_fuse.fetch.wire import Order
from valohai_fuse.model import expiry, retry, urls
from valohai_fuse.obs.redaction import redact, url_shown
from valohai_fuse.ports import FileRef
from valohai_fuse.sources.answer import Answer

EXAMPLES = settings(max_examples=100, deadline=None)
SIZE, START, STOP = 1_000_000, 65_536, 131_072

numbers = st.sampled_from(
    [
        b"0",
        b"1",
        b"65535",
        b"65536",
        b"131071",
        b"131072",
        b"1000000",
        b"-1",
        b"+1",
        b"1e3",
        b"0x10",
        b" 1",
        b"*",
        b"",
        b"\xb2",
        b"9" * 5000,
        b"18446744073709551616",
    ]
)
content_ranges = st.builds(lambda a, b, c: b"bytes " + a + b"-" + b + b"/" + c, numbers, numbers, numbers) | st.binary()
header_lines = (
    st.builds(lambda value: b"Content-Range: " + value + b"\r\n", content_ranges)
    | st.builds(lambda value: b"Content-Length: " + value + b"\r\n", numbers)
    | st.builds(lambda value: b"Retry-After: " + value + b"\r\n", numbers | st.binary())
    | st.builds(lambda value: b"Date: " + value + b"\r\n", st.binary())
    | st.builds(lambda value: b"ETag: " + value + b"\r\n", st.binary())
    | st.sampled_from(
        [b"Content-Encoding: gzip\r\n", b"Transfer-Encoding: chunked\r\n", b"Location: http://[\r\n", b"\r\n", b":\r\n"]
    )
    | st.binary()
)
statuses = st.sampled_from(
    [
        b"HTTP/1.1 206 Partial\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 999\r\n",
        b"HTTP/1.1\r\n",
        b"HTTP/\r\n",
        b"HTTP/9 \xb2\r\n",
    ]
)


def order() -> Order:
    """For the second block of an object."""
    return Order(1, b"http://h/o", (), b"o", SIZE, START, STOP, None, b"/x")


@EXAMPLES
@given(statuses, st.lists(header_lines, max_size=6))
@example(b"HTTP/1.1 206 X\r\n", [b"Content-Range: bytes 65536-131071/" + b"9" * 5000])
@example(b"HTTP/1.1 206 X\r\n", [b"Content-Range: bytes " + b"9" * 5000 + b"-131071/1000000"])
@example(b"HTTP/1.1 200 X\r\n", [b"Content-Length: " + b"9" * 5000])
@example(b"HTTP/1.1 429 X\r\n", [b"Retry-After: " + b"9" * 5000])
@example(b"HTTP/1.1 429 X\r\n", [b"Date: Mon, 99 Feb 9999 99:99:99 GMT", b"Retry-After: Mon, 01 Jan 0000 00:00:00 GMT"])
def test_any_head_of_an_answer(status: bytes, lines: list[bytes]) -> None:
    """What is accepted is the range that was asked for, or the whole object; all else is Rejected."""
    head = Head([status, *lines])
    after_s = head.retry_after_s(1e9)
    assert after_s is None or (after_s >= 0 and math.isfinite(after_s))
    assert head.date_s is None or math.isfinite(head.date_s)
    try:
        body = accept(order(), head)
    except Rejected as rejected:
        assert len(rejected.detail) < 300
        return
    assert (body.skip_bytes, body.total_bytes) in {(0, STOP - START), (START, SIZE)}


@EXAMPLES
@given(st.binary())
def test_any_error_body(body: bytes) -> None:
    """Only a plain code leaves it."""
    code = response.error_code(body)
    assert code is None or code.isascii()


@EXAMPLES
@given(
    st.binary()
    | st.sampled_from(
        [
            b"//[",
            b"http://[::1",
            b"///",
            b"?",
            b"#",
            b"\\\\h\\x",
            b"http:x",
            b"HTTP://H",
            b"javascript:1",
            b"file:///x",
            b"//h@i/",
        ]
    )
)
def test_any_location(said: bytes) -> None:
    """A redirect leads to http or https, in one line, or nowhere."""
    try:
        followed = location.followed(b"http://host/path?sig=1", said)
    except Rejected:
        return
    assert followed.lower().startswith((b"http://", b"https://"))
    assert not any(character <= 0x20 or character == 0x7F for character in followed)


url_texts = (
    st.text()
    | st.builds(
        lambda scheme, rest: scheme + rest,
        st.sampled_from(
            ["http:", "https://", "http:/", "HTTP://h?", "https://u:p@h/", "//", "s3://", "file:", "unix:", "data:"]
        ),
        st.text(),
    )
    | st.builds(
        lambda query: "https://h/p?" + query,
        st.lists(
            st.builds(
                "{}={}".format,
                st.sampled_from(
                    ["X-Amz-Date", "X-Amz-Expires", "Expires", "se", "sig", "st", "temp_url_expires", "x-goog-date"]
                ),
                st.text()
                | st.sampled_from(
                    ["20260101T000000Z", "99999999T999999Z", "9" * 400, "2026-13-45", "0000-00-00", "1e9"]
                ),
            )
        ).map("&".join),
    )
)


@EXAMPLES
@given(url_texts)
@example("https://h/p?X-Amz-Date=20260101T000000Z&X-Amz-Expires=" + "9" * 15)
@example("https://h/p?Expires=" + "\u0661" * 10)
@example("https://h/p?" + "&" * 100_000)
@example("http://" + "[" * 10_000)
def test_any_text_as_a_url(text: str) -> None:
    """Expiry, support and redaction of it: a number or None, a reason or None, and a text without its query."""
    for at_s in (expiry.expires_at_s(text), expiry.signed_at_s(text)):
        assert at_s is None or math.isfinite(at_s)
    reason = urls.unsupported_reason(text)
    if reason is None:
        assert text.lower().startswith(("http://", "https://"))
        assert not any(character in text for character in "\r\n\0 ")
    for shown in (urls.redact(text), url_shown(text), urls.redact_text(text)):
        assert isinstance(shown, str)
    secret = "https://h/p?X-Amz-Signature=c0ffee"
    assert "c0ffee" not in redact(f"{text} {secret}")


@EXAMPLES
@given(
    st.text()
    | st.sampled_from(["9" * 5000, "\u00b2", "Mon, 99 Feb 9999 99:99:99 GMT", "Thu, 01 Jan 1970 00:00:00 +9999999"])
)
def test_any_retry_after(text: str) -> None:
    """Seconds, or nothing."""
    seconds = retry.parse_retry_after(text, 1e9)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


# --- the API ----------------------------------------------------------------------------------------------------------

REF = FileRef("in", "id", "a", "datum://a", "a", None, 0)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
)
entries = st.fixed_dictionaries(
    {"filename": scalars | st.just("a"), "url": scalars | st.just("https://h/x")},
    optional={"input_id": scalars | st.just("id"), "original_uri": scalars, "metadata": anything},
)
groups = st.fixed_dictionaries(
    {"name": scalars | st.just("in"), "files": st.lists(entries | anything, max_size=3) | anything},
)


def ask(body: bytes) -> None:
    """Indexes and asks; StoreUnavailableError is the one refusal."""
    try:
        answer = Answer(body, 0.0)
    except StoreUnavailableError as error:
        assert len(error.message) < 300
        return
    url = answer.url_for(REF)
    assert url is None or isinstance(url, str)


@EXAMPLES
@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:\\ nametrulfis0', max_size=60).map(str.encode))
@example(b"[" * 100_000)
@example(b'[{"files":[' + b'{"a":' * 100_000)
@example(b'[{"name":' + b"[" * 100_000)
@example(b'[{"name":"' + b"\\" * 100_001)
@example(b'[{"name":"in","files":[' + b'{"filename":"a","url":' + b"9" * 5000 + b"}]}]")
@example(b'[{"name":"\\ud800","files":[{"filename":"\\ud800","url":"x"}]}]')
@example(b'[{"name":"\xff","files":[{"filename":"\xff","url":"x"}]}]')
def test_any_bytes_as_an_answer(body: bytes) -> None:
    """Valohai may answer anything."""
    ask(body)


@EXAMPLES
@given(st.lists(groups, max_size=3))
def test_any_json_as_an_answer(payload: list[Any]) -> None:
    """The shape of an answer with any value anywhere."""
    ask(json.dumps(payload).encode())


@EXAMPLES
@given(st.data())
def test_any_part_of_an_answer(data: st.DataObject) -> None:
    """Cut anywhere, it is no answer; cut nowhere, it is one."""
    body = json.dumps([{"name": "in", "files": [{"filename": "a", "url": "https://h/x", "input_id": "id"}]}]).encode()
    stop = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(StoreUnavailableError):
        Answer(body[:stop], 0.0)
    assert Answer(body, 0.0).url_for(REF) == "https://h/x"
