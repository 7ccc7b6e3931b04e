"""Which sequences of places show that they are in no order, and how soon."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable

import pytest

from valohai_fuse.model.disorder import (
    DISORDER_MIN,
    DISORDER_MIN_ALONE,
    SEQUENCES_MIN_ALONE,
    Disorder,
)


def shows_after(places: Iterable[int]) -> int | None:
    """After how many of the places it shows that they are in no order, 32 at the least."""
    places_so_far = Disorder()
    for number, place in enumerate(places, 1):
        places_so_far.add(place)
        if number >= 32 and places_so_far.degree() >= DISORDER_MIN:
            return number
    return None


def shows_alone_after(places: Iterable[int]) -> int | None:
    """The same of a reader that never had two of them under way, six at the least."""
    places_so_far = Disorder()
    for number, place in enumerate(places, 1):
        places_so_far.add(place)
        if number >= 6 and places_so_far.degree(SEQUENCES_MIN_ALONE) >= DISORDER_MIN_ALONE:
            return number
    return None


def lanes(count: int, seed: int) -> list[int]:
    """So many threads, each going through its own part at its own pace."""
    dice = random.Random(seed)
    at = [lane * 10**6 for lane in range(count)]
    places = []
    for _ in range(2000):
        lane = dice.randrange(count)
        at[lane] += dice.randrange(1, 1000)
        places.append(at[lane])
    return places


def jittered(window: int, seed: int) -> list[int]:
    """One pass, of which so many requests are under way at once and arrive in any order."""
    dice = random.Random(seed)
    coming = list(range(window))
    places = []
    for step in range(window, 2000):
        place = dice.randrange(window)
        places.append(coming[place])
        coming[place] = step
    return places


def test_random_places_show_within_some_dozens() -> None:
    found = [shows_after(random.Random(seed).choices(range(10**9), k=300)) for seed in range(100)]
    assert all(found)
    assert statistics.median(number for number in found if number) <= 40


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_passes_side_by_side_are_an_order(count: int, *, backwards: bool) -> None:
    """By up to eight threads, in either direction, also where their requests overtake one another."""
    sign = -1 if backwards else 1
    for seed in range(10):
        assert shows_after(sign * place for place in lanes(count, seed)) is None
        assert shows_after(sign * place for place in jittered(count, seed)) is None


def test_random_places_of_a_reader_alone_show_within_a_dozen() -> None:
    found = [shows_alone_after(random.Random(seed).choices(range(10**9), k=300)) for seed in range(100)]
    assert all(found)
    assert statistics.median(number for number in found if number) <= 8


@pytest.mark.parametrize("order", [1, -1], ids=["first to last", "last to first"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 20])
def test_columns_that_a_reader_alone_takes_in_turns_are_an_order(count: int, sign: int, order: int) -> None:
    """A batch of rows of each column, then the next one."""
    turns = [column * 10**6 + row for row in range(500) for column in list(range(count))[::order]]
    assert shows_alone_after([sign * place for place in turns]) is None


def test_one_place_again_and_again_is_an_order() -> None:
    assert shows_after([5] * 1000) is None


def test_a_pass_after_disorder_is_an_order_again() -> None:
    """What a reader does long enough counts for more than how it began."""
    places_so_far = Disorder()
    for place in random.Random(1).choices(range(10**9), k=100):
        places_so_far.add(place)
    assert places_so_far.degree() >= DISORDER_MIN
    for place in range(200):
        places_so_far.add(10**9 + place)
    assert places_so_far.degree() < DISORDER_MIN
    for place in random.Random(2).choices(range(10**9), k=10_000):
        places_so_far.add(place)
    assert places_so_far.degree() >= DISORDER_MIN
