"""Faults of the connection, statuses and redirects: what can happen at either server, whatever was asked for.

Each function makes one kind, and its docstring says what is seen on the wire.
"""

from __future__ import annotations

from typing import Any

from valohai_fuse.sandbox.messages import Ending, Response, text_response
from valohai_fuse.sandbox.script import Fault, Situation
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
    ending = Ending.STALL if seconds is None else Ending.KEEP_ALIVE
    return _changed("stall_after", cut_after_bytes=body_bytes, resume_after_s=seconds, ending=ending)


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
