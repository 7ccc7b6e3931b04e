"""Every setting, once: one table drives flags, environment variables, help, the reference page and this dataclass.

Precedence: flag > environment > default. The only module that reads `os.environ`. The frozen `Settings` is what every
other room is given; it travels to daemons as JSON over a pipe, never through argv (a command line is world-readable).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from valohai_fuse.errors import UsageError

Group = Literal["location", "mount", "reading", "cache", "network", "log"]

_UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4, "P": 1024**5}


SECONDS_MAX: Final = 10 * 365 * 86400.0
"""Timers of the kernel and of libcurl hold it, in milliseconds as well."""


def parse_bytes(text: str) -> int:
    """`10G`, `10GiB`, `512 MB`, `1048576` -> bytes; units are binary whichever way they are written."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"not a size: {text!r}", hint="write for example 512M, 20G or 1T")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size >= 2**63:
        raise UsageError(f"more than any disk holds: {text[:40]!r}")
    return int(size)


def parse_share(text: str) -> str:
    """A size (`20G`) or a share of the file system (`10%`); kept as text, resolved where the file system is known."""
    if re.fullmatch(r"\s*\d+(?:\.\d+)?\s*%\s*", text):
        if not 0 <= float(text.strip().rstrip("%")) <= 100:
            raise UsageError(f"not a share: {text!r}", hint="write a percentage from 0% to 100%")
        return text.strip()
    parse_bytes(text)
    return text.strip()


def parse_seconds(text: str) -> float:
    """`300`, `2.5`, `5m`, `1h`, `250ms` -> seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*", text)
    if match is None:
        raise UsageError(f"not a duration: {text!r}", hint="write for example 300, 250ms, 5m or 1h")
    seconds = float(match[1]) * {"ms": 0.001, None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    if seconds > SECONDS_MAX:
        raise UsageError(f"longer than a machine lives: {text[:40]!r}")
    return seconds


def parse_bool(text: str) -> bool:
    """`1`, `true`, `yes`, `on` and their opposites."""
    value = text.strip().lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"", "0", "false", "no", "off"}:
        return False
    raise UsageError(f"not a yes or no: {text!r}", hint="write 1 or 0")


def _count(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\s*\d{1,18}\s*", text) or not minimum <= int(text) <= maximum:
            raise UsageError(f"not a number from {minimum} to {maximum}: {text!r}")
        return int(text)

    return parse


def _choice(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise UsageError(f"{text!r} is not one of {', '.join(values)}")
        return text

    return parse


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise UsageError("an empty path")
    return os.path.abspath(os.path.expanduser(text))


def _text(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: `name` is the field of Settings, the flag is `--name-with-dashes`."""

    name: str
    env: str
    group: Group
    default: str | None
    parse: Callable[[str], Any]
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        """`--cache-dir` for `cache_dir`."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands without a value."""
        return self.parse is parse_bool


def _option(
    name: str,
    group: Group,
    default: str | None,
    parse: Callable[[str], Any],
    metavar: str,
    text: str,
    env: str | None = None,
) -> Option:
    return Option(name, env or f"VALOHAI_FUSE_{name.upper()}", group, default, parse, metavar, text)


OPTIONS: tuple[Option, ...] = (
    _option(
        "config_dir",
        "location",
        "/valohai/config",
        _path,
        "DIR",
        "Where inputs.json and api.json are.",
        "VH_CONFIG_DIR",
    ),
    _option(
        "inputs_dir", "location", "/valohai/inputs", _path, "DIR", "Where the inputs are mounted.", "VH_INPUTS_DIR"
    ),
    _option(
        "cache_dir",
        "location",
        "/var/cache/valohai-fuse",
        _path,
        "DIR",
        "The block cache; may be shared by executions and hosts.",
    ),
    _option(
        "runtime_dir",
        "location",
        None,
        _path,
        "DIR",
        "Control sockets and logs of running mounts. Default: /run/valohai-fuse as root, "
        "else $XDG_RUNTIME_DIR/valohai-fuse or /tmp/valohai-fuse-UID.",
    ),
    _option("uid", "mount", None, _count(0, 2**32 - 2), "UID", "Owner shown for all files. Default: who mounts."),
    _option(
        "gid",
        "mount",
        None,
        _count(0, 2**32 - 2),
        "GID",
        "Group shown for all files. Default: the group of who mounts.",
    ),
    _option(
        "allow_other",
        "mount",
        None,
        parse_bool,
        "",
        "Let other users read the mount. Default: on as root, off otherwise.",
    ),
    _option(
        "xattrs",
        "mount",
        "0",
        parse_bool,
        "",
        "Show what Valohai knows of a file as extended attributes user.valohai.* (slows `ls -l` down).",
    ),
    _option(
        "mount_timeout", "mount", "60", parse_seconds, "SECONDS", "Give up on a mount that has not answered by then."
    ),
    _option(
        "grace_period",
        "mount",
        "10",
        parse_seconds,
        "SECONDS",
        "How long an unmount waits for reads that are under way.",
    ),
    _option(
        "kernel_readahead",
        "mount",
        "1M",
        parse_bytes,
        "SIZE",
        "The kernel's readahead window on the mount, set where /sys permits.",
    ),
    _option(
        "read_timeout",
        "reading",
        "300",
        parse_seconds,
        "SECONDS",
        "A read ends within this, with its bytes or with an error.",
    ),
    _option(
        "readahead",
        "reading",
        "96M",
        parse_bytes,
        "SIZE",
        "How far ahead of a sequential reader to fetch at the most; 0 turns it off.",
    ),
    _option(
        "readahead_total", "reading", "96M", parse_bytes, "SIZE", "The same for all readers of one mount together."
    ),
    _option(
        "background_fill",
        "reading",
        "4G",
        parse_bytes,
        "SIZE",
        "How much of a file that is read at random again and again, or of a directory whose small files are opened in no order, "
        "is completed in the background at the most, and never more "
        "than a quarter of the cache; 0 turns it off.",
    ),
    _option(
        "cache_max_size",
        "cache",
        "0",
        parse_bytes,
        "SIZE",
        "Upper bound of the cache directory; 0: only --cache-min-free bounds it.",
    ),
    _option("cache_min_free", "cache", "10%", parse_share, "SIZE|%", "What the cache leaves free on its file system."),
    _option(
        "workers",
        "network",
        "0",
        _count(0, 64),
        "N",
        "Fetch processes per mount at the most; 0: half as many as processors, 4 at the most.",
    ),
    _option("connections", "network", "32", _count(1, 512), "N", "Requests under way per mount at the most."),
    _option("connect_timeout", "network", "10", parse_seconds, "SECONDS", "For a connection to a store or the API."),
    _option(
        "stall_timeout",
        "network",
        "30",
        parse_seconds,
        "SECONDS",
        "A transfer without a byte for this long is given up and repeated.",
    ),
    _option(
        "hedging",
        "network",
        "1",
        parse_bool,
        "",
        "Ask once more, on another connection, for what a reader waits for and its store answers far later than usual; one "
        "request in twenty at the most.",
    ),
    _option(
        "renew_margin", "network", "60", parse_seconds, "SECONDS", "Renew a signed URL this long before it expires."
    ),
    _option(
        "ca_file", "network", None, _path, "FILE", "Additional certificate authorities (PEM) for stores and the API."
    ),
    _option(
        "api_input_parameter",
        "network",
        "input",
        _choice("input", "inputs"),
        "input|inputs",
        "Name of the query parameter that names the input in Valohai's renewal request.",
    ),
    _option(
        "log_level",
        "log",
        "INFO",
        _choice("DEBUG", "INFO", "WARNING", "ERROR"),
        "LEVEL",
        "How much the log says. `run` shows warnings on stderr besides, or as much as this says where it is given.",
    ),
    _option(
        "log_file",
        "log",
        None,
        _path,
        "FILE",
        "Where the log goes. Default: a file per mount in the runtime directory; stderr with --foreground.",
    ),
)
"""The reference page (docs/configuration.md) is generated from this; a test fails where the two differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the table above resolves to; see there for the meaning of each field. Sizes in bytes, durations in seconds."""

    config_dir: str
    inputs_dir: str
    cache_dir: str
    runtime_dir: str
    uid: int
    gid: int
    allow_other: bool
    xattrs: bool
    mount_timeout: float
    grace_period: float
    kernel_readahead: int
    read_timeout: float
    readahead: int
    readahead_total: int
    background_fill: int
    cache_max_size: int
    cache_min_free: str
    workers: int
    connections: int
    connect_timeout: float
    stall_timeout: float
    hedging: bool
    renew_margin: float
    ca_file: str | None
    api_input_parameter: str
    log_level: str
    log_file: str | None


def resolve(flags: Mapping[str, str | bool | None], environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from flags (by field name; None: not given), then the environment, then defaults.

    Raises UsageError naming the flag or the variable whose value cannot be used.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for option in OPTIONS:
        given = flags.get(option.name)
        if isinstance(given, bool):
            values[option.name] = given
            continue
        origin, text = (option.flag, given) if given is not None else (option.env, environ.get(option.env) or None)
        if text is None:
            text = option.default
        if text is None:
            values[option.name] = _derived_default(option.name, environ)
            continue
        try:
            values[option.name] = option.parse(text)
        except UsageError as error:
            raise UsageError(f"{origin}: {error.message}", hint=error.hint) from None
    return Settings(**values)


def is_in_environment(name: str) -> bool:
    """Whether a variable says what the setting `name` is."""
    return any(os.environ.get(option.env) for option in OPTIONS if option.name == name)


def _derived_default(name: str, environ: Mapping[str, str]) -> Any:
    if name == "runtime_dir":
        if os.geteuid() == 0:
            return "/run/valohai-fuse"
        base = environ.get("XDG_RUNTIME_DIR")
        return os.path.join(base, "valohai-fuse") if base else f"/tmp/valohai-fuse-{os.geteuid()}"  # noqa: S108 - 0700, owner checked on use
    if name == "uid":
        return os.geteuid()
    if name == "gid":
        return os.getegid()
    if name == "allow_other":
        return os.geteuid() == 0
    return None


def has_http_proxy() -> bool:
    """Whether libcurl may send requests for http URLs to a proxy. HTTP_PROXY it does not heed: a CGI's client can set that."""
    return any(os.environ.get(name) for name in ("http_proxy", "all_proxy", "ALL_PROXY"))


def child_environment(keep: Iterable[str] = ()) -> dict[str, str]:
    """The environment for processes that this package starts: what Python and TLS need, and nothing secret."""
    wanted = {
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        *keep,
    }
    proxies = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"}
    kept = {key: value for key, value in os.environ.items() if key in wanted or key.upper() in proxies}
    if "PYTHONPATH" in kept:  # a child may run in another directory than the one it is relative to
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in kept["PYTHONPATH"].split(os.pathsep))
    return kept


def color_wanted() -> bool:
    """False when NO_COLOR is set to anything but the empty string (no-color.org)."""
    return not os.environ.get("NO_COLOR")


def as_dict(settings: Settings) -> dict[str, Any]:
    """For the pipe to a daemon; `Settings(**as_dict(s)) == s`."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


def notify_socket() -> str | None:
    """Where systemd wants to hear from a `Type=notify` service."""
    return os.environ.get("NOTIFY_SOCKET") or None


def command_environment(**changed: str) -> dict[str, str]:
    """The whole environment, for the user's own command of `run`, with `changed` on top."""
    return {**os.environ, **changed}


def search_path_for_children() -> dict[str, str]:
    """PYTHONPATH such that a child that changes its directory and ignores its own finds this very package again."""
    parts = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.basename(home) not in {"site-packages", "dist-packages"} and home not in parts:
        parts.insert(0, home)
    return {"PYTHONPATH": os.pathsep.join(parts)} if parts else {}
