"""Faults of the API's answer: what it holds, and where it breaks off. Errors of the API stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from valohai_fuse.sandbox.messages import Ending, Response, text_response
from valohai_fuse.sandbox.script import Answer, Fault, Situation


def _on_answer(name: str, change: Callable[[Answer], Any]) -> Fault:
    """Changes what the answer holds; an error of the API stays as it is."""

    def act(response: Response, situation: Situation) -> Response:
        if situation.answer is None or response.status != 200:
            return response
        payload = change(json.loads(json.dumps(situation.answer)))
        answer = text_response(200, json.dumps(payload), "application/json")
        answer.delay_s = response.delay_s
        return answer

    return Fault(name, act)


def answer_is(payload: Any) -> Fault:
    """200 with this JSON, whatever was asked for."""
    return _on_answer("answer_is", lambda _: payload)


def answer_without(filename: str) -> Fault:
    """The answer does not hold the files of that name."""

    def change(answer: Answer) -> Answer:
        for item in answer:
            item["files"] = [file for file in item["files"] if file["filename"] != filename]
        return answer

    return _on_answer("answer_without", change)


def answer_with_dots() -> Fault:
    """Each file is listed once more under a name that climbs out of the input."""

    def change(answer: Answer) -> Answer:
        for item in answer:
            item["files"] += [file | {"filename": f"../../{file['filename']}"} for file in item["files"]]
        return answer

    return _on_answer("answer_with_dots", change)


def answer_with_duplicates() -> Fault:
    """Each file is listed twice; the first has a dead URL. The last counts."""

    def change(answer: Answer) -> Answer:
        for item in answer:
            dead = [file | {"url": urlsplit(file["url"])._replace(query="").geturl()} for file in item["files"]]
            item["files"] = dead + item["files"]
        return answer

    return _on_answer("answer_with_duplicates", change)


def answer_with_others() -> Fault:
    """An input that was not asked for stands first, with the same file names, another input_id and dead URLs."""

    def change(answer: Answer) -> Answer:
        others = [
            {
                "name": f"other-{item['name']}",
                "files": [
                    file
                    | {
                        "input_id": "00000000-0000-4000-8000-000000000000",
                        "original_uri": f"{file['original_uri']}-other",
                        "url": urlsplit(file["url"])._replace(query="").geturl(),
                    }
                    for file in item["files"]
                ],
            }
            for item in answer
        ]
        return others + answer

    return _on_answer("answer_with_others", change)


def half_answer() -> Fault:
    """The connection ends properly in the middle of the JSON."""

    def act(response: Response, _: Situation) -> Response:
        response.cut_after_bytes, response.ending = (response.stop - response.start) // 2, Ending.CLOSE
        return response

    return Fault("half_answer", act)


def half_json() -> Fault:
    """A complete response whose JSON is cut in the middle."""

    def act(response: Response, _: Situation) -> Response:
        response.stop = response.start + (response.stop - response.start) // 2
        response.headers["Content-Length"] = str(response.stop - response.start)
        return response

    return Fault("half_json", act)
