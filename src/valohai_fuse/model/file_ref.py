"""How a file is named to whoever finds a URL for it. Part of the ports (`ports.FileRef`); here because the manifest makes it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FileRef:
    """One file of one input, as the manifest names it: enough to ask any source for a URL.

    Both locations are kept out of `repr`: either may hold a query.
    """

    input_name: str
    input_id: str | None
    name: str
    uri: str | None = field(repr=False)
    datum_id: str | None
    storage_uri: str | None = field(repr=False)
    index: int
    """Position in the input's list of files."""
