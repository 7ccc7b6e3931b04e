"""Asks Valohai for new URLs: the POST of api.json, for one input at a time.

Decides what of Valohai's answers is worth repeating: refused connections, 429 and 5xx are, with backoff and within `budget_s` in
all; 401, 403 and 404 mean that the token is dead or the execution over; anything else that is no answer is an error at once.

Invariants: the token goes to the URL of api.json and nowhere else, so no redirect is followed; no message holds a header or a
query, nor the token where Valohai's own words quote it. A body beyond 1 MiB is on disk, never in memory. Caches nothing. Must not
know who waits: `engine.leases` sees to it that there is one POST per input at a time.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import httpx
import msgspec
import trio

from valohai_fuse.errors import AccessRefusedError, ConfigurationError, StoreUnavailableError
from valohai_fuse.model import urls
from valohai_fuse.model.retry import parse_http_date, parse_retry_after
from valohai_fuse.ports import Clock, FileRef
from valohai_fuse.sources import http
from valohai_fuse.sources.answer import Answer, Buffer, open_body
from valohai_fuse.sources.api_file import ApiRequest

ANSWER_BYTES_MAX: Final = 4 << 30
"""A million files make about 1 GB. More is not an answer but a fault."""
ANSWER_MEMORY_BYTES_MAX: Final = 256 << 20
"""The same where no disk takes it: a quarter of a million files."""
ATTEMPT_MAX_S: Final = 300.0
"""For one answer in all, against one that drips."""
SPILL_BYTES: Final = 1 << 20
_REQUESTS_MAX: Final = 4
_GZIP: Final = 31  # window bits: 15, and 16 for gzip's header
_DELAY_MAX_S: Final = 8.0
_WORDS_BYTES: Final = 4096
_WORDS_CHARS: Final = 240

log = logging.getLogger(__name__)


class _TryAgain(Exception):  # noqa: N818 - control flow within this module, becomes StoreUnavailableError
    def __init__(self, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class ValohaiApi:
    """`ports.UrlSource` over HTTP, on trio. `random` gives floats in [0, 1)."""

    def __init__(
        self,
        request: ApiRequest,
        *,
        clock: Clock,
        parameter: str = "input",
        ca_file: str | None = None,
        connect_timeout_s: float = 10.0,
        answer_timeout_s: float = 60.0,
        budget_s: float = 30.0,
        delay_base_s: float = 0.5,
        spool_dir: str | None = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        """`spool_dir` (None: the system's) takes large answers, as files without names. Raises ConfigurationError."""
        self._request = request
        self._clock = clock
        self._parameter = parameter
        self._budget_s = budget_s
        self._delay_base_s = delay_base_s
        self._spool_dir = spool_dir
        self._random = random
        self._shown = urls.redact(request.url)
        self._headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in request.headers]
        self._headers.append((b"Accept-Encoding", b"gzip"))
        try:
            self._url = httpx.URL(request.url)
        except httpx.InvalidURL:
            raise ConfigurationError(f"api.json: $.input_request.url: {self._shown} is not a URL") from None
        self._limiter = trio.CapacityLimiter(_REQUESTS_MAX)
        self._client = http.client(
            ca_file=ca_file, connect_timeout_s=connect_timeout_s, answer_timeout_s=answer_timeout_s
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        with trio.CancelScope(shield=True):
            await self._client.aclose()

    async def renew(self, file: FileRef) -> Answer:
        """As the port says. Takes `budget_s` at the most before the last attempt starts."""
        began_t, attempt = trio.current_time(), 0
        while True:
            try:
                return await self._ask(file)
            except _TryAgain as failure:
                delay_s = min(self._delay_base_s * 2**attempt, _DELAY_MAX_S) * self._random()
                delay_s += failure.retry_after_s or 0.0
                attempt += 1
                if trio.current_time() - began_t + delay_s > self._budget_s:
                    times = f", {attempt} times" if attempt > 1 else ""
                    raise StoreUnavailableError(f"Valohai's API at {self._shown}: {failure.detail}{times}") from None
                # Once for people: a read may give up long before this does, and the log must say what it waited for.
                level = logging.INFO if attempt == 1 else logging.DEBUG
                log.log(level, "asking Valohai at %s again in %.1f s: %s", self._shown, delay_s, failure.detail)
                await trio.sleep(delay_s)

    async def _ask(self, file: FileRef) -> Answer:
        """One POST. Raises _TryAgain, AccessRefusedError or StoreUnavailableError."""
        # Not `params=`: that replaces the query, and with it `execution=`.
        url = self._url.copy_add_param(self._parameter, file.input_id) if file.input_id else self._url
        spool = _Spool(self._spool_dir)
        async with self._limiter:
            with trio.move_on_after(ATTEMPT_MAX_S):
                try:
                    async with self._client.stream(
                        self._request.method,
                        url,
                        headers=self._headers,
                        content=b"",
                        extensions={"trace": http.refuse_forbidden_peers},
                    ) as response:
                        await self._check(response)
                        inflow = _Inflow(response, spool)
                        await http.read_raw(response, inflow.take)
                        inflow.finish()
                    minted_at_s = self._clock()
                    return await trio.to_thread.run_sync(self._indexed, spool, minted_at_s)
                except http.ForbiddenPeerError as error:
                    raise StoreUnavailableError(f"Valohai's API at {self._shown}: {error}") from None
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    raise _TryAgain(http.describe(error)) from None  # the cause holds the request and its headers
                finally:
                    spool.close()
        raise _TryAgain(f"no complete answer within {ATTEMPT_MAX_S:.0f} s")

    @staticmethod
    def _indexed(spool: _Spool, minted_at_s: float) -> Answer:
        try:
            answer = Answer(spool.body(), minted_at_s)
        except StoreUnavailableError as error:
            # Its frames hold the body, and whoever remembers the error would keep as much disk with it.
            error.__context__ = None
            raise error.with_traceback(None) from None
        if answer.skipped:
            log.warning(
                "Valohai's answer holds %d entries that make no sense, and %d that do", answer.skipped, answer.files
            )
        return answer

    async def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        if 300 <= status < 400:
            target = urls.redact(response.headers.get("location", ""))
            raise StoreUnavailableError(
                f"Valohai's API at {self._shown} redirects to {target}; not followed, for the token is for Valohai alone"
            )
        detail = f"HTTP {status}" + await self._words(response)
        if status in {401, 403, 404}:
            raise AccessRefusedError(
                f"Valohai refuses to renew: {detail}",
                hint="the execution's token is valid only while the execution runs",
            )
        if status in {408, 425, 429} or status >= 500:
            date_s = parse_http_date(response.headers.get("date"))
            now_s = self._clock() if date_s is None else date_s
            raise _TryAgain(detail, parse_retry_after(response.headers.get("retry-after"), now_s))
        raise StoreUnavailableError(f"Valohai's API at {self._shown}: {detail}")

    async def _words(self, response: httpx.Response) -> str:
        """What Valohai says of an error, as `: text`, without secrets; "" where it says nothing in JSON."""
        text = _said(_unpacked(await http.read_beginning(response, _WORDS_BYTES), _coding(response)))
        for _, value in self._request.headers:
            for secret in (value, *value.split()[-1:]):
                if len(secret) >= 6:
                    text = text.replace(secret, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in urls.redact_text(text)).split())
        return f": {text[:_WORDS_CHARS]}" if text else ""


def _said(body: bytes) -> str:
    """The text in `{"detail"|"error"|"non_field_errors"|"message": ...}`; "" in anything else."""
    try:
        value: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if isinstance(value, dict):
        value = next((value[key] for key in ("detail", "error", "non_field_errors", "message") if value.get(key)), "")
    if isinstance(value, list):
        value = "; ".join(part for part in value[:4] if isinstance(part, str))
    return value if isinstance(value, str) else ""


def _coding(response: httpx.Response) -> str:
    coding: str = response.headers.get("content-encoding", "").strip().lower()
    if coding not in {"", "identity", "gzip"}:
        raise StoreUnavailableError("Valohai's API encodes its answers in a way that was not asked for")
    return coding


def _unpacked(beginning: bytes, coding: str) -> bytes:
    """As much of a short text as its first bytes give; nothing when they are not what they say."""
    if coding != "gzip":
        return beginning
    try:
        return zlib.decompressobj(_GZIP).decompress(beginning, 4 * _WORDS_BYTES)
    except zlib.error:
        return b""


class _Inflow:
    """From the wire into the spool, unpacked on the way, at most SPILL_BYTES at a time however well it was packed."""

    def __init__(self, response: httpx.Response, spool: _Spool) -> None:
        self._spool = spool
        self._unpacker = zlib.decompressobj(_GZIP) if _coding(response) == "gzip" else None

    async def take(self, chunk: bytes) -> bool:
        """Always wants more. Raises _TryAgain when the packing is broken."""
        while chunk:
            part, chunk = (chunk, b"") if self._unpacker is None else self._unpack(self._unpacker, chunk)
            if self._spool.add(part):
                await trio.to_thread.run_sync(self._spool.spill)
        return True

    def finish(self) -> None:
        """The few bytes that unpacking may still hold."""
        if self._unpacker is not None:
            self._spool.add(self._unpacker.flush())

    @staticmethod
    def _unpack(unpacker: zlib._Decompress, chunk: bytes) -> tuple[bytes, bytes]:
        try:
            return unpacker.decompress(chunk, SPILL_BYTES), unpacker.unconsumed_tail
        except zlib.error:
            raise _TryAgain("the answer's compression is broken") from None


class _Spool:
    """A body while it comes in: in memory up to SPILL_BYTES, then in a file without a name, in a memfd where disks are full."""

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self._in_memory = False
        self._pending = bytearray()
        self._written = 0

    def add(self, chunk: bytes) -> bool:
        """True when it is time to `spill`."""
        self._pending += chunk
        limit = ANSWER_MEMORY_BYTES_MAX if self._in_memory else ANSWER_BYTES_MAX
        if self._written + len(self._pending) > limit:
            where = " and no disk takes it" if self._in_memory else ""
            raise StoreUnavailableError(f"Valohai's answer has more than {limit} bytes{where}")
        return len(self._pending) >= SPILL_BYTES

    def spill(self) -> None:
        """Writes what is pending (in a thread: may wait for a disk)."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - closed by close()
            self._write_all(self._file, self._pending)
        except OSError as error:
            log.debug("no room for Valohai's answer on disk (%s); keeping it in memory", error.strerror)
            self._move_to_memory()
        self._written += len(self._pending)
        self._pending.clear()

    def body(self) -> Buffer:
        """All of it, readable also after `close`."""
        if self._file is None:
            return bytes(self._pending)
        if self._pending:
            self.spill()
        return open_body(self._file.fileno())

    def close(self) -> None:
        """Gives the file back; a body that was taken stays."""
        if self._file is not None:
            self._file.close()

    def _move_to_memory(self) -> None:
        self._in_memory = True
        memory = open(os.memfd_create("valohai-answer"), "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        if self._file is not None:
            for offset in range(0, self._written, SPILL_BYTES):
                count = min(SPILL_BYTES, self._written - offset)
                self._write_all(memory, os.pread(self._file.fileno(), count, offset))
            self._file.close()
        self._file = memory
        self._write_all(memory, self._pending)

    @staticmethod
    def _write_all(file: BinaryIO, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
