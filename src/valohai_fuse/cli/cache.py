"""`valohai-fuse cache`: what is in the block cache, whether it is sound, and less of it. All of it is safe beside mounts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from valohai_fuse.cli import output
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import ConfigurationError, UsageError
from valohai_fuse.settings import Settings, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from valohai_fuse.store.upkeep import Removed, Verified

_JSON = click.option("--json", "for_programs", is_flag=True, help="For programs: one object.")
_PROGRESS_S = 0.2


@click.group("cache")
def cache() -> None:
    """Look after the block cache: info, verify, prune, clear, export.

    \b
    Example:
      valohai-fuse cache info
    """


def _checked(settings: Settings) -> str:
    """The cache directory; raises ConfigurationError when there is none or it is not safe to use."""
    from valohai_fuse.store import directory

    directory.check_existing(settings.cache_dir)
    return settings.cache_dir


# --- info -------------------------------------------------------------------------------------------------------------


@verb(
    "info",
    example="valohai-fuse cache info",
    groups=("cache",),
    help="Show what the block cache holds, in all and for each input of this execution, its bound, and the hit rate of the "
    "mounts that use it.",
)
@_JSON
def info(settings: Settings, for_programs: bool) -> None:
    """Shows."""
    from valohai_fuse.cli import cache_contents

    answer = cache_contents.gather(settings, _checked(settings))
    if for_programs:
        output.data_json(answer)
        return
    bound = answer["bytes_max"]
    hit_rate = answer["hit_rate"]
    output.data(f"{answer['cache_dir']}")
    output.data(f"  on disk    {output.bytes_shown(answer['bytes_on_disk'])}, {answer['segments']:,} segments")
    output.data(
        f"  bound      {output.bytes_shown(bound) if bound else 'none'}, {answer['min_free']} of the disk left free"
    )
    output.data(
        f"  free       {output.bytes_shown(answer['free_bytes'])} of {output.bytes_shown(answer['capacity_bytes'])}"
    )
    output.data(f"  content    {output.bytes_shown(answer['content_bytes'])} in {answer['blocks']:,} blocks")
    if answer["segments"]:
        output.data(f"  last used  {_age(answer['used_last_s'])} to {_age(answer['used_first_s'])} ago")
    if hit_rate is not None:
        output.data(f"  hit rate   {hit_rate:.0%} since the mounts of now began")
    for entry in answer["inputs"]:
        share = f" ({entry['content_bytes'] / entry['size']:.0%})" if entry["size"] else ""
        output.data(
            f"{entry['input']}\n  cached     {output.bytes_shown(entry['content_bytes'])} of {output.bytes_shown(entry['size'])}"
            f"{share}, {entry['blocks']:,} blocks, {entry['files_cached']:,} of {output.files_shown(entry['files'])} complete"
        )


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


# --- verify, prune, clear ---------------------------------------------------------------------------------------------


@verb(
    "verify",
    example="valohai-fuse cache verify",
    help="Hash everything in the block cache. What is not what it should be is removed and will be fetched again; exit code 1 "
    "says that there was some.",
)
@_JSON
def verify(settings: Settings, for_programs: bool) -> int:
    """Checks and repairs."""
    from dataclasses import asdict

    from valohai_fuse.store import evictor, upkeep

    cache_dir = _checked(settings)
    total = sum(1 for _ in evictor.scan(cache_dir))
    with _progress(total, "segments") as shown:

        def progress(done: Verified) -> None:
            shown(done.segments, f"{output.bytes_shown(done.content_bytes)} verified")

        done = upkeep.verify(cache_dir, progress)
    if for_programs:
        output.data_json(asdict(done))
    else:
        output.data(
            f"{done.segments:,} segments, {done.blocks:,} blocks, {output.bytes_shown(done.content_bytes)} verified; "
            f"removed: {done.bad_blocks:,} blocks, {done.bad_segments:,} files"
        )
    return 1 if done.bad_blocks or done.bad_segments else 0


@contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    """A line on stderr that is written over, on a terminal only. Yields `shown(done, text)`."""
    last_s = 0.0

    def shown(done: int, text: str) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if sys.stderr.isatty() and now_s - last_s > _PROGRESS_S:
            last_s = now_s
            print(f"\r\x1b[K{done:,} of {total:,} {what}, {text}", end="", file=sys.stderr, flush=True)

    try:
        yield shown
    finally:
        if last_s:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@verb(
    "prune",
    example="valohai-fuse cache prune --to 10G\nvalohai-fuse cache prune --older-than 7d",
    help="Remove what was used least recently from the block cache.",
)
@click.option("--to", "to_size", metavar="SIZE", help="Until no more than this is left.")
@click.option("--older-than", metavar="TIME", help="Whatever was not used for this long, such as 12h or 7d.")
@_JSON
def prune(settings: Settings, to_size: str | None, older_than: str | None, for_programs: bool) -> None:
    """Removes; raises UsageError without a measure."""
    from valohai_fuse.store import upkeep

    if to_size is None and older_than is None:
        raise UsageError("prune to what?", hint="say --to SIZE, --older-than TIME, or both")
    removed = upkeep.prune(
        _checked(settings),
        to_bytes=None if to_size is None else parse_bytes(to_size),
        older_than_s=None if older_than is None else parse_seconds(older_than),
    )
    _say_removed(removed, for_programs=for_programs)


@verb(
    "clear",
    example="valohai-fuse cache clear",
    help="Empty the block cache. Mounts go on, and fetch again what they need.",
)
@_JSON
def clear(settings: Settings, for_programs: bool) -> None:
    """Removes everything."""
    from valohai_fuse.store import upkeep

    _say_removed(upkeep.clear(_checked(settings)), for_programs=for_programs)


def _say_removed(removed: Removed, *, for_programs: bool) -> None:
    if for_programs:
        output.data_json({"segments": removed.segments, "bytes_on_disk": removed.bytes_on_disk})
    else:
        output.data(f"removed {removed.segments:,} segments, {output.bytes_shown(removed.bytes_on_disk)}")


# --- export -----------------------------------------------------------------------------------------------------------


@verb(
    "export",
    example="valohai-fuse cache export train --to /scratch/train",
    help="Make plain files of what is completely cached of each INPUT (default: all), without network and without a mount. "
    "Exit code 1 says that some files were not complete; they are left out.",
)
@click.argument("inputs", metavar="[INPUT]...", nargs=-1)
@click.option("--to", "target", metavar="DIR", required=True, help="Where to; each input becomes a directory there.")
@_JSON
def export(settings: Settings, inputs: tuple[str, ...], target: str, for_programs: bool) -> int:
    """Writes; existing files of that name are replaced."""
    from valohai_fuse.cli import cache_contents

    try:
        done = cache_contents.export(settings, _checked(settings), inputs, os.path.abspath(target))
    except OSError as error:
        raise ConfigurationError(f"{target}: {error.strerror}", hint="choose another --to") from None
    if for_programs:
        output.data_json(done)
    else:
        output.data(f"{output.files_shown(done['files'])}, {output.bytes_shown(done['bytes'])}, in {target}")
    if done["incomplete"]:
        output.warning(
            f"{output.files_shown(done['incomplete'])} not completely cached, left out",
            hint="read them through a mount first",
        )
    return 1 if done["incomplete"] else 0


for _command in (info, verify, prune, clear, export):
    cache.add_command(_command)
