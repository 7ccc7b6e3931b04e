"""Leases, Valohai's API and the size probe together, against the sandbox: URLs that really expire."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, get_args

import pytest
import trio

from valohai_fuse.engine.leases import Leases
from valohai_fuse.errors import AccessRefusedError, ReadError
from valohai_fuse.model.retry import GiveUp, Renew, RetryAfter, RetryState
from valohai_fuse.ports import FetchFailed, FileRef, Lease
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.script import Fault
from valohai_fuse.sandbox.signing import Form
from valohai_fuse.sandbox.valohai import Sandbox
from valohai_fuse.sources import api_file, manifest_file
from valohai_fuse.sources.size_probe import HttpSizeProbe
from valohai_fuse.sources.valohai_api import ValohaiApi

NAMES = ("a.bin", "dir/b c+d (1).bin", "ä.bin")
SIZES = {name: 100_000 + n for n, name in enumerate(NAMES)}

Size = Callable[[FileRef], Awaitable[int]]
Scenario = Callable[[Sandbox, Leases, Size, list[FileRef]], Awaitable[None]]


def play(scenario: Scenario, **options: Any) -> None:
    """A scenario in a sandbox of three files; nothing but Valohai may have seen the token at its end."""

    async def main(sandbox: Sandbox) -> None:
        manifest = manifest_file.load(sandbox.config_dir, ["data"])
        files = [manifest.record(index).ref() for index in range(len(NAMES))]
        manifest.close()
        request = api_file.load(sandbox.config_dir)
        assert request is not None
        api = ValohaiApi(request, clock=time.time, budget_s=0.5, delay_base_s=0.01, ca_file=sandbox.ca_file)
        probe = HttpSizeProbe(clock=time.time, answer_timeout_s=2.0, ca_file=sandbox.ca_file)
        async with api, probe, trio.open_nursery() as nursery:
            leases = Leases(api, nursery=nursery, clock=time.time)

            async def size(file: FileRef) -> int:
                return await _sized(leases, probe, file)

            with trio.fail_after(20):
                await scenario(sandbox, leases, size, files)

    inputs = {"data": {name: ramp(size) for name, size in SIZES.items()}, "other": {name: ramp(7) for name in NAMES}}
    with Sandbox(inputs, **options) as sandbox:
        trio.run(main, sandbox)
        sandbox.assert_token_never_leaked()


async def _sized(leases: Leases, probe: HttpSizeProbe, file: FileRef) -> int:
    """As the engine does it."""
    retry, began_t = RetryState(random=random.random), trio.current_time()
    refused: Lease | None = None
    while True:
        lease: Lease | None = None
        failure: FetchFailed | ReadError
        try:
            lease = await leases.lease(file, refused)
            return await probe.size(lease)
        except (FetchFailed, ReadError) as error:
            failure = error
        if isinstance(failure, FetchFailed) and failure.server_date_s is not None:
            leases.note_server_date(failure.server_date_s)
        decision = retry.after(
            failure,
            elapsed_s=trio.current_time() - began_t,
            deadline_s=10.0,
            lease_age_s=leases.age_s(lease) if lease else None,
        )
        if isinstance(decision, GiveUp):
            raise decision.error()
        refused = lease if isinstance(decision, Renew) else None
        if isinstance(decision, RetryAfter):
            await trio.sleep(decision.delay_s)


async def _all_sizes(size: Size, files: list[FileRef], times: int = 5) -> None:
    async def one(file: FileRef) -> None:
        assert await size(file) == SIZES[file.name]

    async with trio.open_nursery() as nursery:
        for file in files * times:
            nursery.start_soon(one, file)


@pytest.mark.parametrize("form", [form for form in get_args(Form) if form != "plain"])
def test_every_form_of_signature_is_renewed(form: Form) -> None:
    """URLs that the store refuses, expired by their own words or not: one POST, and nobody notices."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        await _all_sizes(size, files)
        assert sandbox.api.renewals() == 0
        for turn in (1, 2, 3):
            sandbox.expire_urls()
            await _all_sizes(size, files)
            assert sandbox.api.renewals() == turn

    play(scenario, form=form)


@pytest.mark.parametrize("form", [form for form in get_args(Form) if form != "plain"])
def test_a_manifest_that_has_expired_is_not_even_tried(form: Form) -> None:
    """The store sees fresh URLs only."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        await _all_sizes(size, files)
        assert sandbox.api.renewals() == 1
        assert {exchange.status for exchange in sandbox.store.exchanges()} == {206}

    play(scenario, form=form, manifest_age_s=4000)


@pytest.mark.expect_warnings("the clock of this machine")
@pytest.mark.parametrize("clock_skew_s", [-20_000, 20_000])
def test_clocks_that_disagree_by_hours(clock_skew_s: int) -> None:
    """URLs that look dead are good, or the reverse: a renewal or two at the most."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        for _ in range(5):
            await _all_sizes(size, files, 2)
        sandbox.expire_urls()
        await _all_sizes(size, files, 2)
        assert leases.statistics().clock_skew_s == pytest.approx(clock_skew_s, abs=3)
        assert sandbox.api.renewals() <= 2

    play(scenario, clock_skew_s=clock_skew_s)


def test_short_lives() -> None:
    """URLs that live for three seconds serve reads without a pause, at the price of a POST per life or two."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        began_t = trio.current_time()
        while trio.current_time() < began_t + 7:
            await _all_sizes(size, files, 1)
            await trio.sleep(0.02)
        assert 2 <= sandbox.api.renewals() <= 7

    play(scenario, url_lifetime_s=3)


@pytest.mark.expect_warnings("could not be renewed")
@pytest.mark.parametrize(
    "fault",
    [
        faults.answer_with_dots(),
        faults.answer_with_duplicates(),
        faults.answer_with_others(),
        faults.half_answer(),
        faults.half_json(),
        faults.bad_gateway(),
        faults.throttled(429, "0"),
        faults.hang_up(),
    ],
    ids=lambda fault: str(fault.name),
)
def test_odd_answers(fault: Fault) -> None:
    """What Valohai's API may do once, a reader does not notice."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        sandbox.api.faults.add(fault)
        sandbox.expire_urls()
        await _all_sizes(size, files)
        assert sandbox.api.renewals() <= 2

    play(scenario)


@pytest.mark.expect_warnings("could not be renewed")
def test_the_api_is_away_for_a_while() -> None:
    """Reads wait for it and then go on."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        sandbox.expire_urls()
        sandbox.stop_api()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_all_sizes, size, files)
            await trio.sleep(1)
            sandbox.start_api()

    play(scenario)


@pytest.mark.expect_warnings("could not be renewed")
def test_a_dead_token() -> None:
    """The execution is over: an error at once, with Valohai's words, and one POST for all."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        sandbox.expire_urls()
        sandbox.api.change_token("another")
        for file in files * 5:
            with pytest.raises(AccessRefusedError, match=r"HTTP 401: Invalid execution token\."):
                await size(file)
        assert sandbox.api.renewals() == 1

    play(scenario)


def test_a_real_denial_is_one() -> None:
    """A store that refuses fresh URLs too is asked twice, Valohai once; other files go on."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        sandbox.store.faults.add(faults.denied(), path="*a.bin", count=None, when=lambda request: True)
        denied = next(file for file in files if file.name == "a.bin")
        with pytest.raises(AccessRefusedError):
            await size(denied)
        assert sandbox.api.renewals() == 1
        assert len(sandbox.store.exchanges()) == 2
        assert await size(files[1]) == SIZES[files[1].name]

    play(scenario)


def test_over_tls() -> None:
    """With an authority of the user's own; without it nothing is trusted."""

    async def scenario(sandbox: Sandbox, leases: Leases, size: Size, files: list[FileRef]) -> None:
        sandbox.expire_urls()
        await _all_sizes(size, files)
        async with HttpSizeProbe(clock=time.time) as distrustful:
            with pytest.raises(FetchFailed, match=r"certificate verify failed") as caught:
                await distrustful.size(await leases.lease(files[0]))
        assert "Signature" not in str(caught.value)

    play(scenario, tls=True)
