"""inputs.yaml as JSON, so that there is one path of decoding, checking and messages behind it.

Decides what YAML may cost before any of it is built. Aliases let a kilobyte stand for a petabyte, and libyaml's composer
ends the process with a segmentation fault on deep nesting; so the text is first read as events, without recursion, and its
depth and its size with every alias written out are added up. Invariant: no message quotes the text, which may hold signed URLs.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
import yaml

from valohai_fuse.errors import ConfigurationError

DEPTH_MAX: Final = 64
"""A manifest has five levels above a file's metadata."""
EXPANDED_BYTES_MIN: Final = 16 * 1024 * 1024
EXPANDED_TIMES_MAX: Final = 8
"""With all aliases written out, the text may be so many times as long as it is, or EXPANDED_BYTES_MIN if that is more. Writers
use aliases for what several files share, such as one list of metadata."""
_QUOTED: Final = re.compile(r"'.*'|\".*\"", re.DOTALL)
_NODE_BYTES: Final = 8
"""What a node counts for besides its text."""


def to_json(text: bytes, origin: str) -> bytes:
    """The same manifest as JSON; b"" for an empty document. `origin` names the file in messages.

    Raises ConfigurationError.
    """
    try:
        _check_bounds(text, origin)
        loaded = yaml.load(text, Loader=yaml.CSafeLoader)
        return b"" if loaded is None else msgspec.json.encode(loaded)
    except yaml.YAMLError as error:
        # Only the problem and its place: the text of the error quotes the line, which may be a signed URL.
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"
        problem = _QUOTED.sub("'...'", problem)  # a tag or an alias may be anything
        raise ConfigurationError(f"{origin}: not YAML: {problem}{where}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{origin}: not a manifest: nothing that JSON could say ({type(error).__name__})"
        ) from None


class _Measure:
    """A node under construction: how much it and what it holds come to, and how deep that goes, aliases written out."""

    __slots__ = ("anchor", "depth", "weight")

    def __init__(self, anchor: str, weight: int) -> None:
        self.anchor = anchor
        self.weight = weight
        self.depth = 1

    def hold(self, weight: int, depth: int) -> None:
        """A child of that much."""
        self.weight += weight
        self.depth = max(self.depth, depth + 1)


def _check_bounds(text: bytes, origin: str) -> None:
    """Raises ConfigurationError for what must not be built, and YAMLError for what is no YAML."""
    weight_max = max(EXPANDED_BYTES_MIN, EXPANDED_TIMES_MAX * len(text))
    named: dict[str, tuple[int, int]] = {}
    open_nodes: list[_Measure] = [_Measure("", 0)]
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.DocumentStartEvent):
            named.clear()
            continue
        if isinstance(event, yaml.CollectionStartEvent):
            named.pop(event.anchor or "", None)  # until it is complete, an alias of that name is a loop
            open_nodes.append(_Measure(event.anchor or "", _NODE_BYTES))
        measured = _measured(event, open_nodes, named)
        if measured is not None:
            open_nodes[-1].hold(*measured)
        if len(open_nodes) > DEPTH_MAX or open_nodes[-1].depth > DEPTH_MAX:
            raise ConfigurationError(f"{origin}: not a manifest: nested more than {DEPTH_MAX} levels deep")
        if open_nodes[-1].weight > weight_max:
            raise ConfigurationError(f"{origin}: not a manifest: its aliases stand for more than {weight_max} bytes")


def _measured(event: Any, open_nodes: list[_Measure], named: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Weight and depth of the node that is complete with this event; None where none is."""
    if isinstance(event, yaml.ScalarEvent):
        measured = len(event.value) + _NODE_BYTES, 1
        anchor = event.anchor or ""
    elif isinstance(event, yaml.CollectionEndEvent):
        node = open_nodes.pop()
        measured, anchor = (node.weight, node.depth), node.anchor
    elif isinstance(event, yaml.AliasEvent):
        return named.get(event.anchor or "", (0, DEPTH_MAX))  # unknown: the loader says so; a loop: as deep as it gets
    else:
        return None
    if anchor:
        named[anchor] = measured
    return measured
