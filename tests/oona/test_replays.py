from __future__ import annotations

from esperml.oona.groups import Member, Redelivery
from esperml.oona.replays import Replays
from esperml.v1 import oona_pb2

EXPIRED = oona_pb2.DEAD_LETTER_REASON_EXPIRED
LEFT = oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT


def member(max_attempts: int = 3) -> Member:
    return Member(10, Redelivery(max_attempts, 1, 2))


def replays_of(*offsets: int) -> Replays:
    replays = Replays()
    for offset in offsets:
        replays.add(offset)
    return replays


def test_letters_are_delivered_in_the_order_in_which_they_were_given_back():
    replays, one = replays_of(5, 3), member()
    assert replays.peek() == (5, 1)
    replays.lease(one, 5, 0)
    assert replays.peek() == (3, 1)
    replays.add(5)
    replays.lease(one, 3, 0)
    assert replays.peek() is None


def test_a_letter_given_back_again_waits_for_its_delay():
    replays, one = replays_of(5), member()
    replays.lease(one, 5, 0)
    replays.nack(one, 5, 10)
    assert replays.peek() is None
    assert replays.next_deadline_s(one) == 11
    replays.due(one, 11)
    assert replays.peek() == (5, 2)


def test_only_the_member_that_has_a_letter_settles_it():
    replays, one, two = replays_of(5), member(), member()
    replays.lease(one, 5, 0)
    replays.nack(two, 5, 0)
    replays.extend(two, 5, 100)
    assert replays.ack(two, 0, 10) == []
    assert replays.next_deadline_s(one) == 10
    assert replays.next_deadline_s(two) is None
    assert replays.ack(one, 0, 10) == [5]
    assert not replays


def test_a_letter_held_for_too_long_comes_back_unless_its_deadline_is_extended():
    replays, one = replays_of(5), member()
    replays.lease(one, 5, 0)
    replays.extend(one, 5, 5)
    replays.due(one, 10)
    assert replays.next_deadline_s(one) == 15
    replays.due(one, 15)
    replays.due(one, 16)
    assert replays.peek() == (5, 2)


def test_a_letter_that_fails_too_often_is_given_up():
    replays, one = replays_of(5), member(max_attempts=1)
    replays.lease(one, 5, 0)
    replays.due(one, 10)
    assert replays.given_up == {5: (1, EXPIRED)}
    assert replays.peek() is None
    replays.remove(5)
    replays.add(5)
    assert replays.peek() == (5, 1)


def test_what_a_member_that_leaves_had_is_there_for_the_others_at_once():
    replays, one, two = replays_of(5), member(), member(max_attempts=2)
    replays.lease(one, 5, 0)
    replays.leave(one, 0, failed=True)
    assert replays.peek() == (5, 2)
    replays.lease(two, 5, 0)
    replays.leave(two, 0, failed=True)
    assert replays.given_up == {5: (2, LEFT)}


def test_a_member_that_leaves_for_reasons_of_its_own_counts_for_nothing():
    replays, one = replays_of(5), member(max_attempts=1)
    replays.lease(one, 5, 0)
    replays.leave(one, 0, failed=False)
    assert replays.peek() == (5, 1)


def test_a_letter_that_was_removed_while_it_was_delayed_does_not_come_again():
    replays, one = replays_of(5), member()
    replays.lease(one, 5, 0)
    replays.nack(one, 5, 0)
    replays.remove(5)
    replays.due(one, 100)
    assert replays.peek() is None
    assert replays.next_deadline_s(one) is None
