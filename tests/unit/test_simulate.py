"""The simulator: what arithmetic says, on traces for which arithmetic can; and every command that the documentation shows."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import simulate, traces
from benchmarks.simulation import Line, Outcome, Simulation
from benchmarks.traces import MADE, Read, Trace

from support.engine_rig import EngineRig, run
from valohai_fuse.model.readahead import FIRST_READ_BYTES, RANDOM_READ_BYTES
from valohai_fuse.settings import resolve

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024


def outcome(trace: Trace, **line: float) -> Outcome:
    """What the trace comes to on a line like this."""
    return Simulation(trace, Line(**line)).run()  # type: ignore[arg-type]  # the sizes are integers all the same


def sequential(megabytes: int) -> Trace:
    return [Read(1, at * MIB, MIB, overlaps=at > 0) for at in range(megabytes)]


def test_a_long_stream_takes_what_the_line_takes() -> None:
    """Bytes over bandwidth, and beyond that no more than the round trips in which the window grows."""
    result = outcome(sequential(1024), latency_s=0.020, bytes_s=200e6)
    ideal_s = 1024 * MIB / 200e6
    assert ideal_s < result.elapsed_s < ideal_s + 10 * 0.020
    assert result.fetched_bytes == result.read_bytes == 1024 * MIB


def test_slow_connections_are_many() -> None:
    """A stream over connections of 80 MB/s keeps 24 of them busy, not the 12 of whole segments: 1.54 s it took then."""
    result = outcome(sequential(1024), latency_s=0.020, bytes_s=1.2e9, connection_bytes_s=80e6)
    assert result.elapsed_s < 1.25
    assert 20 <= result.connections <= 26


def test_one_random_read_takes_a_round_trip_and_its_bytes() -> None:
    """On a new connection two; on one that is kept, one."""
    reads = [Read(1, 100 * MIB, 4096, file_bytes=200 * MIB), Read(1, 30 * MIB, 4096, file_bytes=200 * MIB)]
    result = outcome(reads, latency_s=0.1, bytes_s=RANDOM_READ_BYTES)
    # The answer brings a block more than was asked for; nobody waits for that.
    first_s = 2 * 0.1 + 0.5
    # The second block of the first answer still takes its connection, so that the second one begins a new one as well,
    # and shares the line with the 0.3 s that are left of it then.
    assert result.elapsed_s == pytest.approx(first_s + 2 * 0.1 + 0.5 + 0.3, abs=0.01)
    assert result.connections == 2
    assert result.gets == 2
    assert result.fetched_bytes == 2 * RANDOM_READ_BYTES


def test_a_connection_has_a_rate_of_its_own() -> None:
    """The first MiB comes over one connection; together they are no faster than the line."""
    capped = outcome([Read(1, 0, MIB)], latency_s=0, bytes_s=1e9, connection_bytes_s=1e6)
    assert capped.elapsed_s == pytest.approx(MIB / 1e6)
    together = outcome(sequential(256), latency_s=0, bytes_s=40e6, connection_bytes_s=10e6)
    assert together.elapsed_s >= 256 * MIB / 40e6


def test_one_connection_serves_one_after_the_other() -> None:
    reads = [Read(handle, 100 * MIB, 4096, file_bytes=200 * MIB) for handle in (1, 2, 3)]
    result = outcome(reads, latency_s=1, bytes_s=1e12, connections=1)
    assert result.elapsed_s == pytest.approx(2 + 1 + 1, abs=0.01)
    assert result.connections == 1
    assert outcome(reads, latency_s=1, bytes_s=1e12).elapsed_s == pytest.approx(2, abs=0.01)


def test_handles_of_one_file_share_what_was_fetched() -> None:
    reads = [Read(handle, 0, MIB, file="a") for handle in (1, 2, 3)]
    assert outcome(reads).gets == 1
    assert outcome(reads).fetched_bytes == MIB


def test_thinking_is_time_in_which_things_come() -> None:
    """A program slower than its store waits for the first bytes only."""
    slow = [Read(1, at * MIB, MIB, think_s=0.2) for at in range(32)]
    result = outcome(slow, latency_s=0.02, bytes_s=100e6)
    assert result.elapsed_s == pytest.approx(32 * 0.2 + result.stalled_s)
    assert result.stalled_s < 0.2


def test_closing_cancels_what_nobody_needs() -> None:
    """`head` fetches a MiB, and a stream that stops does not bring its whole window."""
    assert outcome([Read(1, 0, 16384, file_bytes=1024 * MIB)]).fetched_bytes == FIRST_READ_BYTES
    stopped = [Read(1, at * MIB, MIB, file_bytes=1024 * MIB) for at in range(16)]
    assert outcome(stopped).fetched_bytes <= 32 * MIB


def test_what_is_read_at_random_is_completed_as_in_a_mount() -> None:
    """2,000 random reads profit, no byte comes twice, and one pass over a column costs what it cost."""
    trace = MADE["random-4k"][1]()
    with_fill, without = outcome(trace), outcome(trace, fill_bytes=0)
    assert with_fill.elapsed_s < without.elapsed_s / 3
    assert without.fetched_bytes < with_fill.fetched_bytes <= 513 * MIB
    assert with_fill.p99_s < 2 * without.p99_s
    assert outcome(MADE["column-scan"][1]()) == outcome(MADE["column-scan"][1](), fill_bytes=0)


@pytest.mark.parametrize("name", MADE)
def test_every_made_trace_is_the_same_each_time_and_runs(name: str) -> None:
    trace = MADE[name][1]()
    assert trace == MADE[name][1]()
    result = outcome(trace, latency_s=0.02, bytes_s=600e6)
    assert result == outcome(trace, latency_s=0.02, bytes_s=600e6)
    assert result.gets > 0
    assert 0 < result.stalled_s <= result.elapsed_s * len({read.handle for read in trace})


def test_a_trace_survives_being_written(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(traces.dump(MADE["zip"][1]()))
    assert traces.load(file) == MADE["zip"][1]()


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        '{"handle": 1}',
        '{"handle": 1, "offset": -1, "size": 1}',
        '{"handle": 1, "offset": 0.5, "size": 1}',
        '{"handle": 1, "offset": 9, "size": 1, "file_bytes": 9}',
        '{"handle": 1, "offset": 0, "size": 1, "think_s": Infinity}',
        "[]",
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"handle": 1, "offset": 0, "size": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"trace.jsonl:2: not a read"):
        traces.load(file)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="no reads in it"):
        traces.load(tmp_path / "empty")


def test_a_log_is_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    """What the engine says at DEBUG of the reads of two handles is read back as just those reads."""

    async def scenario(rig: EngineRig) -> None:
        first, second = rig.open("a"), rig.open("a")
        await rig.read(first, 0, 16384)
        await rig.read(second, 9 * MIB, 4096)
        await rig.read(first, 16384, 32768)

    with caplog.at_level(logging.DEBUG, logger="valohai_fuse.engine.reader"):
        run(scenario, {"a": 20 * MIB})
    lines = [
        f"2026-11-23T10:11:12.345Z DEBUG train {record.name.removeprefix('valohai_fuse.')}: {record.getMessage()}"
        for record in caplog.records
    ]
    trace = traces.recorded(["something else", *lines])
    assert [(read.handle, read.offset, read.size) for read in trace] == [
        (1, 0, 16384),
        (2, 9 * MIB, 4096),
        (1, 16384, 32768),
    ]
    assert len({read.file for read in trace}) == 1
    assert {read.file_bytes for read in trace} == {20 * MIB}


def test_thinking_and_overlapping_are_read_off_the_clock() -> None:
    """Of three reads the second is asked for before the first is answered, the third half a second after the second."""
    head = "2026-11-23T10:11:12.345Z DEBUG train engine.reader: read handle=7 file=3"
    lines = [
        f"{head} offset=0 size=10 of=100 at=5.000000 took=1.000000",
        f"{head} offset=20 size=10 of=100 at=8.000000 took=0.100000",
        f"{head} offset=10 size=10 of=100 at=5.500000 took=2.000000",
    ]
    first, second, third = traces.recorded(lines)
    assert (first.offset, first.think_s, first.overlaps) == (0, 0, False)
    assert (second.offset, second.overlaps) == (10, True)
    assert (third.offset, third.overlaps) == (20, False)
    assert third.think_s == pytest.approx(0.5)


def test_a_log_of_several_mounts_keeps_them_apart() -> None:
    """Two inputs at once have handles of the same number and clocks of their own; of an earlier mount nothing is left."""

    def said(subject: str, at_s: float, offset: int) -> str:
        what = f"read handle=1 file=3 offset={offset} size=10 of=100 at={at_s:.6f} took=0.5"
        return f"2026-11-23T10:11:12.345Z DEBUG {subject} engine.reader: {what}"

    mounted = "2026-11-23T10:11:10.000Z INFO train daemon: mounted at /valohai/inputs/train: 1 files, 100 bytes"
    lines = [said("train", 9000, 90), mounted, said("train", 5, 0), said("test", 700, 10), said("train", 6, 20)]
    trace = traces.recorded(lines)
    assert [(read.offset, read.think_s) for read in trace] == [(0, 0), (10, 0), (20, 0.5)]
    first, second, third = trace
    assert first.handle == third.handle != second.handle
    assert first.file == third.file != second.file


def test_the_line_has_the_settings_defaults() -> None:
    defaults = resolve({}, {})
    line = Line()
    assert (line.connections, line.window_bytes, line.window_bytes_total, line.fill_bytes) == (
        defaults.connections,
        defaults.readahead,
        defaults.readahead_total,
        defaults.background_fill,
    )


def documented() -> list[str]:
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/operating.md"))
    return re.findall(r"^(scripts/simulate.*)$", pages, re.MULTILINE)


def test_there_are_documented_commands() -> None:
    assert len(documented()) >= 2


@pytest.mark.parametrize("command", documented())
def test_documented_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, through the script, in a directory that holds the log that they name."""
    (tmp_path / "train.log").write_text(
        "2026-11-23T10:11:12.345Z DEBUG train engine.reader: read handle=1 file=3 offset=0 size=10 of=99 at=5.0 took=1.0\n"
    )
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHON", sys.executable)
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2


def test_the_command_line_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no such trace: frobnicate"):
        simulate.main(["frobnicate"])
    with pytest.raises(SystemExit, match="without bandwidth"):
        simulate.main(["head", "--mb-s", "0"])
    for wrong in (["--window", "many"], ["--latency-ms", "inf"], ["--latency-ms", "-1"]):
        with pytest.raises(SystemExit):
            simulate.main(["head", *wrong])
    assert "not a size" in capsys.readouterr().err
    assert simulate.main(["head", "--dump"]) == 0
    assert json.loads(capsys.readouterr().out)["file_bytes"] == 1024 * MIB
    assert math.isinf(Line().connection_bytes_s)
