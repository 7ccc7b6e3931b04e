"""The sandbox's object store: GET with ranges on signed URLs, as S3, GCS, Azure and Swift answer.

Decides status, headers and body of every request; scripted faults then change the answer. Invariants: only GET, for the
signature covers nothing else; nothing is served without a good signature unless `allow_unsigned`; whoever sends a secret
that belongs to the API is noted. Knows nothing of manifests or of who mints its URLs.
"""

from __future__ import annotations

import fnmatch
import re
import ssl
from collections.abc import Callable, Mapping
from email.utils import formatdate
from urllib.parse import quote, unquote

from valohai_fuse.sandbox.content import Content
from valohai_fuse.sandbox.dataset import Entry
from valohai_fuse.sandbox.http1 import Server
from valohai_fuse.sandbox.messages import Exchange, Request, Response, text_response
from valohai_fuse.sandbox.script import FaultScript, Situation
from valohai_fuse.sandbox.signing import Signer

PREFIX = "/data/"


class ObjectStore(Server):
    """Serves the entries of a data set under `/data/<object key>`. See Server for starting, stopping and the record.

    `first_byte_delay_s` comes before each response, `connect_delay_s` once more before the first of a connection,
    `rate_bytes_per_s` caps each connection; all three may be changed while it runs.
    """

    def __init__(
        self,
        objects: Mapping[str, Entry],
        signer: Signer,
        clock: Callable[[], float],
        *,
        name: str = "store",
        faults: FaultScript | None = None,
        secrets: tuple[str, ...] = (),
        allow_unsigned: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(name, self._answer_request, tls)
        self.faults = faults or FaultScript()
        self.first_byte_delay_s = 0.0
        self.connect_delay_s = 0.0
        self.rate_bytes_per_s: float | None = None
        self._objects = objects
        self._signer = signer
        self._clock = clock
        self._secrets = secrets
        self._allow_unsigned = allow_unsigned

    def url_path(self, object_key: str) -> str:
        """The raw path of an object, percent-encoded as S3 does it."""
        return PREFIX + quote(object_key, safe="/~")

    def requests_for(self, pattern: str = "*") -> list[Exchange]:
        """The exchanges whose object key matches a glob such as `input/*.bin`."""
        return [exchange for exchange in self.exchanges() if fnmatch.fnmatchcase(exchange.path, pattern)]

    def sent_bytes(self, pattern: str = "*") -> int:
        """Body bytes sent for the objects whose key matches."""
        return sum(exchange.sent_bytes for exchange in self.requests_for(pattern))

    def _answer_request(self, request: Request, exchange: Exchange) -> Response:
        exchange.path = unquote(request.path).removeprefix(PREFIX)
        said = [request.target, unquote(request.target), request.body.decode("latin-1"), *request.headers.values()]
        exchange.carried_secret = "authorization" in request.headers or any(
            secret in text for secret in self._secrets for text in said
        )
        entry = self._objects.get(exchange.path)
        response = self._plain_answer(request, entry)
        response.headers["Date"] = formatdate(self._clock(), usegmt=True)
        response.headers["Server"] = "valohai-sandbox"
        response.delay_s = self.first_byte_delay_s + (self.connect_delay_s if request.nth_on_connection == 1 else 0.0)
        response.rate_bytes_per_s = self.rate_bytes_per_s
        situation = Situation(
            request=request,
            exchange=exchange,
            server=self,
            revoke=self._signer.revoke_minted,
            now_s=self._clock(),
            content=entry.content if entry else None,
        )
        return self.faults.apply(response, situation)

    def _plain_answer(self, request: Request, entry: Entry | None) -> Response:
        if request.method != "GET":
            # A real one refuses HEAD with 403 and no body, for the signature was made for GET.
            return text_response(403 if request.method == "HEAD" else 405, b"", "application/xml")
        if not (self._allow_unsigned and not request.query):
            refused = self._signer.judge(request.path, request.query)
            if refused is not None:
                return text_response(refused.status, refused.body, refused.content_type)
        if entry is None:
            return text_response(
                404,
                "<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>",
                "application/xml",
            )
        return object_response(entry.content, request.headers)


def object_response(content: Content, headers: Mapping[str, str]) -> Response:
    """200, 206, 412 or 416 for a good GET of `content`. Of several ranges in one header none is honoured, as at S3."""
    tag = f'"{content.version}"'
    common = {"ETag": tag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if (match := headers.get("if-match")) is not None and match not in {tag, "*"}:
        body = "<Error><Code>PreconditionFailed</Code></Error>"
        return text_response(412, body, "application/xml")
    wanted = requested_range(headers.get("range"), content.size)
    if wanted is None or headers.get("if-range", tag) != tag:
        common["Content-Length"] = str(content.size)
        return Response(200, common, content, 0, content.size)
    start, stop = wanted
    if start >= stop:
        response = text_response(416, "<Error><Code>InvalidRange</Code></Error>", "application/xml")
        response.headers["Content-Range"] = f"bytes */{content.size}"
        return response
    common["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
    common["Content-Length"] = str(stop - start)
    return Response(206, common, content, start, stop)


def requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range that a Range header asks for, clipped to the object; start >= stop: not satisfiable.

    None where there is no (valid, single) range: the whole object then, as RFC 9110 has it.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if found is None or found.group(0) == "bytes=-":
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size if int(last) else 0
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size
