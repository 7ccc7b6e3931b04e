"""The reference page docs/configuration.md, made from the table of settings: `python -m valohai_fuse.cli.reference`.

A test compares the page with what this makes, so that a setting cannot go without its documentation.
"""

from __future__ import annotations

from valohai_fuse.cli.main import EXIT_CODES
from valohai_fuse.cli.options import TITLES
from valohai_fuse.settings import OPTIONS

_HEAD = """# Configuration

<!-- Made by `python -m valohai_fuse.cli.reference > docs/configuration.md`; a test fails when it is out of date. -->

A flag goes before an environment variable, and that before the default. Flags stand behind the verb:
`valohai-fuse mount --cache-dir /scratch/cache train`. `mount` and `run` take all of them; every verb takes the locations and
`--log-level`. An empty variable counts as not set.

Sizes are written `512M`, `20G` or `1T` (binary units, `GiB` means the same), durations `300`, `250ms`, `5m` or `1h`. A switch is
turned on by its flag, off by the flag with `--no-`, and by a variable with `1` or `0`.

In `mount -t fuse.valohai-fuse` and /etc/fstab the same settings are mount options with `_` for `-`:
`/valohai/config /mnt fuse.valohai-fuse cache_dir=/scratch/cache,allow_other 0 0`. Besides these there are `all` and `input=NAME`,
which may be repeated.
"""
_TAIL = """
## Other variables

| variable | meaning |
| --- | --- |
| `NO_COLOR` | no colours, whatever it is set to |
| `NOTIFY_SOCKET` | set by systemd for `Type=notify`: `mount --foreground` tells it when the mounts answer and when it stops |
| `XDG_RUNTIME_DIR` | see `--runtime-dir` |
| `HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`, `ALL_PROXY` | passed on to the daemons with their usual meaning |
| `SSL_CERT_FILE`, `SSL_CERT_DIR` | the same |

## Exit codes

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | anything else that went wrong; `status`: something is dead or does not answer |
"""
_MEANINGS = {
    "UsageError": "usage: an unknown flag, value, input or path",
    "ConfigurationError": "configuration: a file is missing or invalid; the message names it and the JSON path",
    "FuseUnavailableError": "this machine does not let us use FUSE; `doctor` says what is missing",
    "MountFailedError": "a mount (or an unmount) failed",
}


def reference_page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for group, title in TITLES.items():
        parts.append(f"\n## {title}\n\n| flag | variable | default | meaning |\n| --- | --- | --- | --- |\n")
        for option in OPTIONS:
            if option.group == group:
                flag = option.flag if option.is_switch else f"{option.flag} {option.metavar}"
                default = f"`{_default(option.default, switch=option.is_switch)}`" if option.default is not None else ""
                cells = (f"`{flag}`".replace("|", "\\|"), f"`{option.env}`", default, option.help)
                parts.append(f"| {' | '.join(cells)} |\n")
    parts.append(_TAIL)
    parts += [f"| {code} | {_MEANINGS[kind.__name__]} |\n" for kind, code in EXIT_CODES]
    parts.append(
        "| 126, 127, 128+N | `run`: CMD cannot be run, does not exist, was ended by signal N; otherwise CMD's own status |\n"
    )
    parts.append("| 130 | interrupted |\n")
    return "".join(parts)


def _default(text: str, *, switch: bool) -> str:
    return ("off" if text == "0" else "on") if switch else text


if __name__ == "__main__":
    print(reference_page(), end="")
