from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from esperml.oona.credit import Credit

grants = st.tuples(st.integers(0, 5), st.integers(0, 100)).map(lambda pair: ("grant", *pair))
takes = st.lists(st.integers(0, 60), max_size=6).map(lambda sizes: ("take", sizes))


def take(credit: Credit, *sizes: int) -> int:
    """Ask for records of these sizes. Returns how many were paid for."""
    return credit.take(list(accumulate(sizes, initial=0)), 0, len(sizes))


class OneByOne:
    """The rule of :class:`Credit`, record by record."""

    def __init__(self) -> None:
        self.messages = self.bytes = self.unmetered = 0

    def take(self, size: int) -> bool:
        if self.messages and size <= self.bytes:
            self.messages -= 1
            self.bytes -= size
            return True
        if self.unmetered:
            self.unmetered -= 1
            return True
        return False


def test_no_credit_allows_nothing():
    assert take(Credit(), 0) == 0


def test_a_grant_without_bytes_allows_records_of_any_size():
    credit = Credit()
    credit.grant(1, 0)
    assert take(credit, 10**9, 1) == 1


def test_a_record_larger_than_the_bytes_granted_waits_for_more():
    credit = Credit()
    credit.grant(3, 10)
    assert take(credit, 15) == 0
    credit.grant(0, 5)
    assert take(credit, 15) == 1
    assert credit.messages == 2


def test_only_what_is_asked_for_is_paid_for():
    credit = Credit()
    credit.grant(10, 100)
    assert credit.take([0, 10, 20, 30, 40], 1, 3) == 3
    assert (credit.messages, credit.bytes) == (8, 80)


@given(st.lists(grants | takes))
def test_many_records_are_paid_for_as_if_one_after_the_other(steps):
    credit, simple = Credit(), OneByOne()
    for step in steps:
        if step[0] == "grant":
            credit.grant(step[1], step[2])
            if step[2]:
                simple.messages += step[1]
                simple.bytes += step[2]
            else:
                simple.unmetered += step[1]
        else:
            expected = 0
            while expected < len(step[1]) and simple.take(step[1][expected]):
                expected += 1
            assert take(credit, *step[1]) == expected
        assert (credit.messages, credit.bytes, credit.unmetered) == (simple.messages, simple.bytes, simple.unmetered)


@given(st.lists(grants | takes))
def test_never_more_is_taken_than_was_granted(steps):
    credit = Credit()
    messages = metered = sized = taken = taken_bytes = 0
    for step in steps:
        if step[0] == "grant":
            credit.grant(step[1], step[2])
            messages += step[1]
            if step[2]:
                metered += step[1]
                sized += step[2]
        else:
            count = take(credit, *step[1])
            taken += count
            taken_bytes += sum(step[1][:count])
    assert taken <= messages
    if metered == messages:
        assert taken_bytes <= sized
    assert min(credit.messages, credit.bytes, credit.unmetered) >= 0
