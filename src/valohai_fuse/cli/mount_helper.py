"""`mount -t fuse.valohai-fuse SOURCE MOUNTPOINT -o OPTIONS`, /etc/fstab and systemd's .mount units.

mount(8) finds /sbin/mount.fuse3, which calls `valohai-fuse SOURCE MOUNTPOINT -o OPTIONS`. That is translated into
`mount --root MOUNTPOINT`: one tree with every on-demand input. SOURCE is the configuration directory when it is an absolute path,
else a label that means nothing. Options are those of the table with `_` for `-` (`cache_dir=/x`, `allow_other`), `all`, and
`input=NAME` (may be repeated).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from valohai_fuse.errors import UsageError
from valohai_fuse.settings import OPTIONS

_OF_MOUNT = {
    *(
        "rw",
        "ro",
        "nosuid",
        "suid",
        "nodev",
        "dev",
        "exec",
        "noexec",
        "atime",
        "noatime",
        "relatime",
        "nodiratime",
        "async",
    ),
    *(
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "defaults",
        "nofail",
        "_netdev",
        "default_permissions",
    ),
}
"""What mount(8) and fstab may add: the mount is `ro,nosuid,nodev` whatever they say."""


def translate(arguments: Sequence[str], verbs: Container[str]) -> list[str]:
    """The arguments of mount(8)'s convention as those of `mount`; any others as they are.

    Raises UsageError for an option that does not exist.
    """
    if len(arguments) < 4 or arguments[0] in verbs or arguments[0].startswith("-") or "-o" not in arguments:
        return list(arguments)
    source, mountpoint, *rest = arguments
    translated = ["mount", "--root", mountpoint]
    if source.startswith("/"):
        translated += ["--config-dir", source]
    inputs: list[str] = []
    for position, argument in enumerate(rest):
        if position and rest[position - 1] == "-o":
            for option in argument.split(","):
                name, _, value = option.partition("=")
                if name == "input":
                    inputs.append(value)
                else:
                    translated += _flag(name, value if "=" in option else None)
    return [*translated, "--", *inputs]


def _flag(name: str, value: str | None) -> list[str]:
    if not name or name in _OF_MOUNT or name.startswith(("x-", "comment", "context")):
        return []
    if name == "all":
        return ["--all"]
    option = next((o for o in OPTIONS if o.name == name.replace("-", "_")), None)
    if option is None:
        raise UsageError(
            f"unknown mount option {name!r}", hint="options are the flags of `valohai-fuse mount`, with _ for -"
        )
    if option.is_switch:
        on = value is None or option.parse(value)
        return [option.flag if on else f"--no-{option.flag[2:]}"]
    if value is None:
        raise UsageError(f"the mount option {name!r} needs a value")
    return [option.flag, value]
