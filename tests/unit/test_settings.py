"""One table of settings: flag before environment before default, clear refusals, and a page that says it all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from valohai_fuse import settings
from valohai_fuse.cli.reference import reference_page
from valohai_fuse.errors import UsageError
from valohai_fuse.settings import (
    OPTIONS,
    Settings,
    as_dict,
    has_http_proxy,
    parse_bool,
    parse_bytes,
    parse_seconds,
    parse_share,
    resolve,
)


def test_the_reference_page_is_what_the_table_makes() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference_page(), "run: python -m valohai_fuse.cli.reference > docs/configuration.md"


def test_each_setting_has_a_field_a_variable_and_a_help_of_its_own() -> None:
    assert [option.name for option in OPTIONS] == list(Settings.__dataclass_fields__)
    assert len({option.env for option in OPTIONS}) == len(OPTIONS)
    assert all(option.help.endswith((".", ").")) for option in OPTIONS)


def test_flag_before_environment_before_default() -> None:
    assert resolve({}, {}).cache_dir == "/var/cache/valohai-fuse"
    assert resolve({}, {"VALOHAI_FUSE_CACHE_DIR": "/e"}).cache_dir == "/e"
    assert resolve({"cache_dir": "/f"}, {"VALOHAI_FUSE_CACHE_DIR": "/e"}).cache_dir == "/f"
    assert resolve({"cache_dir": None}, {"VALOHAI_FUSE_CACHE_DIR": ""}).cache_dir == "/var/cache/valohai-fuse"
    assert resolve({"xattrs": False}, {"VALOHAI_FUSE_XATTRS": "1"}).xattrs is False
    assert resolve({}, {"VALOHAI_FUSE_XATTRS": "yes"}).xattrs is True


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ({"read_timeout": "soon"}, {}, "--read-timeout: not a duration: 'soon'"),
        ({}, {"VALOHAI_FUSE_WORKERS": "999"}, "VALOHAI_FUSE_WORKERS: not a number from 0 to 64: '999'"),
        (
            {},
            {"VALOHAI_FUSE_LOG_LEVEL": "loud"},
            "VALOHAI_FUSE_LOG_LEVEL: 'loud' is not one of DEBUG, INFO, WARNING, ERROR",
        ),
        ({"cache_min_free": "130%"}, {}, "--cache-min-free: not a share: '130%'"),
        ({"cache_dir": ""}, {}, "--cache-dir: an empty path"),
        ({}, {"VALOHAI_FUSE_ALLOW_OTHER": "maybe"}, "VALOHAI_FUSE_ALLOW_OTHER: not a yes or no: 'maybe'"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_origin(
    flags: dict[str, str | bool | None], environ: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags, environ)
    assert caught.value.message == said


def test_settings_survive_the_pipe_to_a_daemon() -> None:
    made = resolve({}, {})
    assert Settings(**as_dict(made)) == made


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("1048576", 1 << 20), ("512M", 512 << 20), ("10GiB", 10 << 30), ("1.5 kb", 1536), ("1T", 1 << 40)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("300", 300), ("2.5", 2.5), ("5m", 300), ("1h", 3600), ("250ms", 0.25)])
def test_durations(text: str, value: float) -> None:
    assert parse_seconds(text) == value


_NUMBERS = st.from_regex(r"\A[0-9\u0661]{1,400}(\.[0-9]+)?(ms|h|d|[KMGTP]i?B?|%)?\Z")


@given(st.one_of(st.text(max_size=12), _NUMBERS))
@example("9" * 400)
@example("9" * 5000)
@example("9" * 30 + "P")
def test_no_text_does_worse_than_a_usage_error(text: str) -> None:
    """Nor does any give a number that a system call could not take."""
    for parse in (parse_bytes, parse_seconds, parse_bool, parse_share, *(option.parse for option in OPTIONS)):
        with contextlib.suppress(UsageError):
            value = parse(text)
            assert not isinstance(value, float | int) or value < 2**63


def test_children_find_this_package_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"relative{os.pathsep}/absolute")
    found = settings.search_path_for_children()["PYTHONPATH"].split(os.pathsep)
    assert str(Path(settings.__file__).parents[1]) in found
    assert os.path.abspath("relative") in found
    assert "/absolute" in found


def test_children_do_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("https_proxy", "http://proxy")
    made = settings.child_environment()
    assert "AWS_SECRET_ACCESS_KEY" not in made
    assert made["https_proxy"] == "http://proxy"


@pytest.mark.parametrize(
    ("name", "found"),
    [("http_proxy", True), ("all_proxy", True), ("ALL_PROXY", True), ("HTTP_PROXY", False), ("https_proxy", False)],
)
def test_proxies_are_looked_for_where_libcurl_does(name: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could send a plain request to a proxy; an empty variable cannot."""
    for other in ("http_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "")
    assert not has_http_proxy()
    monkeypatch.setenv(name, "http://proxy:3128")
    assert has_http_proxy() is found
