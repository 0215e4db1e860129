from __future__ import annotations

from esperml.oona.groups import Group, Member
from esperml.oona.log import GroupProgress
from esperml.oona.ranges import RangeSet

ALL: frozenset[str] = frozenset()


def group_of(*members: Member) -> Group:
    group = Group(GroupProgress(0, RangeSet()))
    for member in members:
        group.join(member)
    return group


def deliver(group: Group, member: Member, now_s: float = 0.0) -> list[tuple[int, int]]:
    """Lease everything that waits for a member, as (offset, attempt)."""
    delivered = []
    while (record := group.peek(member)) is not None:
        delivered.append((record.offset, group.next_attempt(record.offset)))
        group.lease(member, now_s)
    return delivered


def offsets(delivered) -> list[int]:
    return [offset for offset, _ in delivered]


def test_each_run_goes_to_one_member_and_members_share_the_runs():
    one, two = Member(30), Member(30)
    group = group_of(one, two)
    group.route(0, 0, ["a", "b", "a", "b", "a"], ALL)
    assert offsets(deliver(group, one)) == [0, 2, 4]
    assert offsets(deliver(group, two)) == [1, 3]


def test_a_run_stays_where_it_is_when_a_member_joins():
    one, two = Member(30), Member(30)
    group = group_of(one)
    group.route(0, 0, ["a"], ALL)
    group.join(two)
    group.route(1, 1, ["a", "b"], ALL)
    assert offsets(deliver(group, one)) == [0, 1]
    assert offsets(deliver(group, two)) == [2]


def test_the_committed_offset_waits_for_the_first_that_is_not_done():
    one = Member(30)
    group = group_of(one)
    group.route(0, 0, ["a", "b", "c"], ALL)
    deliver(group, one)
    group.ack(one, 1, 2)
    assert group.committed == 0
    group.ack(one, 0, 0)
    assert group.committed == 3


def test_a_nacked_record_holds_back_its_run_and_no_other():
    one = Member(30)
    group = group_of(one)
    group.route(0, 0, ["a", "b", "a", "b"], ALL)
    deliver(group, one)
    group.nack(one, 0)
    group.route(4, 4, ["a", "b"], ALL)
    # Run a comes again from the record given back; of run b only what is new.
    assert deliver(group, one) == [(0, 2), (2, 2), (4, 1), (5, 1)]


def test_a_record_comes_again_after_its_deadline_with_its_attempts_counted():
    one = Member(ack_deadline_s=10)
    group = group_of(one)
    group.route(0, 0, ["a", "b"], ALL)
    assert deliver(group, one, now_s=0) == [(0, 1), (1, 1)]
    assert one.next_deadline_s == 10
    group.extend(one, 0, now_s=5)
    group.expire(one, now_s=9.9)
    assert deliver(group, one, now_s=9.9) == []
    group.expire(one, now_s=10)
    assert deliver(group, one, now_s=10) == [(1, 2)]
    assert one.next_deadline_s == 15
    group.expire(one, now_s=15)
    assert deliver(group, one, now_s=15) == [(0, 2)]


def test_a_late_acknowledgement_of_a_record_that_came_back_counts():
    one = Member(ack_deadline_s=1)
    group = group_of(one)
    group.route(0, 0, ["a", "a"], ALL)
    deliver(group, one)
    group.expire(one, now_s=1)
    group.ack(one, 0, 0)
    assert deliver(group, one, now_s=1) == [(1, 2)]
    assert group.committed == 1


def test_a_member_that_dies_hands_its_runs_over_in_order():
    one, two = Member(30), Member(30)
    group = group_of(one, two)
    group.route(0, 0, ["a", "b", "a", "b", "a"], ALL)
    deliver(group, two)
    assert group.peek(one) is not None
    group.lease(one, 0.0)  # Offset 0 is delivered, 2 and 4 wait.
    group.leave(one)
    assert deliver(group, two) == [(0, 2), (2, 1), (4, 1)]


def test_the_last_member_leaves_everything_to_the_next_one():
    one, two = Member(30), Member(30)
    group = group_of(one)
    group.route(0, 0, ["a", "a", "b"], ALL)
    deliver(group, one)
    group.ack(one, 1, 1)
    group.leave(one)
    assert group.cursor == 0
    group.join(two)
    group.route(0, 0, ["a", "a", "b"], ALL)
    assert deliver(group, two) == [(0, 2), (2, 2)]


def test_nobody_settles_what_was_delivered_to_another():
    one, two = Member(30), Member(30)
    group = group_of(one, two)
    group.route(0, 0, ["a", "b"], ALL)
    deliver(group, one)
    group.ack(two, 0, 1)
    group.nack(two, 0)
    group.extend(two, 0, 100.0)
    assert group.committed == 0
    assert list(one.leases) == [0]
    group.ack(one, 0, 2**64 - 1)
    assert group.committed == 1


def test_runs_that_nobody_asked_for_are_done_with():
    one = Member(30)
    group = group_of(one)
    group.route(0, 0, ["x", "a", "x"], frozenset({"a"}))
    assert offsets(deliver(group, one)) == [1]
    group.ack(one, 1, 1)
    assert group.committed == 3


def test_what_was_purged_is_done_with_and_it_says_whether_something_was_missed():
    one = Member(30)
    group = group_of(one)
    group.route(0, 0, ["a", "a", "a"], ALL)
    assert group.skip_below(2)
    assert group.committed == 2
    assert deliver(group, one) == [(2, 1)]
    assert not group.skip_below(2)
    group.ack(one, 2, 2)
    assert not group.skip_below(3)
    group.nack(one, 2)
    assert group.skip_below(10)
    assert group.cursor == 10


def test_a_purge_of_delivered_records_misses_nothing():
    one = Member(30)
    group = group_of(one)
    group.route(0, 0, ["a", "b"], ALL)
    deliver(group, one)
    assert not group.skip_below(2)
    assert one.leases == {}
    assert group.waiting == 0


def test_moving_forgets_what_was_under_way():
    one = Member(30)
    group = group_of(one)
    group.route(0, 0, ["a", "b"], ALL)
    deliver(group, one)
    group.move(GroupProgress(1, RangeSet([(1, 1), (4, 4)])))
    assert (group.committed, group.cursor, one.leases) == (2, 2, {})
    group.ack(one, 0, 1)
    assert group.progress == GroupProgress(2, RangeSet([(4, 4)]))
