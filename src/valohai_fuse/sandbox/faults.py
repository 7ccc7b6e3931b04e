"""The kinds of fault: functions that make them, named by what happens on the wire.

Those on the connection, statuses and redirects serve both servers; those that answer wrongly are for objects; `answer_...`
and `half_...` change what the API says. `FAULTS` names them all, for whoever controls a sandbox by JSON. When a fault
happens is said by `FaultScript.add`. No fault says anything of the client's reaction: that is the tests' business.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from valohai_fuse.sandbox.content import Content, InMemory, Ramp, read_all
from valohai_fuse.sandbox.messages import Ending, Response, text_response
from valohai_fuse.sandbox.script import Answer, Fault, Situation
from valohai_fuse.sandbox.signing import access_denied_xml, form_of, refusal


def _changed(name: str, **fields: Any) -> Fault:
    def act(response: Response, _: Situation) -> Response:
        for key, value in fields.items():
            setattr(response, key, value)
        return response

    return Fault(name, act)


# --- the connection ---------------------------------------------------------------------------------------------------


def refuse_connections(seconds: float) -> Fault:
    """This request is reset without an answer, and for so long nobody can connect."""

    def act(response: Response, situation: Situation) -> Response:
        situation.server.refuse_for(seconds)
        response.silent, response.ending = True, Ending.RESET
        return response

    return Fault("refuse_connections", act)


def hang_up() -> Fault:
    """The connection is closed without an answer, as an idle one that the server has forgotten."""
    return _changed("hang_up", silent=True, ending=Ending.CLOSE)


def reset_after(body_bytes: int) -> Fault:
    """RST after so many bytes of the body (0: after the head)."""
    return _changed("reset_after", cut_after_bytes=body_bytes, ending=Ending.RESET)


def truncate_after(body_bytes: int) -> Fault:
    """The connection ends properly after so many bytes, fewer than Content-Length says."""
    return _changed("truncate_after", cut_after_bytes=body_bytes, ending=Ending.CLOSE)


def stall_after(body_bytes: int, seconds: float | None = None) -> Fault:
    """After so many bytes nothing comes, for ever or for so long."""
    return (
        _changed("stall_after", cut_after_bytes=body_bytes, ending=Ending.STALL, resume_after_s=seconds)
        if (seconds is None)
        else _changed("stall_after", cut_after_bytes=body_bytes, resume_after_s=seconds)
    )


def no_answer() -> Fault:
    """The request is taken and never answered."""
    return _changed("no_answer", silent=True, ending=Ending.STALL)


def delay(seconds: float) -> Fault:
    """The right answer, late."""

    def act(response: Response, _: Situation) -> Response:
        response.delay_s += seconds
        return response

    return Fault("delay", act)


def drip(piece_bytes: int, pause_s: float) -> Fault:
    """The right answer, a little at a time."""
    return _changed("drip", piece_bytes=piece_bytes, piece_pause_s=pause_s)


def close_after() -> Fault:
    """The right answer, after which the connection is closed although it was not announced."""
    return _changed("close_after", ending=Ending.CLOSE)


# --- statuses ---------------------------------------------------------------------------------------------------------


def status(code: int, body: str = "", content_type: str = "application/xml", retry_after: str | None = None) -> Fault:
    """This status and body instead of the answer; `retry_after` (seconds or an HTTP date) as its header."""

    def act(response: Response, _: Situation) -> Response:
        answer = text_response(code, body, content_type)
        if "Date" in response.headers:
            answer.headers["Date"] = response.headers["Date"]
        if retry_after is not None:
            answer.headers["Retry-After"] = retry_after
        answer.delay_s = response.delay_s
        return answer

    return Fault(f"status_{code}", act)


def expired() -> Fault:
    """Refused as if the URL's lifetime were over, in the words of its form (400, 401 or 403)."""

    def act(_: Response, situation: Situation) -> Response:
        said = refusal(form_of(situation.request.query), "expired", situation.now_s)
        return text_response(said.status, said.body, said.content_type)

    return Fault("expired", act)


def denied(code: int = 403) -> Fault:
    """A real denial: the signature is in order, the object is not for you."""
    return Fault("denied", status(code, access_denied_xml()).act)


def throttled(code: int = 503, retry_after: str | None = None) -> Fault:
    """429 or 503 SlowDown, with or without Retry-After."""
    return Fault("throttled", status(code, "<Error><Code>SlowDown</Code></Error>", retry_after=retry_after).act)


def bad_gateway() -> Fault:
    """502 with a proxy's HTML page."""
    page = "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"
    return Fault("bad_gateway", status(502, page, "text/html").act)


def internal_error() -> Fault:
    """500 with an HTML page."""
    page = "<html><body><h1>Server Error (500)</h1></body></html>\n"
    return Fault("internal_error", status(500, page, "text/html; charset=utf-8").act)


# --- redirects --------------------------------------------------------------------------------------------------------


def redirect_to(location: str, code: int = 307) -> Fault:
    """A redirect to a URL as it stands: `file:///etc/passwd`, for example."""

    def act(_: Response, __: Situation) -> Response:
        answer = text_response(code, b"")
        answer.headers["Location"] = location
        return answer

    return Fault("redirect_to", act)


def redirect_loop(code: int = 307) -> Fault:
    """A redirect to the very URL that was asked for."""

    def act(_: Response, situation: Situation) -> Response:
        answer = text_response(code, b"")
        answer.headers["Location"] = situation.request.target
        return answer

    return Fault("redirect_loop", act)


def redirect_elsewhere(origin: str, code: int = 307) -> Fault:
    """A redirect to the same path and query at another origin (`Sandbox.elsewhere.origin`)."""

    def act(_: Response, situation: Situation) -> Response:
        answer = text_response(code, b"")
        answer.headers["Location"] = origin + situation.request.target
        return answer

    return Fault("redirect_elsewhere", act)


# --- objects: an answer that is wrong ---------------------------------------------------------------------------------


def _on_object(name: str, act: Callable[[Response, Content], Response]) -> Fault:
    """Only where the store would have given (a part of) the object; other answers stay as they are."""

    def guarded(response: Response, situation: Situation) -> Response:
        if situation.content is None or response.status not in {200, 206}:
            return response
        return act(response, situation.content)

    return Fault(name, guarded)


def ignore_range() -> Fault:
    """200 and the whole object from byte 0, whatever range was asked for."""

    def act(response: Response, content: Content) -> Response:
        response.status, response.start, response.stop = 200, 0, content.size
        response.headers.pop("Content-Range", None)
        response.headers["Content-Length"] = str(content.size)
        return response

    return _on_object("ignore_range", act)


def wrong_range_start(shift_bytes: int = 1) -> Fault:
    """206 whose Content-Range and body start elsewhere; the length is as asked for."""

    def act(response: Response, content: Content) -> Response:
        start, stop = response.start + shift_bytes, response.stop + shift_bytes
        if start < 0 or stop > content.size:  # at an edge of the object the other neighbour is still wrong
            start, stop = response.start - shift_bytes, response.stop - shift_bytes
        if start < 0 or stop > content.size:  # the range is the object: only the header can lie
            start, stop = response.start, response.stop
        response.headers["Content-Range"] = (
            f"bytes {response.start + shift_bytes}-{response.stop + shift_bytes - 1}/{content.size}"
            if start == response.start
            else f"bytes {start}-{stop - 1}/{content.size}"
        )
        response.start, response.stop = start, stop
        return response

    return _on_object("wrong_range_start", act)


def wrong_range_total(delta_bytes: int = 1) -> Fault:
    """206 whose Content-Range gives another size of the object."""

    def act(response: Response, content: Content) -> Response:
        total = content.size + delta_bytes
        response.headers["Content-Range"] = f"bytes {response.start}-{response.stop - 1}/{total}"
        return response

    return _on_object("wrong_range_total", act)


def no_content_range() -> Fault:
    """206 that does not say which range it holds."""

    def act(response: Response, _: Content) -> Response:
        response.headers.pop("Content-Range", None)
        return response

    return _on_object("no_content_range", act)


def changed_etag(version: str = "changed") -> Fault:
    """The same bytes under another ETag."""

    def act(response: Response, _: Content) -> Response:
        response.headers["ETag"] = f'"{version}"'
        return response

    return _on_object("changed_etag", act)


def changed_content(*, same_etag: bool = False) -> Fault:
    """Other bytes of the same size (each one more than it was, at a ramp), under another ETag unless `same_etag`."""

    def act(response: Response, content: Content) -> Response:
        other = _shifted(content, response)
        response.content = other
        if not same_etag:
            response.headers["ETag"] = f'"{content.version}-changed"'
        return response

    return _on_object("changed_content", act)


def _shifted(content: Content, response: Response) -> Content:
    if isinstance(content, Ramp):
        return Ramp(content.size, content.shift + 1)
    table = bytes((value + 1) % 256 for value in range(256))
    data = read_all(content, response.start, response.stop).translate(table)
    response.start, response.stop = 0, len(data)
    return InMemory(data)


def no_etag() -> Fault:
    """No ETag header."""

    def act(response: Response, _: Content) -> Response:
        response.headers.pop("ETag", None)
        return response

    return _on_object("no_etag", act)


def weak_etag() -> Fault:
    """The ETag as a weak one, as a proxy that compresses makes it."""

    def act(response: Response, content: Content) -> Response:
        response.headers["ETag"] = f'W/"{content.version}"'
        return response

    return _on_object("weak_etag", act)


def gzip_body() -> Fault:
    """The right bytes in Content-Encoding: gzip, though nobody asked for it."""

    def act(response: Response, _: Content) -> Response:
        data = gzip.compress(read_all(response.content, response.start, response.stop))
        response.content, response.start, response.stop = InMemory(data), 0, len(data)
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Content-Length"] = str(len(data))
        return response

    return _on_object("gzip_body", act)


def extra_bytes(count: int = 16) -> Fault:
    """More bytes behind the body than Content-Length says, and then the end."""

    def act(response: Response, _: Content) -> Response:
        response.trailing, response.ending = b"\xee" * count, Ending.CLOSE
        return response

    return _on_object("extra_bytes", act)


def longer_body(count: int = 16) -> Fault:
    """A body and a Content-Length that are both longer than the range asked for; Content-Range is as it should be."""

    def act(response: Response, _: Content) -> Response:
        data = read_all(response.content, response.start, response.stop) + b"\xee" * count
        response.content, response.start, response.stop = InMemory(data), 0, len(data)
        response.headers["Content-Length"] = str(len(data))
        return response

    return _on_object("longer_body", act)


def chunked() -> Fault:
    """Transfer-Encoding: chunked and no Content-Length."""
    return _on_object("chunked", lambda response, _: _as_chunked(response))


def _as_chunked(response: Response) -> Response:
    response.chunked = True
    return response


def chunked_cut(body_bytes: int) -> Fault:
    """Chunked, and the connection ends before the last chunk: the only sign of truncation."""

    def act(response: Response, _: Content) -> Response:
        response.chunked, response.cut_after_bytes, response.ending = True, body_bytes, Ending.CLOSE
        return response

    return _on_object("chunked_cut", act)


def no_length() -> Fault:
    """No Content-Length and not chunked: the body ends with the connection."""

    def act(response: Response, _: Content) -> Response:
        response.headers.pop("Content-Length", None)
        response.ending = Ending.CLOSE
        return response

    return _on_object("no_length", act)


def range_not_satisfiable() -> Fault:
    """416 though the range lies within the object, naming its size."""

    def act(_: Response, content: Content) -> Response:
        answer = text_response(416, "<Error><Code>InvalidRange</Code></Error>", "application/xml")
        answer.headers["Content-Range"] = f"bytes */{content.size}"
        return answer

    return _on_object("range_not_satisfiable", act)


def not_modified() -> Fault:
    """304 without a body, to a request that had no condition."""

    def act(_: Response, content: Content) -> Response:
        return Response(304, {"ETag": f'"{content.version}"'})

    return _on_object("not_modified", act)


def expire_after(body_bytes: int) -> Fault:
    """In mid-body every URL minted so far expires and the connection is reset: the repeat meets the refusal."""

    def act(response: Response, situation: Situation) -> Response:
        response.cut_after_bytes, response.ending = body_bytes, Ending.RESET
        response.at_cut = situation.revoke
        return response

    return Fault("expire_after", act)


# --- the API's answer -------------------------------------------------------------------------------------------------


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


FAULTS: dict[str, Callable[..., Fault]] = {
    made.__name__: made
    for made in (
        *(refuse_connections, hang_up, reset_after, truncate_after, stall_after, no_answer, delay, drip, close_after),
        *(status, expired, denied, throttled, bad_gateway, internal_error, redirect_to, redirect_loop),
        *(redirect_elsewhere, ignore_range, wrong_range_start, wrong_range_total, no_content_range, changed_etag),
        *(changed_content, no_etag, weak_etag, gzip_body, extra_bytes, longer_body, chunked, chunked_cut, no_length),
        *(range_not_satisfiable, not_modified, expire_after, answer_is, answer_without, answer_with_dots),
        *(answer_with_duplicates, answer_with_others, half_answer, half_json),
    )
}
"""By name, for whoever controls a sandbox in another process."""
