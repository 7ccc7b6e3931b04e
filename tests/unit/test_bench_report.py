"""The report compares fairly and says so when a number is missed; peers and workloads fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from benchmarks import cache, found, report
from benchmarks.dataset import DataFile
from benchmarks.limits import LIMITS
from benchmarks.meters import Traffic
from benchmarks.peers import OURS, PEERS, last_words
from benchmarks.report import best_other, is_far_behind, judge, median, rows
from benchmarks.store import CAPPED, TLS, configuration, listing_pages, signature
from benchmarks.trial import applies, metrics_of
from benchmarks.workloads import COLD, OWN, UNITS, WORKLOADS, Target

_BY_NAME = {w.name: w for w in WORKLOADS}


def _trials(metric: str, **values: list[float]) -> report.Trials:
    return {name.replace("_", "-"): [{metric: v} for v in runs] for name, runs in values.items()}


def test_a_median_forgives_one_bad_run() -> None:
    """That is why there are five."""
    assert median([{"mb_s": v} for v in (1.0, 500.0, 510.0)], "mb_s") == 500
    assert median([{"error": "x"}], "mb_s") is None


def test_who_is_far_behind_is_not_asked_again() -> None:
    """Two rounds of both say so, and only another mount can: not ours, not the local directory, not a download."""
    trials = _trials("elapsed_s", rclone=[5, 4.1], s3fs=[2, 1.9], httpdirfs=[9], curl=[0.1, 0.1], requests=[4.1, 4.1])
    trials |= _trials("elapsed_s", valohai_fuse=[0.1, 0.1], plain=[0.1, 0.1]) | {"rclone-full": [{"error": "x"}] * 2}
    assert {name for name in trials if is_far_behind(trials, name)} == {"rclone", "requests"}
    trials["rclone"].append({"elapsed_s": 4.0})
    assert not is_far_behind(trials, "rclone"), "twice as long is not more than twice"


def test_best_is_the_best_other_mount() -> None:
    """Not ours, not a download, not the plain directory; less is better for times."""
    trials = _trials("mb_s", valohai_fuse=[900], rclone=[300], httpdirfs=[250], curl=[600], plain=[5000])
    assert best_other(trials, "mb_s") == ("rclone", 300)
    assert best_other(_trials("p50_ms", rclone=[30], httpdirfs=[21], valohai_fuse=[1]), "p50_ms") == ("httpdirfs", 21)
    assert best_other(_trials("mb_s", valohai_fuse=[900]), "mb_s") is None


@pytest.mark.parametrize(("measured", "reached"), [(600, True), (599, False)])
def test_a_ratio_is_reached_or_missed(measured: float, reached: bool) -> None:
    """Two times 300 is 600 and nothing less."""
    verdict = judge(Target("mb_s", 2.0, "best"), _trials("mb_s", valohai_fuse=[measured], rclone=[300]))
    assert verdict.reached is reached
    assert verdict.measured == f"{measured / 300:.2f} x rclone"


def test_at_most_is_the_other_way_round() -> None:
    """For what should be little."""
    trials = _trials("cpu_s_gib", valohai_fuse=[2.4], rclone=[1.0], rclone_full=[4.3], httpdirfs=[4.1])
    verdict = judge(Target("cpu_s_gib", 0.6, "leanest cache"), trials)
    assert verdict.measured == "0.59 x httpdirfs"
    assert verdict.reached is True
    assert judge(Target("p50_ms", 25), _trials("p50_ms", valohai_fuse=[26])).reached is False
    assert judge(Target("p50_ms", 25), _trials("p50_ms", rclone=[20])).reached is None


def test_one_workload_of_ours_may_be_the_measure_of_another() -> None:
    """Never another peer's, and nothing where that workload has not been measured."""
    target = Target("mb_s", 0.8, f"{OWN}seq-region")
    trials = _trials("mb_s", valohai_fuse=[900], rclone=[1200])
    verdict = judge(target, trials, {"seq-region": _trials("mb_s", valohai_fuse=[1000], rclone=[2000])})
    assert (verdict.measured, verdict.reached) == ("0.90 x own seq-region", True)
    assert judge(target, trials, {"seq-region": _trials("mb_s", rclone=[2000])}).reached is None


def test_failures_are_shown_with_their_reason() -> None:
    """A peer that cannot do a thing is a result too, and does not become the best."""
    workload = _BY_NAME["seq-region"]
    trials: report.Trials = {"rclone": [{"error": "hung"}], "httpdirfs": [{"mb_s": 175.0}, {"error": "once"}]}
    _, lines, failed = rows(workload, trials)
    assert [line[:2] for line in lines] == [["httpdirfs (1 failed)", "175"]]
    assert failed == ["rclone failed: hung"]


def test_what_was_missed_is_shown_with_its_reason_and_what_the_processors_allow() -> None:
    """Two processors and 1 CPU s per GiB in all: 2,147 MB/s; 0.4 s of it are ours and above the floor."""
    results = _results({"valohai-fuse": [{"mb_s": 500.0}], "rclone": [{"mb_s": 310.0}], "plain": [{"mb_s": 5000.0}]})
    daemon = {"kernel: sockets": 0.3, "Python and extensions": 0.4}
    results["machine"] = "2 cores of something"
    results["profiles"] = {
        "seq-region": {OURS: {"date": "d", "unit": "GiB", "shares": {"daemon": daemon, "reader": {"other": 0.3}}}}
    }
    page = report.page(results)
    assert "| `seq-region` | MB/s at least 2 x best (has 1.61 x rclone) | 2,147 MB/s | 3,579 MB/s | 5,000 |" in page
    assert f"- `seq-region`: {LIMITS['seq-region']}" in page
    results["workloads"]["seq-region"]["trials"]["valohai-fuse"] = [{"mb_s": 650.0}]
    assert "What was not reached" not in report.page(results)


def test_the_page_has_a_reason_for_whatever_it_says_was_missed() -> None:
    results = json.loads((Path(__file__).resolve().parents[2] / "docs" / "benchmarks.json").read_text())
    for name, entry in results["workloads"].items():
        if any(judge(target, entry["trials"]).reached is False for target in _BY_NAME[name].targets):
            assert LIMITS[name].strip(), name
    assert set(LIMITS) <= set(_BY_NAME)


def test_trials_of_another_day_say_so() -> None:
    results = _results({"valohai-fuse": [{"mb_s": 500.0}], "rclone": [{"mb_s": 310.0}]})
    entry = results["workloads"]["seq-region"]
    entry |= {"date": "2026-11-29", "dates": {"valohai-fuse": "2026-11-29", "rclone": "2026-11-27"}}
    assert "rounds, 2026-11-29; rclone: 2026-11-27.\n" in report.page(results)


def test_the_page_and_the_picture_are_made_of_the_results_alone(tmp_path: Path) -> None:
    """Rows, verdicts, versions, commands; the picture is well-formed; the numbers are kept beside them."""
    results = _results({"valohai-fuse": [{"mb_s": 650.0}], "rclone": [{"mb_s": 310.0}], "curl": [{"mb_s": 552.0}]})
    results["cache"] = {"date": "2026-11-26", "rows": [["landing", "20,000 /s", "> 5,000 /s"]]}
    written = report.write(results, tmp_path / "docs")
    page = written[0].read_text()
    assert "| valohai-fuse | 650 |" in page
    assert "| `seq-region` | MB/s at least 2 x best | 2.10 x rclone | yes |" in page
    assert "rclone v1" in page
    assert "| landing | 20,000 /s | > 5,000 /s |" in page
    bars = ET.fromstring(written[1].read_text()).findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 3
    assert json.loads(written[2].read_text()) == results


def _results(trials: report.Trials) -> dict[str, Any]:
    return {
        "machine": "2 cores",
        "versions": {"rclone": "rclone v1"},
        "commands": {"rclone": "rclone mount"},
        "workloads": {"seq-region": {"date": "2026-01-01", "trials": trials}},
    }


def test_every_metric_and_peer_that_is_named_exists() -> None:
    """A misspelt target would be silently unreached for ever."""
    names = (
        {peer.name for peer in PEERS}
        | {"best", "leanest cache", None}
        | {OWN + workload.name for workload in WORKLOADS}
    )
    for workload in WORKLOADS:
        assert workload.metric in UNITS
        for target in workload.targets:
            assert target.metric in UNITS, workload.name
            assert target.versus in names, workload.name
    assert len(_BY_NAME) == len(WORKLOADS)


def test_every_peer_has_work_and_ours_has_all() -> None:
    """Downloads do whole files only; the plain directory is never cold, names excepted."""
    for peer in PEERS:
        assert any(applies(w, peer) for w in WORKLOADS), peer.name
    ours, plain, curl = (next(p for p in PEERS if p.name == name) for name in (OURS, "plain", "curl"))
    assert all(applies(w, ours) for w in WORKLOADS)
    assert {w.name for w in WORKLOADS if w.state == COLD and applies(w, plain)} == {"find-cold", "ls-cold"}
    assert not applies(_BY_NAME["random-4k-1"], curl)


def test_a_trial_counts_what_was_fetched_per_byte_and_per_read() -> None:
    """From one answer of the reader and the store's log."""
    answer = {"elapsed_s": 2.0, "bytes": 8192, "files": 1, "cpu_s": 0.1, "latencies_s": [0.5, 1.5]}
    metrics = metrics_of(answer, Traffic(2, 1, 16384, 0), cpu_s=0.3, peak_bytes=2**21)
    assert metrics["amplification"] == 2
    assert metrics["fetched_per_read_kib"] == 8
    assert (metrics["p50_ms"], metrics["p99_ms"], metrics["reads_s"], metrics["pss_mib"]) == (500, 1500, 1, 2)


def test_signatures_are_nginx_s() -> None:
    """md5("<expires><path> <secret>"), base64url, unpadded; depends on both."""
    assert signature("/signed/a", 1) != signature("/signed/a", 2)
    assert signature("/signed/a", 1) != signature("/signed/b", 1)
    assert not set(signature("/signed/a", 1)) & set("+/=")


def test_the_store_s_log_holds_no_query(tmp_path: Path) -> None:
    """Neither the request line nor the arguments are logged; caps and TLS are in their own profile only."""
    text = configuration(tmp_path, tmp_path, dict.fromkeys(("near", "region", "far", "capped", "tls"), 1), 2)
    logged = next(line for line in text.splitlines() if "log_format" in line)
    assert not any(field in logged for field in ("$request ", "$request'", "$args", "$request_uri", "$query"))
    assert text.count("limit_rate 80000000;") == 1
    assert text.count("ssl_certificate ") == 1
    assert CAPPED.text == "20 ms, 80 MB/s per connection"
    assert TLS.text == "20 ms, TLS"


def test_the_store_lists_buckets_page_by_page() -> None:
    """Each page begins behind the name that the one before gave as the next marker; together they name each file once."""
    files = [DataFile("names", f"{number:06}.bin", 100 + number, None) for number in range(2500)]
    pages = dict(listing_pages("names", files))
    marker, found = "", list[tuple[str, int]]()
    while True:
        page = ET.fromstring(pages.pop(marker))
        space = page.tag.removesuffix("ListBucketResult")
        assert page.findtext(f"{space}Marker") == marker
        for entry in page.iter(f"{space}Contents"):
            name = entry.findtext(f"{space}Key") or ""
            assert name > marker
            found.append((name, int(entry.findtext(f"{space}Size") or -1)))
        if page.findtext(f"{space}IsTruncated") == "false":
            break
        marker = page.findtext(f"{space}NextMarker") or ""
    assert not pages
    assert found == [(file.name, file.size) for file in files]
    assert [marker for marker, _ in listing_pages("empty", [])] == [""]


def test_a_peer_s_last_words_hold_no_query(tmp_path: Path) -> None:
    """What a peer says goes into the report, its signed URLs do not."""
    log = tmp_path / "peer.log"
    log.write_text("curl: (22) http://127.0.0.1/x?md5=secret&expires=1 refused\n")
    assert last_words(log) == "curl: (22) http://127.0.0.1/x?... refused"


def test_any_directory_can_be_a_target(tmp_path: Path) -> None:
    """Workloads take what there is and leave out what there is nothing for."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "large.bin").write_bytes(bytes(2 << 20))
    (tmp_path / "small.txt").write_bytes(b"x")
    selection = found.below(tmp_path, reads=10)
    assert [f.path for f in selection.big] == ["./sub/large.bin"]
    assert [f.path for f in selection.small] == ["./small.txt"]
    assert selection.name_count == 2
    assert found.suits(_BY_NAME["seq-region"], selection)
    assert not found.suits(_BY_NAME["zip-random"], selection)
    assert not found.suits(_BY_NAME["first-byte"], selection)


def test_what_is_read_of_a_target_is_told_by_its_own_sizes(tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(3 << 19))
    selection = found.below(tmp_path, reads=10)
    titles = {
        name: found.title(_BY_NAME[name], selection) for name in ("seq-region", "stride", "random-4k-8", "find-warm")
    }
    assert titles == {
        "seq-region": "forward in pieces of 1,024 KiB, 1 file of 1.5 MiB in all",
        "stride": "forward in pieces of 128 KiB, one of every 4,096 KiB, 1 file of 1.5 MiB in all",
        "random-4k-8": "random in pieces of 4 KiB, 8 threads, 1 file of 1.5 MiB in all",
        "find-warm": "find, 1 file",
    }


def test_the_bench_of_the_cache_runs_and_keeps_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With tiny sizes: no figure is worth anything, but all are there, and other results stay."""
    kept = tmp_path / "results.json"
    kept.write_text('{"workloads": {"x": 1}}')
    assert cache.main(["--quick", "--write", f"--dir={tmp_path}"], kept) == 0
    results = json.loads(kept.read_text())
    assert results["workloads"] == {"x": 1}
    shown = capsys.readouterr().out
    assert len(results["cache"]["rows"]) >= 14
    assert all(what in shown and figure in shown for what, figure, _ in results["cache"]["rows"])
    assert list(tmp_path.iterdir()) == [kept]
