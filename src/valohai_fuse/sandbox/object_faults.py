"""Faults of the store's answer about an object: a wrong range, another version, a body that is not what its head says.

They leave refusals alone: where the store would not have given the object, its answer stays as it is.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable

from valohai_fuse.sandbox.content import Content, InMemory, Ramp, read_all
from valohai_fuse.sandbox.messages import Ending, Response, text_response
from valohai_fuse.sandbox.script import Fault, Situation


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
