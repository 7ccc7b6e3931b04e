"""What `doctor` asks of the world outside: one renewal of Valohai's API, one byte of one store, and the store's clock.

The smallest input that is on demand stands for all. Bounded by `PROBE_S` for each of the two questions, nothing is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from valohai_fuse.cli.finding import FAIL, OK, WARN, Finding
from valohai_fuse.errors import AccessRefusedError, ConfigurationError, ValohaiFuseError
from valohai_fuse.model import urls
from valohai_fuse.model.expiry import expires_at_s
from valohai_fuse.settings import Settings

if TYPE_CHECKING:
    from valohai_fuse.ports import FileRef

PROBE_S: Final = 20.0
SKEW_S: Final = 60.0
"""Less than that is hidden by the margin that URLs are renewed ahead with."""
_NETWORK: Final = (
    "name resolution, proxy (HTTPS_PROXY) and firewall are the usual causes; --ca-file for a private authority"
)


def examine(settings: Settings) -> Iterator[Finding]:
    """Nothing where there is nothing on demand, or no valid inputs.json (which another check tells)."""
    import trio

    try:
        file = _smallest(settings)
    except ConfigurationError:
        return
    if file is not None:
        yield from trio.run(_ask, settings, file)


def _smallest(settings: Settings) -> FileRef | None:
    """The first file on demand of the smallest input that has one."""
    from valohai_fuse.model.manifest import ON_DEMAND
    from valohai_fuse.sources import manifest_file

    candidates = [summary for summary in manifest_file.list_inputs(settings.config_dir) if summary.on_demand_files]
    if not candidates:
        return None
    smallest = min(candidates, key=lambda summary: summary.files)
    manifest = manifest_file.load(settings.config_dir, (smallest.name,))
    try:
        records = (manifest.record(index) for index in range(len(manifest)))
        return next((record.ref() for record in records if record.download_intent == ON_DEMAND), None)
    finally:
        manifest.close()


async def _ask(settings: Settings, file: FileRef) -> list[Finding]:
    api, renewed = await _ask_api(settings, file)
    url = renewed or urls.first_supported(file.storage_uri, file.uri)
    return [*api, *await _ask_store(settings, file, url, is_fresh=renewed is not None)]


async def _ask_api(settings: Settings, file: FileRef) -> tuple[list[Finding], str | None]:
    """What the API says, and the URL that it gave."""
    import trio

    from valohai_fuse.sources import api_file
    from valohai_fuse.sources.valohai_api import ValohaiApi

    try:
        request = api_file.load(settings.config_dir)
        if request is None:
            return [], None
        where = urls.redact(request.url)
        async with ValohaiApi(
            request,
            clock=time.time,
            parameter=settings.api_input_parameter,
            ca_file=settings.ca_file,
            connect_timeout_s=settings.connect_timeout,
            budget_s=0.0,
        ) as api:
            with trio.fail_after(PROBE_S):
                url = (await api.renew(file)).url_for(file)
    except AccessRefusedError as error:
        hint = error.hint or "the token of api.json is valid only while its execution runs"
        return [Finding("api", FAIL, error.message, hint, 1)], None
    except ConfigurationError:
        return [], None  # the check of api.json tells it
    except trio.TooSlowError:
        return [Finding("api", FAIL, f"{where}: no answer within {PROBE_S:g} s", _NETWORK, 1)], None
    except ValohaiFuseError as error:
        return [Finding("api", FAIL, error.message, error.hint or _NETWORK, 1)], None
    if url is None or not urls.supported(url):
        what = f"{where} answers, but with no http(s) URL for {file.input_name}/{file.name}"
        return [Finding("api", WARN, what, "is it in a store behind machine roles?")], None
    return [Finding("api", OK, f"{where} gives new URLs")], url


async def _ask_store(settings: Settings, file: FileRef, url: str | None, *, is_fresh: bool) -> list[Finding]:
    import trio

    from valohai_fuse.ports import FailureKind, FetchFailed, Lease
    from valohai_fuse.sources.size_probe import HttpSizeProbe

    if url is None:
        return [Finding("store", FAIL, f"{file.input_name}/{file.name} has no http(s) URL to fetch", exit_code=1)]
    probe = HttpSizeProbe(clock=time.time, ca_file=settings.ca_file, connect_timeout_s=settings.connect_timeout)
    async with probe:
        began_t = trio.current_time()
        try:
            with trio.fail_after(PROBE_S):
                await probe.size(Lease(url))
        except trio.TooSlowError:
            found = Finding("store", FAIL, f"{urls.redact(url)}: no answer within {PROBE_S:g} s", _NETWORK, 1)
        except FetchFailed as failure:
            refused = failure.kind is FailureKind.REFUSED
            hint = (
                "the execution may not read this object"
                if refused and is_fresh
                else _expired(url)
                if refused
                else _NETWORK
            )
            found = Finding("store", FAIL, failure.detail, hint, 1)
        else:
            took_ms = (trio.current_time() - began_t) * 1000
            found = Finding("store", OK, f"{urls.redact(url)}: the first byte came after {took_ms:.0f} ms")
        return [found, *_clock(probe.server_date_s)]


def _expired(url: str) -> str:
    """For a URL of inputs.json that a store refuses and nobody renews."""
    at_s = expires_at_s(url)
    if at_s is None or at_s > time.time():
        return "the URL in inputs.json is no longer good, and there is no new one"
    return f"the URL in inputs.json expired {(time.time() - at_s) / 60:.0f} minutes ago, and there is no new one"


def _clock(server_date_s: float | None) -> Iterator[Finding]:
    if server_date_s is None:
        return
    ahead_s = time.time() - server_date_s - 0.5  # the header has whole seconds, cut off
    if abs(ahead_s) <= SKEW_S:
        yield Finding("clock", OK, f"this machine's clock agrees with the store's within {abs(ahead_s) + 0.5:.0f} s")
        return
    side = "ahead of" if ahead_s > 0 else "behind"
    yield Finding(
        "clock",
        WARN,
        f"this machine's clock is {abs(ahead_s):.0f} s {side} the store's",
        "a mount reckons with it, other programs may not: set the clock (NTP)",
    )
