"""Recognising the order in which the files of a directory are opened."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.siblings import SORTED_FILES_MAX, WINDOW_FILES_MAX, Siblings


def walk(siblings: Siblings, positions: list[int]) -> tuple[int, int]:
    """Opens in that order; returns how many opens were foreseen, and how many files were fetched ahead in vain."""
    fetched: set[int] = set()
    foreseen = 0
    for position in positions:
        foreseen += position in fetched
        fetched.update(siblings.on_open(position))
    return foreseen, len(fetched - set(positions))


NUMBERED = [f"img_{number}.jpg".encode() for number in range(1000)]


def test_the_order_of_the_listing() -> None:
    foreseen, wasted = walk(Siblings(NUMBERED), list(range(1000)))
    assert foreseen >= 996
    assert wasted == 0


def test_sorted_names_when_the_listing_has_another_order() -> None:
    """`for name in sorted(os.listdir(d))` over a listing in numeric order."""
    positions = sorted(range(1000), key=lambda position: NUMBERED[position])
    foreseen, wasted = walk(Siblings(NUMBERED), positions)
    assert foreseen >= 990
    assert wasted <= 8


def test_numbers_in_names_when_the_listing_is_sorted() -> None:
    """img_2 before img_10, over a listing in alphabetical order."""
    names = sorted(NUMBERED)
    order = sorted(range(1000), key=lambda position: int(names[position][4:-4]))
    foreseen, _ = walk(Siblings(names), order)
    assert foreseen >= 985


@pytest.mark.parametrize("count", [20, 1000, SORTED_FILES_MAX + 1])
def test_from_the_end(count: int) -> None:
    """`sorted(..., reverse=True)`, over a directory of any size."""
    names = [f"{number:07}.jpg".encode() for number in range(count)]
    opened = list(reversed(range(count)))[:1000]
    foreseen, wasted = walk(Siblings(names), opened)
    assert foreseen >= len(opened) - 6
    assert wasted <= (0 if count <= 1000 else WINDOW_FILES_MAX)


def test_numbers_in_names_from_the_end() -> None:
    names = sorted(NUMBERED)
    order = sorted(range(1000), key=lambda position: -int(names[position][4:-4]))
    foreseen, wasted = walk(Siblings(names), order)
    assert foreseen >= 985
    assert wasted == 0


@pytest.mark.parametrize("step", [1, -1])
def test_several_readers_share_one_listing(step: int) -> None:
    """Eight workers take the files in turn: opens arrive slightly out of order."""
    chance = random.Random(7)
    positions = []
    for start in range(0, 1000, 8):
        group = list(range(start, min(start + 8, 1000)))
        chance.shuffle(group)
        positions += group
    foreseen, wasted = walk(Siblings(NUMBERED), positions[::step])
    assert foreseen >= 950
    assert wasted == 0


def test_no_order_is_seen_in_a_shuffled_one() -> None:
    """Next to nothing is fetched for the sake of an order that is none."""
    positions = list(range(1000))
    random.Random(3).shuffle(positions)
    siblings = Siblings(NUMBERED)
    ahead = sum(len(siblings.on_open(position)) for position in positions)
    assert ahead <= 30
    assert siblings.shuffle is not None
    for position in range(3):
        siblings.on_open(position)
    assert siblings.shuffle is None, "that is an order"


def test_belief_ends_at_once() -> None:
    siblings = Siblings(NUMBERED)
    walk(siblings, list(range(50)))
    assert siblings.on_open(700) == []
    assert siblings.on_open(300) == []


@given(count=st.integers(1, 300), data=st.data())
def test_plans_are_well_formed(count: int, data: st.DataObject) -> None:
    """Positions are valid, distinct within a plan and never more than the window."""
    names = [b"%d" % number for number in range(count)]
    siblings = Siblings(names)
    for position in data.draw(st.lists(st.integers(0, count - 1), max_size=80)):
        plan = siblings.on_open(position)
        assert len(plan) == len(set(plan)) <= WINDOW_FILES_MAX
        assert all(0 <= p < count for p in plan)
