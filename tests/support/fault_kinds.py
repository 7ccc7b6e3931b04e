"""Every kind of fault with what a reader may be told of it: the table that `tests/faults` loops over.

Outcomes are errnos, 0 being the right bytes. `once` is what may come of a fault that happens to one request, `always` of one
that happens to every request from then on, `probe` of one that happens to each request that sizes the file. They are the table
of the product page, kind by kind: what can be retried is 0 when it passes and ETIMEDOUT when it stays.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from support.tls_hosts import TlsHosts
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.script import Fault
from valohai_fuse.sandbox.signing import Form
from valohai_fuse.sandbox.valohai import Sandbox

Outcomes = frozenset[int]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a fault may lead to."""

    sandbox: Sandbox
    tls: TlsHosts


Make = Callable[[Surroundings], Fault]

RIGHT: Outcomes = frozenset({0})
LATE: Outcomes = frozenset({errno.ETIMEDOUT})
SENSELESS: Outcomes = frozenset({errno.EIO, errno.ETIMEDOUT})
"""Retried a few times, then given up; the deadline may come first."""
CHANGED: Outcomes = frozenset({errno.ESTALE})
REFUSED: Outcomes = frozenset({errno.EACCES})
GONE: Outcomes = frozenset({errno.EIO, errno.ENOENT})
FAILED: Outcomes = frozenset({errno.EIO})

HTML = "<html><head><title>Login</title></head><body>Welcome to the captive portal</body></html>\n"


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One kind; see the module's text. `alone`: it reaches beyond the requests that it is meant for; `lengthy`: it takes long;
    `said`: what the log says where a read fails of it; `form`: how the URLs of its files are signed."""

    name: str
    make: Make
    once: Outcomes
    always: Outcomes
    probe: Outcomes
    alone: bool = False
    lengthy: bool = False
    said: str = ""
    form: Form = "s3-sigv4"


def _kind(
    name: str,
    make: Make,
    once: Outcomes,
    always: Outcomes,
    *,
    probe: Outcomes | None = None,
    alone: bool = False,
    lengthy: bool = False,
    said: str = "",
) -> FaultKind:
    return FaultKind(name, make, once, always, always if probe is None else probe, alone, lengthy, said)


def _retried(name: str, make: Make, *, alone: bool = False, said: str = "") -> FaultKind:
    return _kind(name, make, RIGHT, LATE, alone=alone, said=said)


def _expired(form: Form) -> FaultKind:
    """In the words of one form of URL: 400, 401 or 403."""
    return FaultKind(f"expired, {form}", lambda _: faults.expired(), RIGHT, REFUSED, REFUSED, form=form)


def _over_tls(host: str, said: str, *, progress: bool = False) -> FaultKind:
    """What happens at one of `TlsHosts`; `progress`: a body that breaks has brought something each time."""
    outcomes = RIGHT | LATE if progress else LATE
    return _kind(f"TLS: {host}", lambda s: faults.redirect_elsewhere(s.tls.origins[host]), RIGHT, outcomes, said=said)


def _senseless(name: str, make: Make, probe: Outcomes | None = None) -> FaultKind:
    return _kind(name, make, RIGHT, SENSELESS, probe=probe)


def _harmless(name: str, make: Make) -> FaultKind:
    return _kind(name, make, RIGHT, RIGHT)


def _final(name: str, make: Make, outcomes: Outcomes, probe: Outcomes | None = None) -> FaultKind:
    return _kind(name, make, RIGHT | outcomes, outcomes, probe=probe)  # right: it may meet what nobody waits for


STORE_KINDS: tuple[FaultKind, ...] = (
    # the connection
    _retried("refused connection", lambda _: faults.refuse_connections(0.2), alone=True),
    _retried("hang-up", lambda _: faults.hang_up()),
    _retried("reset after the head", lambda _: faults.reset_after(0)),
    _kind("reset in mid-body", lambda _: faults.reset_after(70_000), RIGHT, RIGHT | LATE, probe=RIGHT | LATE),
    _retried("truncated body", lambda _: faults.truncate_after(1000)),
    _kind("truncated late", lambda _: faults.truncate_after(70_000), RIGHT, RIGHT | LATE, probe=RIGHT | LATE),
    _retried("stall", lambda _: faults.stall_after(1000)),
    _retried("no answer", lambda _: faults.no_answer()),
    _kind("trickle", lambda _: faults.drip(16, 0.1), RIGHT, LATE),
    _harmless("drip", lambda _: faults.drip(65_536, 0.01)),
    _harmless("late answer", lambda _: faults.delay(0.3)),
    _harmless("close without notice", lambda _: faults.close_after()),
    _retried("DNS failure", lambda _: faults.redirect_to("http://no-such-host.invalid/x")),
    _retried("TLS: none", lambda s: faults.redirect_to(f"https://127.0.0.1:{s.sandbox.elsewhere.port}/x")),
    _harmless("TLS: good", lambda s: faults.redirect_elsewhere(s.tls.origins["good"])),
    _over_tls("expired", "certificate has expired"),
    _over_tls("wrong-name", "(?i)certificate .*(match|valid for|IP address)"),
    _over_tls("untrusted", "(?i)certificate .*(self.signed|local issuer)"),
    _over_tls("garbage", "TLS|SSL"),
    _over_tls("garbled", "TLS|SSL"),
    _over_tls("closed at once", "TLS|SSL|conne"),
    _over_tls("closed in the handshake", "TLS|SSL|conne"),
    _over_tls("reset in the handshake", "TLS|SSL|conne"),
    _over_tls("stalled handshake", "conne|nothing came"),
    _over_tls("closed in the body", "", progress=True),
    _over_tls("reset in the body", "", progress=True),
    _over_tls("stalled in the body", "", progress=True),
    _over_tls("tampered body", "", progress=True),
    _retried("nobody there", lambda _: faults.redirect_to("http://127.0.0.1:1/x")),
    # statuses
    _kind("400", lambda _: faults.denied(400), RIGHT, REFUSED),
    _kind("401", lambda _: faults.denied(401), RIGHT, REFUSED),
    _kind("403", lambda _: faults.denied(403), RIGHT, REFUSED),
    _expired("s3-sigv4"),
    _expired("s3-sts"),
    _expired("azure-sas"),
    _expired("swift"),
    _final("404", lambda _: faults.status(404), GONE),
    _final("410", lambda _: faults.status(410), GONE),
    _final("412", lambda _: faults.status(412), CHANGED),
    _final("416", lambda _: faults.range_not_satisfiable(), CHANGED, probe=SENSELESS),
    _senseless("304", lambda _: faults.not_modified()),
    _senseless("204", lambda _: faults.status(204)),
    _senseless("418", lambda _: faults.status(418)),
    _retried("408", lambda _: faults.status(408)),
    _retried("429", lambda _: faults.throttled(429)),
    _retried("429, Retry-After", lambda _: faults.throttled(429, "1")),
    _retried("503", lambda _: faults.throttled(503)),
    _retried("503, Retry-After", lambda _: faults.throttled(503, "1")),
    _retried("503, Retry-After a date", lambda _: faults.throttled(503, "Thu, 01 Jan 1970 00:00:00 GMT")),
    _kind("503, Retry-After a day", lambda _: faults.throttled(503, "86400"), RIGHT | LATE, LATE),
    _retried("503, Retry-After nonsense", lambda _: faults.throttled(503, "-1; soon")),
    _retried("500", lambda _: faults.internal_error()),
    _retried("502", lambda _: faults.bad_gateway()),
    _senseless("206 with a page", lambda _: faults.status(206, HTML, "text/html")),
    _final("200 with a page", lambda _: faults.status(200, HTML, "text/html"), CHANGED, probe=SENSELESS),
    # redirects
    _senseless("endless redirect", lambda _: faults.redirect_loop()),
    _harmless("redirect to another host", lambda s: faults.redirect_elsewhere(s.sandbox.elsewhere.origin)),
    _final("redirect to file:", lambda _: faults.redirect_to("file:///etc/passwd"), FAILED),
    _final("redirect to gopher:", lambda _: faults.redirect_to("gopher://127.0.0.1:70/x"), FAILED),
    _final("redirect to unix:", lambda _: faults.redirect_to("unix:///run/docker.sock"), FAILED),
    _final("redirect to nowhere", lambda _: faults.redirect_to("http://"), FAILED),
    _final("redirect to the machine itself", lambda _: faults.redirect_to("http://169.254.169.254/latest/"), FAILED),
    _final("the same as a number", lambda _: faults.redirect_to("http://[::ffff:a9fe:a9fe]:80/latest/"), FAILED),
    # the object
    _harmless("200 for a range", lambda _: faults.ignore_range()),
    _senseless("wrong start", lambda _: faults.wrong_range_start(), probe=SENSELESS),
    _final("wrong total", lambda _: faults.wrong_range_total(), CHANGED, probe=CHANGED | SENSELESS),
    _senseless("no Content-Range", lambda _: faults.no_content_range(), probe=SENSELESS),
    _kind("another ETag", lambda _: faults.changed_etag(), RIGHT | CHANGED, RIGHT | CHANGED),
    _kind("no ETag", lambda _: faults.no_etag(), RIGHT | CHANGED, RIGHT | CHANGED),
    _kind("weak ETag", lambda _: faults.weak_etag(), RIGHT | CHANGED, RIGHT | CHANGED),
    _senseless("gzip body", lambda _: faults.gzip_body(), probe=RIGHT | SENSELESS),
    _harmless("extra bytes", lambda _: faults.extra_bytes()),
    _senseless("longer body", lambda _: faults.longer_body(), probe=RIGHT | SENSELESS),
    _harmless("chunked", lambda _: faults.chunked()),
    _retried("chunked and cut", lambda _: faults.chunked_cut(500)),
    _harmless("no length", lambda _: faults.no_length()),
    _kind("expiry in mid-body", lambda _: faults.expire_after(5000), RIGHT, RIGHT | REFUSED, alone=True),
)
"""What a store can do wrong with an object of at least a few hundred KB."""


def _answer_lacks(_: Surroundings) -> Fault:
    return faults.answer_without("0.bin")


API_KINDS: tuple[FaultKind, ...] = (
    _kind("down", lambda _: faults.refuse_connections(0.2), RIGHT, LATE, alone=True, lengthy=True),
    _retried("hang-up", lambda _: faults.hang_up()),
    _retried("reset", lambda _: faults.reset_after(0)),
    _retried("reset in mid-answer", lambda _: faults.reset_after(50)),
    _kind("no answer for 5 s", lambda _: faults.delay(5.0), RIGHT | LATE, RIGHT | LATE, alone=True, lengthy=True),
    _harmless("slow", lambda _: faults.delay(0.5)),
    _harmless("drip", lambda _: faults.drip(32, 0.01)),
    _final("401", lambda _: faults.status(401), REFUSED),
    _final("403", lambda _: faults.status(403, '{"detail": "no"}', "application/json"), REFUSED),
    _final("404", lambda _: faults.status(404), REFUSED),
    _retried("429", lambda _: faults.throttled(429)),
    _retried("503, Retry-After", lambda _: faults.throttled(503, "1")),
    _retried("500", lambda _: faults.internal_error()),
    _retried("502", lambda _: faults.bad_gateway()),
    _retried("418", lambda _: faults.status(418)),
    _retried("HTML", lambda _: faults.status(200, HTML, "text/html")),
    _retried("nothing", lambda _: faults.status(200, "")),
    _retried("half an answer", lambda _: faults.half_answer()),
    _retried("half the JSON", lambda _: faults.half_json()),
    _retried("another shape", lambda _: faults.answer_is({"detail": "ok"})),
    _retried("a list of numbers", lambda _: faults.answer_is([1, 2, 3])),
    _final("no input", lambda _: faults.answer_is([]), REFUSED),
    _final("without the file", _answer_lacks, REFUSED),
    _harmless("with dots", lambda _: faults.answer_with_dots()),
    _harmless("duplicates", lambda _: faults.answer_with_duplicates()),
    _harmless("other inputs", lambda _: faults.answer_with_others()),
    _retried("redirect to the store", lambda s: faults.redirect_elsewhere(s.sandbox.store.origin)),
    _retried("redirect loop", lambda _: faults.redirect_loop()),
    _retried("redirect to file:", lambda _: faults.redirect_to("file:///etc/passwd")),
)
"""What Valohai's API can do wrong with a renewal that a read waits for."""
