"""No query, fragment, user info or token gets through the safety net."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.obs import logs
from valohai_fuse.obs.redaction import printable, redact, url_shown

SECRET = "s3cr3t-8d1f0c"


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature={SECRET} failed",
        f"URL('https://store/k?sig={SECRET}')",
        f'{{"url": "https://store/a b?sv=1&sig={SECRET}"}}',
        f"https://user:{SECRET}@host/path",
        f"https://host/path#{SECRET}",
        f"HTTPS://HOST/?{SECRET}",
        f"/bucket/key?X-Amz-Credential=x&X-Amz-Signature={SECRET}",
        f"temp_url_sig={SECRET}&temp_url_expires=1",
        f"Authorization: Execution-Token {SECRET}",
        f"{{'Authorization': 'Execution-Token {SECRET}'}}",
        f"[('authorization', 'Bearer {SECRET}')]",
        f"sent Execution-Token {SECRET}, got 401",
        f"https://host/it's?sig='{SECRET}'",
    ],
)
def test_nothing_secret_is_left(text: str) -> None:
    assert SECRET not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://store.example/bucket/key is not there",
        "datum://0188-aa/x",
        "the token is dead",
        "Token refused",
        "inputs.json: $.train.files[3].name: expected str, got int",
        "/valohai/inputs/train/what?.csv",
    ],
)
def test_what_is_not_secret_stays(text: str) -> None:
    assert redact(text) == text


@given(
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters='"<>', exclude_categories=("Z", "C")), min_size=1)
)
def test_no_query_survives_whatever_it_holds(query: str) -> None:
    assert redact(f"https://host/path?{query} end") == "https://host/path?*** end"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://u:p@host:8443/a/b?x={SECRET}#f", "https://host:8443/a/b"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("https://[::1]:80/x?y", "https://[::1]:80/x"),
        ("nonsense", "(not a URL)"),
        ("https://host:port/", "(not a URL)"),
    ],
)
def test_a_url_is_shown_down_to_its_path(url: str, shown: str) -> None:
    assert url_shown(url) == shown


def test_a_name_cannot_forge_a_line() -> None:
    assert printable("a\nERROR b\x1b[31m") == "a\\nERROR b\\x1b[31m"


@given(st.text())
def test_printable_is_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()


def _record(message: str, *, broken: bool = False) -> logging.LogRecord:
    info = None
    if broken:
        try:
            int(f"https://h/p?sig={SECRET}")
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("valohai_fuse.fetch.pool", logging.WARNING, __file__, 1, message, (), info)


def test_a_log_line_has_time_level_subject_module_and_no_secret() -> None:
    line = logs.LineFormatter("train").format(_record(f"lost https://h/p?sig={SECRET}\nforged", broken=True))
    first, *rest = line.split("\n")
    assert first.endswith("WARNING train fetch.pool: lost https://h/p?***")
    assert SECRET not in line
    assert any("ValueError" in more for more in rest)


@pytest.mark.expect_warnings("cannot write the log to")
def test_the_log_file_is_private_and_not_through_a_link(tmp_path: Path) -> None:
    before, level = logging.getLogger().handlers[:], logging.getLogger().level
    target = tmp_path / "a.log"
    try:
        logs.configure("INFO", log_file=str(target), subject="x")
        logging.getLogger("valohai_fuse.mount").info("up %s", json.dumps({"n": 1}))
        logging.getLogger("httpx").info("HTTP Request: GET https://h/?q")
        assert target.read_text().endswith('INFO x mount: up {"n": 1}\n')
        assert target.stat().st_mode & 0o777 == 0o600
        (tmp_path / "link").symlink_to(target)
        logs.configure("INFO", log_file=str(tmp_path / "link"))
        assert len(target.read_text().splitlines()) == 1
    finally:
        for handler in logging.getLogger().handlers[:]:
            handler.close()
        logging.getLogger().handlers[:] = before
        logging.getLogger().setLevel(level)
        logging.raiseExceptions = True
