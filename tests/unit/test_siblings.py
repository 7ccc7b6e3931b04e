"""Recognising the order in which the files of a directory are opened."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model.siblings import PASSED_FILES_MAX, SORTED_FILES_MAX, WINDOW_FILES_MAX, Directories, Siblings


def follow(siblings: Siblings, positions: list[int]) -> tuple[int, set[int]]:
    """Opens in that order; returns how many opens were foreseen, and what was fetched ahead."""
    fetched: set[int] = set()
    foreseen = 0
    for position in positions:
        foreseen += position in fetched
        fetched.update(siblings.on_open(position))
    return foreseen, fetched


def walk(siblings: Siblings, positions: list[int]) -> tuple[int, int]:
    """The same; returns how many opens were foreseen, and how many files were fetched ahead in vain."""
    foreseen, fetched = follow(siblings, positions)
    return foreseen, len(fetched - set(positions))


NUMBERED = [f"img_{number}.jpg".encode() for number in range(1000)]


def test_the_order_of_the_listing() -> None:
    foreseen, wasted = walk(Siblings(NUMBERED, Directories()), list(range(1000)))
    assert foreseen >= 996
    assert wasted == 0


def test_sorted_names_when_the_listing_has_another_order() -> None:
    """`for name in sorted(os.listdir(d))` over a listing in numeric order."""
    positions = sorted(range(1000), key=lambda position: NUMBERED[position])
    foreseen, wasted = walk(Siblings(NUMBERED, Directories()), positions)
    assert foreseen >= 990
    assert wasted <= 8


def test_numbers_in_names_when_the_listing_is_sorted() -> None:
    """img_2 before img_10, over a listing in alphabetical order."""
    names = sorted(NUMBERED)
    order = sorted(range(1000), key=lambda position: int(names[position][4:-4]))
    foreseen, _ = walk(Siblings(names, Directories()), order)
    assert foreseen >= 985


@pytest.mark.parametrize("count", [20, 1000, SORTED_FILES_MAX + 1])
def test_from_the_end(count: int) -> None:
    """`sorted(..., reverse=True)`, over a directory of any size."""
    names = [f"{number:07}.jpg".encode() for number in range(count)]
    opened = list(reversed(range(count)))[:1000]
    foreseen, wasted = walk(Siblings(names, Directories()), opened)
    assert foreseen >= len(opened) - 6
    assert wasted <= (0 if count <= 1000 else WINDOW_FILES_MAX)


def test_numbers_in_names_from_the_end() -> None:
    names = sorted(NUMBERED)
    order = sorted(range(1000), key=lambda position: -int(names[position][4:-4]))
    foreseen, wasted = walk(Siblings(names, Directories()), order)
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
    foreseen, wasted = walk(Siblings(NUMBERED, Directories()), positions[::step])
    assert foreseen >= 950
    assert wasted == 0


def lanes(kind: str, count: int, readers: int) -> list[list[int]]:
    """What each reader opens, one after the other."""
    if kind == "in turn":
        return [list(range(reader, count, readers)) for reader in range(readers)]
    if kind == "parts":
        part = count // readers
        return [list(range(reader * part, (reader + 1) * part)) for reader in range(readers)]
    batch = int(kind.removeprefix("batches of "))
    return [
        [file for start in range(reader * batch, count, readers * batch) for file in range(start, start + batch)]
        for reader in range(readers)
    ]


def race(siblings: Siblings, lanes: list[list[int]], *, is_known: bool = True) -> tuple[float, float]:
    """All of them open at once, none waits for another, a file takes each now longer and now less long. Returns which part of the
    opens was foreseen, and how many files were named for each that is there; all are opened in the end. `is_known`: who opens."""
    chance = random.Random(7)
    due = [(chance.random(), reader) for reader in range(len(lanes))]
    left = [iter(lane) for lane in lanes]
    opened: set[int] = set()
    fetched: set[int] = set()
    foreseen = named = 0
    while due:
        now, reader = heapq.heappop(due)
        position = next(left[reader], None)
        if position is not None:
            foreseen += position in fetched
            opened.add(position)
            plan = list(siblings.on_open(position, 4000 + reader if is_known else 0))
            named += len(plan)
            fetched.update(plan)
            heapq.heappush(due, (now + chance.uniform(0.2, 1.8), reader))
    return foreseen / len(opened), named / len(opened)


@pytest.mark.parametrize("readers", [2, 8, 16, 48])
@pytest.mark.parametrize("kind", ["in turn", "parts", "batches of 32"])
def test_readers_that_do_not_wait_for_each_other(kind: str, readers: int) -> None:
    """A data loader's workers: each has every eighth file, or a batch of 32 and then the next but seven, or a part of its own."""
    foreseen, named = race(
        Siblings([b"%06d" % number for number in range(6144)], Directories()), lanes(kind, 6144, readers)
    )
    assert foreseen > (0.9 if kind == "batches of 32" else 0.96)
    assert named <= 1


@pytest.mark.parametrize("readers", [2, 8, 16])
def test_readers_that_nobody_can_tell_from_each_other(readers: int) -> None:
    """They are of another container, and take the files in turn."""
    foreseen, named = race(Siblings(NUMBERED, Directories()), lanes("in turn", 1000, readers), is_known=False)
    assert foreseen > 0.95
    assert named <= 1


def test_a_file_that_is_left_out_now_and_then_changes_nothing() -> None:
    wanted = [file for file in range(1000) if file % 5]
    foreseen, wasted = walk(Siblings(NUMBERED, Directories()), wanted)
    assert foreseen >= len(wanted) - 4
    assert wasted <= 200
    siblings = Siblings(NUMBERED, Directories())
    walk(siblings, [0, 2, 3])
    assert list(siblings.on_open(5)) == [8], "those before it were named before, and no other is left out"


@pytest.mark.parametrize("step", [2, 10, 100, -10])
def test_every_tenth_file(step: int) -> None:
    """What is between is not fetched, even if several readers have just read all."""
    siblings = Siblings([b"%06d" % number for number in range(4000)], Directories())
    race(siblings, lanes("in turn", 200, 2), is_known=False)
    wanted = list(range(400, 4000))[::step]
    foreseen, fetched = follow(siblings, wanted)
    assert foreseen >= len(wanted) - 10
    assert sum((file - wanted[0]) % step != 0 for file in fetched) <= 8


def test_what_was_passed_over_is_fetched_when_it_turns_out_to_be_wanted() -> None:
    """One reader is quick off the mark: of the eight that take files in turn he alone is seen at first."""
    siblings = Siblings(NUMBERED, Directories())
    walk(siblings, list(range(0, 64, 8)))
    foreseen, _ = walk(siblings, [file for file in range(49, 200) if file % 8])
    assert foreseen > 110


def test_all_other_epochs_are_foreseen_as_well() -> None:
    siblings = Siblings(NUMBERED[:50], Directories())
    for _ in range(300):
        foreseen, _ = walk(siblings, list(range(50)))
        assert foreseen >= 46


def test_openers_who_go_back_and_forth_between_directories() -> None:
    """Images and labels: each of the readers, who have a part of them each, has a trail in either."""
    both = Directories()
    images, labels = Siblings(NUMBERED, both), Siblings(NUMBERED[:400], both)
    fetched: dict[int, set[int]] = {0: set(), 1: set()}
    foreseen = 0
    for step in range(100):
        for reader in range(4):
            for which, siblings in enumerate((images, labels)):
                position = (200 if which == 0 else 100) * reader + step
                foreseen += position in fetched[which]
                fetched[which].update(siblings.on_open(position, reader))
    assert foreseen >= 2 * 4 * 97


def test_those_who_have_an_order_each_share_one_window() -> None:
    """What is ahead of all of them together is what may be ahead of one; who has ended leaves his part to the others."""
    siblings = Siblings([b"%06d" % number for number in range(8000)], Directories())
    fetched: set[int] = set()
    for step in range(100):
        for reader in range(8):
            fetched.update(siblings.on_open(1000 * reader + step, reader))
    ahead = [sum(1000 * reader + 99 < file < 1000 * (reader + 1) for file in fetched) for reader in range(8)]
    assert sum(ahead) <= WINDOW_FILES_MAX
    assert min(ahead) >= WINDOW_FILES_MAX // 8 // 2
    for step in range(100, 300):
        for reader in range(2):
            fetched.update(siblings.on_open(1000 * reader + step, reader))
    ahead = [sum(1000 * reader + 299 < file < 1000 * (reader + 1) for file in fetched) for reader in range(2)]
    assert WINDOW_FILES_MAX >= sum(ahead) >= WINDOW_FILES_MAX // 2


@given(length=st.integers(1, 80))
def test_who_stops_has_cost_twice_what_he_read_at_most(length: int) -> None:
    _, wasted = walk(Siblings(NUMBERED, Directories()), list(range(300, 300 + length)))
    assert wasted <= max(4, length)


def test_who_has_read_directories_to_their_end_need_not_earn_it_again() -> None:
    """In the next one as much is ahead as the run deserves; who has stopped in each has spent what he had."""
    for share, ahead in ((1, 32), (2, 6)):
        directories = Directories()
        for _ in range(20):
            walk(Siblings(NUMBERED[:50], directories), list(range(50 // share)))
        _, fetched = follow(Siblings(NUMBERED[:50], directories), list(range(6)))
        assert max(fetched) - 5 == ahead


def test_where_the_caller_stops_the_next_open_goes_on() -> None:
    siblings = Siblings(NUMBERED, Directories())
    walk(siblings, [0, 1])
    some = siblings.on_open(2)
    assert [next(some), next(some)] == [3, 4], "and at 4 is stopped"
    assert list(siblings.on_open(3)) == [4, 5, 6, 7], "no more than were opened"


def test_files_that_nobody_opens_are_not_a_slow_reader() -> None:
    """Every eighth file was wanted; one of those between is no sign that this goes on."""
    siblings = Siblings(NUMBERED, Directories())
    walk(siblings, list(range(0, 400, 8)))
    assert list(siblings.on_open(201)) == []
    assert walk(siblings, [400, 401]) == (0, 0)


def test_what_was_passed_over_before_a_break_is_forgotten() -> None:
    siblings = Siblings([b"%06d" % number for number in range(4000)], Directories())
    walk(siblings, list(range(0, 100, 2)))
    walk(siblings, list(range(2000, 2100)))
    assert siblings.shuffle is None
    walk(siblings, [51])
    assert siblings.shuffle is not None, "that is a break"


def test_no_reader_is_a_thousand_files_slower() -> None:
    siblings = Siblings([b"%06d" % number for number in range(4000)], Directories())
    walk(siblings, [700, 300, *range(0, 3000, 2)])
    oldest = 2997 - 2 * (PASSED_FILES_MAX - 1)
    walk(siblings, [oldest])
    assert siblings.shuffle is None
    walk(siblings, [oldest - 2])
    assert siblings.shuffle is not None


def test_no_order_is_seen_in_a_shuffled_one() -> None:
    """Next to nothing is fetched for the sake of an order that is none."""
    positions = list(range(1000))
    random.Random(3).shuffle(positions)
    siblings = Siblings(NUMBERED, Directories())
    ahead = sum(len(list(siblings.on_open(position))) for position in positions)
    assert ahead <= 30
    assert siblings.shuffle is not None
    walk(siblings, [0, 1, 2])
    assert siblings.shuffle is None, "that is an order"


def test_belief_ends_at_once() -> None:
    siblings = Siblings(NUMBERED, Directories())
    walk(siblings, list(range(50)))
    assert walk(siblings, [700, 300]) == (0, 0)


@given(count=st.integers(1, 300), data=st.data())
def test_plans_are_well_formed(count: int, data: st.DataObject) -> None:
    """Positions are valid, distinct within a plan and never more than the window."""
    names = [b"%d" % number for number in range(count)]
    siblings = Siblings(names, Directories())
    for position in data.draw(st.lists(st.integers(0, count - 1), max_size=80)):
        plan = list(siblings.on_open(position))
        assert len(plan) == len(set(plan)) <= WINDOW_FILES_MAX
        assert all(0 <= p < count for p in plan)
