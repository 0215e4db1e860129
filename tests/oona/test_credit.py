from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from esperml.oona.credit import Credit

grants = st.tuples(st.integers(0, 5), st.integers(0, 100)).map(lambda pair: ("grant", *pair))
takes = st.integers(0, 60).map(lambda size: ("take", size))


def test_no_credit_allows_nothing():
    assert not Credit().take(0)


def test_a_grant_without_bytes_allows_records_of_any_size():
    credit = Credit()
    credit.grant(1, 0)
    assert credit.take(10**9)
    assert not credit.take(1)


def test_a_record_larger_than_the_bytes_granted_waits_for_more():
    credit = Credit()
    credit.grant(3, 10)
    assert not credit.take(15)
    credit.grant(0, 5)
    assert credit.take(15)
    assert credit.messages == 2


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
        elif credit.take(step[1]):
            taken += 1
            taken_bytes += step[1]
    assert taken <= messages
    if metered == messages:
        assert taken_bytes <= sized
    assert credit.messages >= 0
    assert credit.bytes >= 0
    assert credit.unmetered >= 0
