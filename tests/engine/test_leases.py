"""Leases under the autojump clock: which URL is given, how often Valohai is asked, and who waits for it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from support.fake_source import FakeSource, file_ref
from valohai_fuse.engine.leases import Leases
from valohai_fuse.errors import (
    AccessRefusedError,
    ConfigurationError,
    ReadError,
    StoreUnavailableError,
    UnsupportedLocationError,
    ValohaiFuseError,
)
from valohai_fuse.ports import FileRef, Lease

pytestmark = pytest.mark.expect_warnings("its URLs could not be renewed")

EPOCH_S = 1_761_991_200


def now_s() -> float:
    """The wall clock of these tests: begins at EPOCH_S and runs with trio's."""
    return EPOCH_S + trio.current_time()


def signed(expires_in_s: float, *, age_s: float = 0.0, tag: str = "manifest") -> str:
    """A manifest's URL, signed `age_s` before the test began."""
    return f"https://store.test/{tag}?Expires={int(EPOCH_S + expires_in_s)}&age={age_s}"


def told(lease: Lease) -> str:
    """Which renewal a lease is from."""
    return lease.url.partition("renewal=")[2].partition("&")[0] or "manifest"


Scenario = Callable[[Leases, FakeSource], Awaitable[None]]


def play(
    scenario: Scenario, *, lifetime_s: float | None = 3600.0, latency_s: float = 1.0, margin_s: float = 60.0
) -> FakeSource:
    """Runs a scenario with a fake source; ends with no waiter and no POST left."""
    sources = []

    async def main() -> None:
        source = FakeSource(now_s, lifetime_s=lifetime_s, latency_s=latency_s)
        sources.append(source)
        async with trio.open_nursery() as nursery:
            leases = Leases(source, nursery=nursery, clock=now_s, margin_s=margin_s)
            await scenario(leases, source)
        assert leases.statistics().waiting == 0
        assert leases.statistics().renewing == 0
        assert source.under_way_max <= 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return sources[0]


def test_the_manifests_url_is_used_while_it_lives() -> None:
    """No POST for URLs that have more than the margin left."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref(url=signed(3600))
        for _ in range(5):
            assert told(await leases.lease(file)) == "manifest"
            await trio.sleep(600)
        assert (await leases.lease(file)).expires_at_s == EPOCH_S + 3600
        assert leases.age_s(await leases.lease(file)) is None

    assert play(scenario).asked == []


def test_an_expired_manifest_is_renewed_before_it_is_used() -> None:
    """A URL that is known to be dead is not tried."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        lease = await leases.lease(file_ref(url=signed(-10)))
        assert told(lease) == "1"
        assert lease.minted_at_s == now_s()
        assert leases.age_s(lease) == 0

    assert len(play(scenario).asked) == 1


def test_within_the_margin_nobody_waits() -> None:
    """The old URL is handed out while one POST runs in the background; afterwards everybody gets the new one."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref(url=signed(3600))
        await trio.sleep(3600 - 50)
        began_t = trio.current_time()
        for _ in range(10):
            assert told(await leases.lease(file)) == "manifest"
        assert trio.current_time() == began_t
        await trio.sleep(2)
        assert told(await leases.lease(file)) == "1"

    assert len(play(scenario).asked) == 1


def test_in_its_last_seconds_the_caller_waits_for_the_next_url() -> None:
    """A transfer that starts with three seconds left would be cut off."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref(url=signed(3600))
        await trio.sleep(3597)
        assert told(await leases.lease(file)) == "1"

    assert len(play(scenario).asked) == 1


def test_in_its_last_seconds_a_url_is_better_than_none() -> None:
    """When the POST takes too long or fails, what is still valid is used."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.latency_s = 100
        file = file_ref(url=signed(3600))
        await trio.sleep(3596)
        assert told(await leases.lease(file)) == "manifest"
        assert trio.current_time() == 3598

    play(scenario)


def test_one_post_however_many_wait() -> None:
    """A thousand refused reads cost one POST, and none gets the refused URL again."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        got: list[str] = []

        async def reader(index: int) -> None:
            file = file_ref(f"{index}.bin", index=index, url=signed(3600, tag=str(index)))
            refused = await leases.lease(file)
            await trio.sleep(index / 2000)  # some come while the POST runs
            got.append(told(await leases.lease(file, refused)))

        async with trio.open_nursery() as nursery:
            for index in range(1000):
                nursery.start_soon(reader, index)
            await trio.sleep(0.7)
            assert leases.statistics().renewing == 1
            assert leases.statistics().waiting > 500
        assert got == ["1"] * 1000

    assert len(play(scenario).asked) == 1


def test_late_refusals_of_an_old_url_cost_nothing() -> None:
    """Who is refused with the URL before last gets the newest, without a POST."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref(url=signed(3600))
        old = await leases.lease(file)
        assert told(await leases.lease(file, old)) == "1"
        assert told(await leases.lease(file, old)) == "1"
        assert told(await leases.lease(file)) == "1"

    assert len(play(scenario).asked) == 1


def test_inputs_are_renewed_apart() -> None:
    """One POST per input, at the same time."""

    async def main() -> None:
        source = FakeSource(now_s, latency_s=1.0)
        async with trio.open_nursery() as nursery:
            leases = Leases(source, nursery=nursery, clock=now_s)
            async with trio.open_nursery() as readers:
                for input_id in ("i-1", "i-2", None):
                    readers.start_soon(leases.lease, file_ref(input_id=input_id))
            assert trio.current_time() == 1
            assert [file.input_id for file in source.asked].count("i-1") == 1
            assert len(source.asked) == 3

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_cancelling_who_started_the_post_does_not_fail_the_others() -> None:
    """The POST belongs to nobody."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref()
        first = trio.CancelScope()

        async def impatient() -> None:
            with first:
                await leases.lease(file)

        async def patient() -> None:
            assert told(await leases.lease(file)) == "1"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(impatient)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(patient)
            await trio.sleep(0.5)
            first.cancel()
        assert first.cancelled_caught

    assert len(play(scenario).asked) == 1


@pytest.mark.expect_warnings("could not be renewed")
def test_a_failure_goes_to_all_who_wait_and_the_next_tries_again() -> None:
    """After a pause, which callers in the meantime wait out together."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.fail([StoreUnavailableError("down", hint="h")])
        file, failures = file_ref(), []

        async def reader() -> None:
            try:
                await leases.lease(file)
            except StoreUnavailableError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
        assert [(error.message, error.hint) for error in failures] == [("down", "h")] * 5
        assert len({id(error) for error in failures}) == 5
        assert trio.current_time() == 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(leases.lease, file)
        assert trio.current_time() == 3  # the POST, the pause, the POST

    assert len(play(scenario).asked) == 2


@pytest.mark.expect_warnings("could not be renewed")
def test_pauses_between_failures_grow_and_are_bounded() -> None:
    """An API that is down for ten minutes is not asked more than some forty times."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.fail([StoreUnavailableError("down")] * 1000)
        with trio.move_on_after(600):
            while True:
                with pytest.raises(StoreUnavailableError):
                    await leases.lease(file_ref())
        source.failures.clear()
        assert told(await leases.lease(file_ref())) == str(len(source.asked))

    assert 30 < len(play(scenario).asked) < 45


def test_nobody_notices_an_api_that_is_down_while_urls_live(caplog: pytest.LogCaptureFixture) -> None:
    """Valid URLs are served without a wait, and the log says it once."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.fail([StoreUnavailableError("down")] * 1000)
        file = file_ref(url=signed(3600))
        await trio.sleep(3600 - 59)
        for _ in range(50):
            assert told(await leases.lease(file)) == "manifest"
            await trio.sleep(1)
        source.failures.clear()
        await trio.sleep(20)
        assert told(await leases.lease(file)).isdigit()

    with caplog.at_level(logging.INFO):
        play(scenario)
    levels = [(record.levelname, record.message) for record in caplog.records]
    assert [level for level, _ in levels] == ["WARNING", "INFO"]
    assert "down" in levels[0][1]


@pytest.mark.expect_warnings("could not be renewed")
def test_a_dead_token_is_answered_at_once_for_a_while() -> None:
    """The API is not asked by each of a thousand reads that it refuses."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.fail([AccessRefusedError("token dead")] * 100)
        for _ in range(1000):
            with pytest.raises(AccessRefusedError, match="token dead"):
                await leases.lease(file_ref())
        assert trio.current_time() == 1
        await trio.sleep(6)
        source.failures.clear()
        assert told(await leases.lease(file_ref())) == "2"

    assert len(play(scenario).asked) == 2


def test_a_repeated_refused_url_is_never_handed_out() -> None:
    """An answer that holds nothing but what the store refused is a refusal, and does not cost a POST per read."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref(url="https://store.test/k?sig=1")
        source.given[file.name] = "https://store.test/k?sig=1"
        lease = await leases.lease(file)
        with pytest.raises(AccessRefusedError, match="repeats"):
            await leases.lease(file, lease)
        with pytest.raises(AccessRefusedError, match="repeats"):
            await leases.lease(file)
        assert len(source.asked) == 1
        await trio.sleep(6)
        source.given[file.name] = "https://store.test/k?sig=2"
        assert (await leases.lease(file)).url.endswith("sig=2")

    play(scenario)


def test_the_refused_url_stays_refused_over_later_renewals() -> None:
    """Also when an answer after next comes back to it."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref(url="https://store.test/k?sig=1")
        first = await leases.lease(file)
        second = await leases.lease(file, first)
        source.given[file.name] = first.url
        with pytest.raises(AccessRefusedError):
            await leases.lease(file, second)

    play(scenario)


def test_a_denied_file_does_not_cost_a_post_per_read() -> None:
    """What the engine found to be a real denial is remembered for some seconds; other files are not affected."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file, other = file_ref(), file_ref("b.bin", index=1)
        leases.note_denied(file, await leases.lease(file))
        for _ in range(100):
            with pytest.raises(AccessRefusedError):
                await leases.lease(file)
        assert told(await leases.lease(other)) == "1"
        await trio.sleep(6)
        assert told(await leases.lease(file)) == "2"

    assert len(play(scenario).asked) == 2


def test_an_answer_without_the_file() -> None:
    """Is an error that says so, unless the manifest's URL still lives."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.left_out.update(("a.bin", "b.bin"))
        for _ in range(10):
            with pytest.raises(AccessRefusedError, match=r"data/a\.bin.*holds no URL"):
                await leases.lease(file_ref(url=signed(-10)))
        assert len(source.asked) == 1
        assert told(await leases.lease(file_ref("b.bin", index=1, url=signed(3600)))) == "manifest"

    play(scenario)


@pytest.mark.parametrize("lifetime_s", [4, 20, 100, 239])
def test_short_lives_do_not_renew_in_a_loop(lifetime_s: int) -> None:
    """URLs that live for less than the margin cost at most some two POSTs per life, and are used while they live."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        while trio.current_time() < 10 * lifetime_s:
            lease = await leases.lease(file_ref())
            assert lease.expires_at_s is not None
            assert lease.expires_at_s > now_s() - 1  # the URL's seconds are whole
            await trio.sleep(lifetime_s / 50)

    assert len(play(scenario, lifetime_s=lifetime_s, latency_s=0.0).asked) <= 20


def test_long_idle_then_one_read() -> None:
    """A mount that slept over the end of its URLs renews once."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        await leases.lease(file_ref())
        await trio.sleep(86400)
        assert told(await leases.lease(file_ref())) == "2"

    assert len(play(scenario).asked) == 2


@pytest.mark.parametrize("skew_s", [-7200, -90, 90, 7200])
def test_clock_skew(skew_s: int, caplog: pytest.LogCaptureFixture) -> None:
    """Expiry is by the store's clock, as its Date headers tell it; a single odd one does not count."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        leases.note_server_date(now_s() + skew_s)
        leases.note_server_date(now_s() + skew_s)
        leases.note_server_date(now_s() + 50_000)
        assert leases.statistics().clock_skew_s == pytest.approx(skew_s, abs=1)
        await leases.lease(file_ref(url=signed(skew_s + 70)))
        assert source.asked == []
        assert told(await leases.lease(file_ref("b", index=1, url=signed(skew_s - 1)))) == "1"

    play(scenario)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_clock_that_is_far_ahead_does_not_loop_before_it_is_known() -> None:
    """Fresh URLs that look dead on arrival are used: then it is our clock that is wrong."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        for _ in range(20):
            assert told(await leases.lease(file_ref(url=signed(-10)))) == "1"
            await trio.sleep(1)

    assert len(play(scenario, lifetime_s=-7200).asked) == 1


def test_an_unexpected_exception_of_the_source_fails_the_reads_only(caplog: pytest.LogCaptureFixture) -> None:
    """A bug there is a log entry and an error, not the end of the mount."""

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.fail([ZeroDivisionError()])
        with pytest.raises(ReadError, match="ZeroDivisionError"):
            await leases.lease(file_ref())
        await trio.sleep(6)
        assert told(await leases.lease(file_ref())) == "2"

    play(scenario)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def _without_source(file: FileRef, *, sleep_s: float = 0.0, date: bool = False) -> Lease | ValohaiFuseError:
    async def main() -> Lease | ValohaiFuseError:
        async with trio.open_nursery() as nursery:
            leases = Leases(None, nursery=nursery, clock=now_s, api_path="/config/api.json")
            await trio.sleep(sleep_s)
            if date:
                leases.note_server_date(now_s())
            try:
                return await leases.lease(file)
            except ValohaiFuseError as error:
                return error

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_no_api_json_is_fine_until_a_renewal_is_needed() -> None:
    """Then the error names the file."""
    assert isinstance(_without_source(file_ref(url=signed(3600))), Lease)
    assert isinstance(_without_source(file_ref(url=signed(3600)), sleep_s=3590), Lease)
    assert isinstance(_without_source(file_ref(url="https://h/public")), Lease)
    error = _without_source(file_ref(url=signed(3600)), sleep_s=4000, date=True)
    assert isinstance(error, ConfigurationError)
    assert "/config/api.json is missing" in error.message
    assert isinstance(_without_source(file_ref()), ConfigurationError)


def test_without_anyone_to_ask_a_doubtful_clock_does_not_refuse() -> None:
    """As long as no store has told the time, the store itself says whether the URL is dead."""
    assert isinstance(_without_source(file_ref(url=signed(3600)), sleep_s=4000), Lease)


@pytest.mark.expect_warnings("could not be renewed")
@pytest.mark.parametrize("url", ["s3://b/k", "gs://b/k", "azure://a/c/b", "file:///etc/passwd", "https://h/\r\nX: y"])
def test_locations_that_cannot_be_fetched(url: str) -> None:
    """Valohai is asked for an https URL; where there is none, the error names the scheme."""
    error = _without_source(file_ref(url=url))
    assert isinstance(error, UnsupportedLocationError)
    assert url.partition("\r")[0].split("/")[0] in error.message or "control" in error.message

    async def scenario(leases: Leases, source: FakeSource) -> None:
        source.left_out.add("b")
        source.given["c"] = url
        assert told(await leases.lease(file_ref(url=url))) == "1"
        with pytest.raises(UnsupportedLocationError):
            await leases.lease(file_ref("b", index=1, url=url))
        with pytest.raises(UnsupportedLocationError):
            await leases.lease(file_ref("c", index=2))
        source.fail([AccessRefusedError("token dead")])
        with pytest.raises(UnsupportedLocationError, match="token dead"):
            await leases.lease(FileRef("other", "i-9", "d", None, None, url, 0))

    play(scenario)


def test_a_public_uri_is_used_where_nothing_else_is() -> None:
    """Old inputs.json files have no storage_uri, and a plain https address as uri."""
    file = FileRef("data", None, "t.gz", "https://public.test/t.gz", None, None, 0)
    lease = _without_source(file)
    assert isinstance(lease, Lease)
    assert lease.url == "https://public.test/t.gz"
    file = FileRef("data", None, "t.gz", "https://public.test/t.gz", None, "s3://bucket/t.gz", 0)
    lease = _without_source(file)
    assert isinstance(lease, Lease)
    assert lease.url == "https://public.test/t.gz"


def test_nothing_secret_is_in_messages(caplog: pytest.LogCaptureFixture) -> None:
    """No query of any URL, in whatever goes wrong."""
    messages: list[str] = []

    async def scenario(leases: Leases, source: FakeSource) -> None:
        file = file_ref(url="https://store.test/k?sig=S3CR3T")
        source.given[file.name] = "ftp://u:S3CR3T@store.test/k?sig=S3CR3T"
        source.fail([StoreUnavailableError("down")])
        lease = await leases.lease(file)
        messages.append(repr(lease) + repr(file) + repr(leases.statistics()))
        for _ in range(3):
            with pytest.raises(ValohaiFuseError) as caught:
                await leases.lease(file, lease)
            messages.append(str(caught.value) + str(caught.value.hint))
        leases.note_denied(file, lease)

    play(scenario)
    assert "S3CR3T" not in "".join(messages) + caplog.text
