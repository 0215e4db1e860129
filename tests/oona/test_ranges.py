from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.oona.ranges import RangeSet

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])))


def numbers(pairs) -> set[int]:
    return {number for first, last in pairs for number in range(first, last + 1)}


@given(ranges)
def test_it_holds_what_was_added_and_nothing_else(pairs):
    held = RangeSet(pairs)
    assert {number for number in range(60) if number in held} == numbers(pairs)


@given(ranges)
def test_its_ranges_ascend_and_do_not_touch(pairs):
    held = list(RangeSet(pairs))
    assert all(first <= last for first, last in held)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(held))
    assert len(RangeSet(pairs)) == len(held)


@given(ranges)
def test_order_of_adding_makes_no_difference(pairs):
    assert RangeSet(pairs) == RangeSet(reversed(pairs))


@given(ranges, st.integers(0, 50))
def test_a_prefix_ends_at_the_first_number_that_is_not_inside(pairs, start):
    held = RangeSet(pairs)
    inside = numbers(pairs)
    expected = next(number for number in range(start, 100) if number not in inside)
    assert held.pop_prefix(start) == expected
    assert numbers(held) == {number for number in inside if number > expected}


@given(ranges)
def test_as_json_it_is_its_ranges(pairs):
    held = RangeSet(pairs)
    assert json.loads(held.to_json()) == [list(pair) for pair in held]


@given(ranges)
def test_a_copy_is_independent(pairs):
    held = RangeSet(pairs)
    copy = held.copy()
    held.add(1000, 1001)
    assert 1000 not in copy
    assert repr(copy) == f"RangeSet({list(copy)})"


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="5 to 4 is empty"):
        RangeSet([(5, 4)])
