"""The sandbox's Valohai API: the POST of api.json that answers with fresh signed URLs.

Decides who may ask (the execution's token, and the `execution` query must have survived), what the answer holds, and notes
what a test wants to know: how often it was asked, and with which parameter. Invariants: the filter `input=` or `inputs=`
is honoured as Valohai does; without it every input is answered. Signs nothing itself: the caller gives `urls`.
"""

from __future__ import annotations

import hmac
import json
import ssl
import threading
from collections.abc import Callable
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qs

from valohai_fuse.sandbox.dataset import Dataset, Entry
from valohai_fuse.sandbox.http1 import Server
from valohai_fuse.sandbox.messages import Exchange, Request, Response, text_response
from valohai_fuse.sandbox.script import Answer, FaultScript, Situation

INPUT_REQUEST_PATH = "/request-input-data/"
STATUS_DETAIL_PATH = "/set-status-detail/"


class ValohaiApi(Server):
    """Answers `POST /request-input-data/?execution=...`. See Server for starting, stopping and the record.

    `urls` makes a batch of URLs: called once for each answer, its result once for each file. `delay_s` comes before each
    answer and may be changed while it runs.
    """

    def __init__(
        self,
        dataset: Dataset,
        urls: Callable[[], Callable[[Entry], str]],
        clock: Callable[[], float],
        *,
        execution_id: str,
        token: str,
        revoke: Callable[[], None],
        faults: FaultScript | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__("api", self._answer_request, tls)
        self.faults = faults or FaultScript()
        self.delay_s = 0.0
        self.status_details: list[str] = []
        """What was posted to be shown in Valohai's web app."""
        self.filters: list[tuple[str, ...]] = []
        """For each answered renewal the input ids asked for; empty when there was no filter."""
        self._state = threading.Lock()
        self._dataset = dataset
        self._urls = urls
        self._clock = clock
        self._execution_id = execution_id
        self._authorization = f"Execution-Token {token}"
        self._revoke = revoke

    def configuration(self) -> dict[str, Any]:
        """What api.json says."""
        return {
            key: {
                "method": "POST",
                "url": f"{self.origin}{path}?execution={self._execution_id}",
                "headers": {"Authorization": self._authorization},
            }
            for key, path in (("input_request", INPUT_REQUEST_PATH), ("set_status_detail", STATUS_DETAIL_PATH))
        }

    def renewals(self) -> int:
        """How many renewal requests came, whatever became of them."""
        return sum(exchange.path == INPUT_REQUEST_PATH for exchange in self.exchanges())

    def change_token(self, token: str) -> None:
        """The old token is dead from now on, as when an execution has ended."""
        self._authorization = f"Execution-Token {token}"

    def _answer_request(self, request: Request, exchange: Exchange) -> Response:
        response, answer = self._plain_answer(request)
        response.headers["Date"] = formatdate(self._clock(), usegmt=True)
        response.delay_s = self.delay_s
        situation = Situation(
            request=request,
            exchange=exchange,
            server=self,
            revoke=self._revoke,
            now_s=self._clock(),
            answer=answer,
        )
        return self.faults.apply(response, situation)

    def _plain_answer(self, request: Request) -> tuple[Response, Answer | None]:
        if request.path not in {INPUT_REQUEST_PATH, STATUS_DETAIL_PATH}:
            return _detail(404, "Not found."), None
        if request.method != "POST":
            return _detail(405, f'Method "{request.method}" not allowed.'), None
        if not hmac.compare_digest(
            request.headers.get("authorization", "").encode("latin-1"), self._authorization.encode()
        ):
            return _detail(401, "Invalid execution token."), None
        query = parse_qs(request.query)
        if query.get("execution") != [self._execution_id]:
            return _detail(404, "No such execution."), None
        if request.path == STATUS_DETAIL_PATH:
            return self._take_status_detail(request), None
        wanted = tuple(query.get("input", []) + query.get("inputs", []))
        with self._state:
            self.filters.append(wanted)
        answer = self._payload(wanted)
        return text_response(200, json.dumps(answer, ensure_ascii=False), "application/json"), answer

    def _payload(self, wanted: tuple[str, ...]) -> Answer:
        url_of = self._urls()
        answer: Answer = []
        for name, (input_id, entries) in self._dataset.inputs.items():
            files = [_answer_file(entry, url_of(entry)) for entry in entries if entry.file.intent == "on-demand"]
            if files and (not wanted or input_id in wanted):
                answer.append({"name": name, "files": files})
        return answer

    def _take_status_detail(self, request: Request) -> Response:
        try:
            detail = json.loads(request.body)["status_detail"]
        except (ValueError, KeyError, TypeError):
            return _detail(400, "status_detail is required")
        with self._state:
            self.status_details.append(str(detail))
        return text_response(200, "{}", "application/json")


def _answer_file(entry: Entry, url: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for item in entry.file.metadata:
        metadata.update(item)
    return {
        "filename": entry.file.name,
        "original_uri": entry.uri,
        "url": url,
        "input_id": entry.input_id,
        "metadata": metadata,
        "download_intent": entry.file.intent,
    }


def _detail(status: int, text: str) -> Response:
    return text_response(status, json.dumps({"detail": text}), "application/json")
