"""The kinds of fault under one roof, and by name.

`faults.reset_after(1000)` makes a fault; `sandbox.store.faults.add(...)` and `sandbox.api.faults.add(...)` say when it
happens. `FAULTS` names them all for whoever controls a sandbox by JSON. No fault says anything of the client's reaction:
that is the tests' business.
"""

from __future__ import annotations

from collections.abc import Callable

from valohai_fuse.sandbox.answer_faults import (
    answer_is,
    answer_with_dots,
    answer_with_duplicates,
    answer_with_others,
    answer_without,
    half_answer,
    half_json,
)
from valohai_fuse.sandbox.object_faults import (
    changed_content,
    changed_etag,
    chunked,
    chunked_cut,
    expire_after,
    extra_bytes,
    gzip_body,
    ignore_range,
    longer_body,
    no_content_range,
    no_etag,
    no_length,
    not_modified,
    range_not_satisfiable,
    weak_etag,
    wrong_range_start,
    wrong_range_total,
)
from valohai_fuse.sandbox.script import Fault
from valohai_fuse.sandbox.wire_faults import (
    bad_gateway,
    close_after,
    delay,
    denied,
    drip,
    expired,
    hang_up,
    internal_error,
    no_answer,
    redirect_elsewhere,
    redirect_loop,
    redirect_to,
    refuse_connections,
    reset_after,
    stall_after,
    status,
    throttled,
    truncate_after,
)

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

__all__ = [
    "FAULTS",
    "answer_is",
    "answer_with_dots",
    "answer_with_duplicates",
    "answer_with_others",
    "answer_without",
    "bad_gateway",
    "changed_content",
    "changed_etag",
    "chunked",
    "chunked_cut",
    "close_after",
    "delay",
    "denied",
    "drip",
    "expire_after",
    "expired",
    "extra_bytes",
    "gzip_body",
    "half_answer",
    "half_json",
    "hang_up",
    "ignore_range",
    "internal_error",
    "longer_body",
    "no_answer",
    "no_content_range",
    "no_etag",
    "no_length",
    "not_modified",
    "range_not_satisfiable",
    "redirect_elsewhere",
    "redirect_loop",
    "redirect_to",
    "refuse_connections",
    "reset_after",
    "stall_after",
    "status",
    "throttled",
    "truncate_after",
    "weak_etag",
    "wrong_range_start",
    "wrong_range_total",
]
