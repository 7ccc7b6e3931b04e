"""`valohai-fuse info`: what Valohai knows of files and directories below a mount, answered by the daemon that serves it, and of
those that a mount would show in the inputs directory, answered from inputs.json and the cache."""

from __future__ import annotations

import os
from typing import Any

import click

from valohai_fuse.cli import mounted_paths, output
from valohai_fuse.cli.options import verb
from valohai_fuse.errors import UsageError
from valohai_fuse.obs.control_client import NoAnswerError, ask
from valohai_fuse.obs.redaction import redact
from valohai_fuse.obs.runtime_dir import MountRecord, RuntimeDir, is_running
from valohai_fuse.settings import Settings

_ANSWER_S = 60.0
_LABELS = (
    ("input", "input"),
    ("name", "name"),
    ("uri", "uri"),
    ("datum_id", "datum"),
    ("input_id", "input id"),
    ("download_intent", "download"),
)


@verb(
    "info",
    example="valohai-fuse info /valohai/inputs/train/images/0001.png",
    help="Show what Valohai knows of each PATH (uri, datum id, metadata), its size, and how much of it is cached; of a directory "
    "the sums. PATH is below a mount, or where a mount in the inputs directory would show it.",
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--json", "for_programs", is_flag=True, help="For programs: a list with one object per PATH.")
def info(settings: Settings, paths: tuple[str, ...], for_programs: bool) -> int:
    """Shows; raises for a path that no mount shows or would show."""
    records = [record for record in RuntimeDir(settings.runtime_dir).records() if is_running(record)]
    answers = [_ask(settings, records, path) for path in paths]
    if for_programs:
        output.data_json(answers)
        return 0
    for position, answer in enumerate(answers):
        if position:
            output.data("")
        _show(answer)
    return 0


def _ask(settings: Settings, records: list[MountRecord], path: str) -> dict[str, Any]:
    found = mounted_paths.find(records, path)
    if found is None:
        return {**_offline(settings, path), "path": os.path.abspath(path)}
    record, inside = found
    try:
        answer = ask(record.control_path, "info", timeout_s=_ANSWER_S, path=inside)
    except NoAnswerError as error:
        raise UsageError(f"{path}: {error.message}", hint="valohai-fuse status says how the mount is doing") from None
    return {**answer, "path": os.path.abspath(path)}


def _offline(settings: Settings, path: str) -> dict[str, Any]:
    """From inputs.json and the cache. Raises UsageError for a path outside of the inputs directory, ConfigurationError."""
    import trio

    from valohai_fuse.inspection import offline
    from valohai_fuse.sources.manifest_file import list_inputs

    inside = os.path.relpath(os.path.realpath(os.path.abspath(path)), os.path.realpath(settings.inputs_dir))
    top = inside.partition("/")[0]
    if top in {".", ".."}:
        raise mounted_paths.not_ours(path)
    if top not in {summary.name for summary in list_inputs(settings.config_dir)}:
        raise UsageError(
            f"{path} is below no mount, and there is no input {top!r}", hint="valohai-fuse status shows the mounts"
        )
    with offline(settings, (top,)) as facts:
        return trio.run(facts.info, inside)


def _show(answer: dict[str, Any]) -> None:
    size, cached = answer.get("size"), answer.get("cached_bytes")
    output.data(redact(str(answer["path"])))
    if answer.get("type") == "directory":
        unknown = answer.get("files_of_unknown_size")
        output.data(f"  files     {answer.get('files', 0):,}" + (f" ({unknown:,} of unknown size)" if unknown else ""))
    for key, label in _LABELS:
        if answer.get(key):
            output.data(f"  {label:<9} {redact(str(answer[key]))}")
    output.data(f"  size      {output.bytes_shown(size)}" + (f" ({size:,} bytes)" if size else ""))
    if cached is not None:
        share = f" ({cached / size:.0%})" if size else ""
        output.data(
            f"  cached    {output.bytes_shown(cached)}{share}" + (", on the disk" if answer.get("on_disk") else "")
        )
    for entry in answer.get("metadata") or []:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            output.data(f"  metadata  {redact(f'{key}: {value}')}")
