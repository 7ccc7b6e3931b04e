"""What `doctor` finds out there: API, token, store, clock, disk; with the sandbox as the world outside."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.mounts import run_cli
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.valohai import Sandbox

DATA = {"large": {f"{n}.bin": ramp(1000) for n in range(20)}, "small": {"s.bin": ramp(1000)}}
NETWORK = {"api", "store", "clock"}


def findings(sandbox: Sandbox, *options: str) -> dict[str, dict[str, Any]]:
    """The findings by check; every one of them has words, and none a secret."""
    outcome = run_cli(
        "doctor",
        f"--config-dir={sandbox.config_dir}",
        f"--inputs-dir={sandbox.inputs_dir}",
        f"--cache-dir={sandbox.root}/cache",
        "--json",
        *options,
    )
    assert sandbox.token not in outcome.stdout
    assert "Signature" not in outcome.stdout
    assert outcome.stderr == ""
    found = {one["check"]: one for one in json.loads(outcome.stdout)}
    fails = [one for one in found.values() if one["verdict"] == "FAIL" and one["check"] in NETWORK]
    assert not fails or outcome.returncode > 0
    return found


def verdicts(found: dict[str, dict[str, Any]], checks: Sequence[str] = ("api", "store", "clock")) -> list[str]:
    return [found[check]["verdict"] if check in found else "-" for check in checks]


def test_doctor_asks_api_and_store_once(own_directories: Path) -> None:
    """One renewal of the smallest input and one byte of it; --offline asks nobody."""
    with Sandbox(DATA, root=own_directories / "valohai") as sandbox:
        assert not NETWORK & set(findings(sandbox, "--offline"))
        assert sandbox.store.sent_bytes() == 0
        found = findings(sandbox)
        assert verdicts(found) == ["ok", "ok", "ok"]
        assert sandbox.store.sent_bytes() == sandbox.store.sent_bytes("small/*") == 1
        assert "first byte" in found["store"]["message"]


def test_doctor_tells_a_dead_token(own_directories: Path) -> None:
    """API refused: with what the token is; the URLs of inputs.json are tried all the same."""
    with Sandbox(DATA, root=own_directories / "valohai") as sandbox:
        sandbox.api.faults.add(faults.status(401), count=None)
        found = findings(sandbox)
        assert verdicts(found) == ["FAIL", "ok", "ok"]
        assert "only while the execution runs" in found["api"]["hint"]


def test_doctor_tells_an_expired_url_that_nobody_renews(own_directories: Path) -> None:
    with Sandbox(
        DATA, root=own_directories / "valohai", url_lifetime_s=60, manifest_age_s=600, api_json=False
    ) as sandbox:
        found = findings(sandbox)
        assert found["store"]["verdict"] == "FAIL"
        assert "expired 9 minutes ago" in found["store"]["hint"]
        assert found["api.json"]["verdict"] == "warn"


def test_doctor_tells_what_is_out_of_reach(own_directories: Path) -> None:
    """An API that fails and a store that hangs up: both are named, without a query, and why is guessed at."""
    with Sandbox(DATA, root=own_directories / "valohai") as sandbox:
        sandbox.api.faults.add(faults.internal_error(), count=None)
        sandbox.store.faults.add(faults.hang_up(), count=None)
        found = findings(sandbox)
        assert verdicts(found, ("api", "store")) == ["FAIL", "FAIL"]
        assert "HTTP 500" in found["api"]["message"]
        assert "127.0.0.1" in found["store"]["message"]
        assert "firewall" in found["store"]["hint"]


def test_doctor_tells_a_real_denial(own_directories: Path) -> None:
    """A fresh URL that is refused is not a matter of expiry."""
    with Sandbox(DATA, root=own_directories / "valohai") as sandbox:
        sandbox.store.faults.add(faults.denied(), count=None)
        found = findings(sandbox)
        assert found["store"]["verdict"] == "FAIL"
        assert "may not read" in found["store"]["hint"]


@pytest.mark.parametrize(("skew_s", "words"), [(3600.0, "behind"), (-3600.0, "ahead of")])
def test_doctor_tells_a_wrong_clock(own_directories: Path, skew_s: float, words: str) -> None:
    with Sandbox(DATA, root=own_directories / "valohai", clock_skew_s=skew_s) as sandbox:
        found = findings(sandbox)
        assert found["clock"]["verdict"] == "warn"
        assert words in found["clock"]["message"]
        said_s = re.search(r"is (\d+) s", found["clock"]["message"])
        assert said_s is not None
        assert abs(int(said_s[1]) - abs(skew_s)) <= 10, "a busy machine may take a while between two clocks"


def test_doctor_tells_a_disk_without_room(own_directories: Path) -> None:
    """Less than --cache-min-free is free: the cache would stay empty."""
    with Sandbox(DATA, root=own_directories / "valohai") as sandbox:
        assert findings(sandbox, "--offline", "--cache-min-free=0")["cache directory"]["verdict"] == "ok"
        full = findings(sandbox, "--offline", "--cache-min-free=1000T")["cache directory"]
        assert full["verdict"] == "warn"
        assert "may take 0 B" in full["message"]
