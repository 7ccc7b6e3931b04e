"""Why a fetch ended without all its bytes: what adapters say and the retry policy decides on."""

from __future__ import annotations

import enum


class FailureKind(enum.StrEnum):
    """Why an order failed; the engine decides from this alone whether to retry, renew or give up."""

    REFUSED = "refused"  # 400, 401, 403: renew the URL, once
    MISSING = "missing"  # 404, 410
    CHANGED = "changed"  # other ETag or total than expected, 412, 416 on a range inside the size
    THROTTLED = "throttled"  # 429, 503: back off, honour retry_after_s
    TRANSIENT = "transient"  # connect, DNS, TLS, reset, stall, truncated body, 5xx
    PROTOCOL = "protocol"  # wrong Content-Range, encoded body, redirect loop, an answer that makes no sense: retried, boundedly
    FORBIDDEN = "forbidden"  # the URL or a redirect has a scheme that must not be followed: final
    DISK = "disk"  # the bytes came but could not be landed: the store is told, the order is repeated elsewhere
    WORKER_LOST = "worker-lost"  # the worker process died: reissue


class FetchFailed(Exception):  # noqa: N818 - a message between rooms, mapped to errors.py by the engine, not shown to people
    """An order or a probe ended without all its bytes. `detail` is already redacted."""

    def __init__(
        self,
        kind: FailureKind,
        detail: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        server_date_s: float | None = None,
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.status = status
        self.retry_after_s = retry_after_s
        self.server_date_s = server_date_s
        """The response's Date header as epoch seconds: shows clock skew."""
