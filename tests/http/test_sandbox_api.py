"""The sandbox's Valohai API: who may ask, what is answered, and each way to fail."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.raw_http import RawAnswer, ranged_get, raw_request
from valohai_fuse.sandbox import Sandbox, SandboxFile, SandboxInput, faults, ramp
from valohai_fuse.sandbox.script import Fault


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    inputs = {
        "data": SandboxInput([SandboxFile("a/x.bin", ramp(1000), metadata=[{"k": 1}, {"l": 2}])], input_id="id-data"),
        "labels": SandboxInput([SandboxFile("y.csv", b"1,2\n")], input_id="id-labels"),
        "config": SandboxInput([SandboxFile("z.yaml", b"a: 1\n", intent="always")], input_id="id-config"),
    }
    with Sandbox(inputs) as running:
        yield running


def post(sandbox: Sandbox, more: str = "", headers: dict[str, str] | None = None) -> RawAnswer:
    """The renewal request as api.json describes it, with `more` behind its URL."""
    said = json.loads(Path(sandbox.config_dir, "api.json").read_text())["input_request"]
    assert said["method"] == "POST"
    return raw_request(said["url"] + more, said["headers"] if headers is None else headers, method="POST")


def names(answer: RawAnswer) -> list[str]:
    return [item["name"] for item in json.loads(answer.body)]


def test_the_answer_has_the_shape_of_the_real_one(sandbox: Sandbox) -> None:
    """All on-demand inputs, with fresh URLs that work."""
    answer = post(sandbox)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    data, labels = json.loads(answer.body)
    assert [labels["name"], len(labels["files"])] == ["labels", 1]
    (file,) = data["files"]
    url = file.pop("url")
    manifest = json.loads(Path(sandbox.config_dir, "inputs.json").read_text())["data"]["files"][0]
    assert file == {
        "filename": "a/x.bin",
        "original_uri": manifest["uri"],
        "input_id": "id-data",
        "metadata": {"k": 1, "l": 2},
        "download_intent": "on-demand",
    }
    assert url != manifest["storage_uri"]
    assert ranged_get(url, 10, 20).body == sandbox.expected_bytes("data", "a/x.bin", 10, 20)


@pytest.mark.parametrize("parameter", ["input", "inputs"])
def test_one_input_can_be_asked_for_by_either_name(sandbox: Sandbox, parameter: str) -> None:
    """`input=` of the documentation, `inputs=` of valohai-utils."""
    assert names(post(sandbox, f"&{parameter}=id-labels")) == ["labels"]
    assert names(post(sandbox, f"&{parameter}=unknown")) == []
    assert names(post(sandbox)) == ["data", "labels"]
    assert sandbox.api.filters == [("id-labels",), ("unknown",), ()]
    assert sandbox.api.renewals() == 3


def test_the_execution_must_be_named_and_the_token_be_right(sandbox: Sandbox) -> None:
    """404 without the execution, 401 without the token, 405 for a GET, 404 elsewhere."""
    said = json.loads(Path(sandbox.config_dir, "api.json").read_text())["input_request"]
    lost = said["url"].partition("?")[0]
    assert raw_request(f"{lost}?input=id-data", said["headers"], method="POST").status == 404
    assert post(sandbox, headers={}).status == 401
    assert post(sandbox, headers={"Authorization": "Execution-Token wrong"}).status == 401
    assert raw_request(said["url"], said["headers"]).status == 405
    assert raw_request(f"{sandbox.api.origin}/else", said["headers"], method="POST").status == 404
    assert json.loads(post(sandbox, headers={}).body) == {"detail": "Invalid execution token."}
    sandbox.api.change_token("other")
    assert post(sandbox).status == 401
    assert sandbox.token not in repr(sandbox.requests)


def test_the_status_detail_is_taken(sandbox: Sandbox) -> None:
    """What is posted for Valohai's web app can be looked at."""
    said = json.loads(Path(sandbox.config_dir, "api.json").read_text())["set_status_detail"]
    body = json.dumps({"status_detail": "mounted"}).encode()
    request = urllib.request.Request(said["url"], body, said["headers"], method="POST")
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200
    assert sandbox.api.status_details == ["mounted"]


def test_it_can_be_slow_and_down(sandbox: Sandbox) -> None:
    """A delay before each answer; refused, and back again."""
    sandbox.api.delay_s = 0.15
    started_s = time.monotonic()
    assert post(sandbox).status == 200
    assert time.monotonic() - started_s >= 0.15
    sandbox.stop_api()
    with pytest.raises(ConnectionRefusedError):
        post(sandbox)
    sandbox.start_api()
    assert post(sandbox).status == 200


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (faults.status(401, '{"detail": "no"}', "application/json"), 401),
        (faults.status(403), 403),
        (faults.status(404), 404),
        (faults.throttled(429, retry_after="1"), 429),
        (faults.internal_error(), 500),
        (faults.bad_gateway(), 502),
        (faults.redirect_to("http://127.0.0.1:1/"), 307),
    ],
)
def test_statuses(sandbox: Sandbox, fault: Fault, status: int) -> None:
    """Each once, then all is well."""
    sandbox.api.faults.add(fault)
    assert post(sandbox).status == status
    assert post(sandbox).status == 200


def test_answers_that_break_off(sandbox: Sandbox) -> None:
    """Half on the wire; half a JSON in a whole response; something else altogether."""
    whole = post(sandbox).body
    sandbox.api.faults.add(faults.half_answer())
    answer = post(sandbox)
    assert (answer.ended, len(answer.body)) == ("closed", len(whole) // 2)
    sandbox.api.faults.add(faults.half_json())
    answer = post(sandbox)
    assert (answer.status, answer.ended, len(answer.body)) == (200, "complete", len(whole) // 2)
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.body)
    sandbox.api.faults.add(faults.answer_is({"unexpected": 1}))
    assert json.loads(post(sandbox).body) == {"unexpected": 1}


def files_of(sandbox: Sandbox, fault: Fault) -> list[dict[str, Any]]:
    sandbox.api.faults.add(fault)
    return [file for item in json.loads(post(sandbox, "&input=id-data").body) for file in item["files"]]


def test_answers_that_are_odd(sandbox: Sandbox) -> None:
    """Without the file; with climbing names; with duplicates of which the last works; with inputs not asked for."""
    assert files_of(sandbox, faults.answer_without("a/x.bin")) == []
    assert [file["filename"] for file in files_of(sandbox, faults.answer_with_dots())] == ["a/x.bin", "../../a/x.bin"]
    twice = files_of(sandbox, faults.answer_with_duplicates())
    assert [ranged_get(file["url"], 0, 1).status for file in twice] == [403, 206]
    assert twice[0]["filename"] == twice[1]["filename"]
    others = files_of(sandbox, faults.answer_with_others())
    assert [file["input_id"] == "id-data" for file in others] == [False, True]
    assert [ranged_get(file["url"], 0, 1).status for file in others] == [403, 206]
