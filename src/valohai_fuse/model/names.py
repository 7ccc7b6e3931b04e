"""Which names of a manifest may appear in the tree, and how a name is written in a message.

A tree path is bytes, relative, `/` between components. It may hold anything a Linux file name may hold; what is refused
here is what a kernel could never ask for (empty components, NUL, more than 255 bytes) and what would lead out of the
mount (`..`, absolute names). Nothing is mended: a name that is silently changed is a file that nobody finds.
"""

from __future__ import annotations

import posixpath

COMPONENT_BYTES_MAX = 255
"""NAME_MAX of Linux; a longer one cannot be looked up, FUSE answers ENAMETOOLONG before we are asked."""

UNSAFE_COMPONENTS = frozenset((b"", b".", b".."))

_SHOWN_CHARACTERS_MAX = 200


def printable(name: str | bytes) -> str:
    """The name in quotes, with control characters and lone surrogates escaped and the middle of a long one left out."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    if len(text) > _SHOWN_CHARACTERS_MAX:
        half = _SHOWN_CHARACTERS_MAX // 2
        return f"{text[:half]!r}...{text[-half:]!r} ({len(text)} characters)"
    return repr(text)


def refusal(path: bytes) -> str | None:
    """Why `path` cannot be shown in the tree, or None when it can."""
    if not path:
        return "the name is empty"
    if path.startswith(b"/"):
        return "the name is absolute"
    if b"\0" in path:
        return "the name holds a NUL character"
    for component in path.split(b"/"):
        if component == b"..":
            return "the name holds '..'"
        if component == b".":
            return "the name holds the component '.'"
        if not component:
            return "the name ends in '/'" if path.endswith(b"/") else "the name holds an empty component ('//')"
        if len(component) > COMPONENT_BYTES_MAX:
            return f"a component of the name is {len(component)} bytes long, the limit is {COMPONENT_BYTES_MAX}"
    return None


def below_input(path: str, inputs_dir: str, input_name: str) -> bytes | None:
    """The part of the absolute `path` below `inputs_dir/input_name`, or None when it does not lie there.

    `//` and `/./` are folded, `..` is never trusted: what lies beyond a symbolic link is unknown here.
    """
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        return None
    folded = "/" + posixpath.normpath(path).lstrip("/")
    below = posixpath.join("/" + posixpath.normpath(inputs_dir).lstrip("/"), input_name) + "/"
    if not folded.startswith(below):
        return None
    try:
        rest = folded[len(below) :].encode()
    except UnicodeEncodeError:
        return None
    return rest if refusal(rest) is None else None
