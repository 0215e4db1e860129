from __future__ import annotations

from itertools import groupby

import pytest

from esperml.oona.groups import GivenUp, Group, Member, Redelivery
from esperml.oona.log import GroupProgress
from esperml.oona.ranges import RangeSet
from esperml.v1 import oona_pb2

ALL: frozenset[str] = frozenset()
AT_ONCE = Redelivery(max_attempts=100, min_delay_s=0, max_delay_s=0)
NACKED = oona_pb2.DEAD_LETTER_REASON_NACKED
EXPIRED = oona_pb2.DEAD_LETTER_REASON_EXPIRED
LEFT = oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT


def member(ack_deadline_s: float = 30, redelivery: Redelivery = AT_ONCE) -> Member:
    return Member(ack_deadline_s, redelivery)


def group_of(*members: Member) -> Group:
    group = Group(GroupProgress(0, RangeSet()))
    for one in members:
        group.join(one)
    return group


def route(group: Group, first: int, runs: str, wanted: frozenset[str] = ALL) -> None:
    """Route a frame whose records are of these runs, one letter each."""
    spans = []
    start = first
    for run_id, records in groupby(runs):
        end = start + len(list(records))
        spans.append((start, end - 1, run_id))
        start = end
    group.route(first, spans, wanted)


def deliver(group: Group, member: Member, now_s: float = 0.0, most: int = 1000) -> list[tuple[int, int]]:
    """Lease what waits for a member, as (offset, attempt)."""
    group.due(member, now_s)
    delivered: list[tuple[int, int]] = []
    while len(delivered) < most and (waiting := group.peek(member)) is not None:
        span, attempt = waiting
        last = min(span.last, span.first + most - len(delivered) - 1)
        delivered += [(offset, attempt) for offset in range(span.first, last + 1)]
        group.lease(member, last, now_s)
    return delivered


def offsets(delivered) -> list[int]:
    return [offset for offset, _ in delivered]


def leased(member: Member) -> list[int]:
    return [offset for span in member.leases for offset in range(span.first, span.last + 1)]


def test_each_run_goes_to_one_member_and_members_share_the_runs():
    one, two = member(), member()
    group = group_of(one, two)
    route(group, 0, "ababa")
    assert offsets(deliver(group, one)) == [0, 2, 4]
    assert offsets(deliver(group, two)) == [1, 3]


def test_a_run_stays_where_it_is_when_a_member_joins():
    one, two = member(), member()
    group = group_of(one)
    route(group, 0, "a")
    group.join(two)
    route(group, 1, "ab")
    assert offsets(deliver(group, one)) == [0, 1]
    assert offsets(deliver(group, two)) == [2]


def test_the_committed_offset_waits_for_the_first_that_is_not_done():
    one = member()
    group = group_of(one)
    route(group, 0, "abc")
    deliver(group, one)
    group.ack(one, 1, 2)
    assert group.committed == 0
    group.ack(one, 0, 0)
    assert group.committed == 3


def test_a_part_of_what_was_delivered_together_can_be_acknowledged():
    one = member()
    group = group_of(one)
    route(group, 0, "aaaaa")
    deliver(group, one)
    group.ack(one, 2, 2)
    assert leased(one) == [0, 1, 3, 4]
    assert group.progress == GroupProgress(0, RangeSet([(2, 2)]))


def test_a_nacked_record_holds_back_its_run_and_no_other():
    one = member()
    group = group_of(one)
    route(group, 0, "abab")
    deliver(group, one)
    group.nack(one, [0], 0.0)
    route(group, 4, "ab")
    # Run a comes again from the record given back; of run b only what is new.
    assert deliver(group, one) == [(0, 2), (2, 2), (4, 1), (5, 1)]


def test_a_record_given_back_waits_twice_as_long_each_time_and_its_run_behind_it():
    one = member(redelivery=Redelivery(max_attempts=10, min_delay_s=1, max_delay_s=3))
    group = group_of(one)
    route(group, 0, "aab")
    deliver(group, one)
    group.nack(one, [0], now_s=10)
    route(group, 3, "ab")
    assert deliver(group, one, now_s=10.9) == [(4, 1)]
    assert one.next_deadline_s == 11
    assert deliver(group, one, now_s=11) == [(0, 2), (1, 2), (3, 1)]
    for now_s, delay_s in ((11.0, 2), (13.0, 3), (16.0, 3)):
        group.nack(one, [0], now_s)
        assert deliver(group, one, now_s + delay_s - 0.1) == []
        assert offsets(deliver(group, one, now_s + delay_s)) == [0, 1, 3]


def test_an_earlier_record_given_back_later_delays_the_run_anew():
    one = member(redelivery=Redelivery(max_attempts=10, min_delay_s=1, max_delay_s=60))
    group = group_of(one)
    route(group, 0, "aaa")
    deliver(group, one)
    group.nack(one, [1], now_s=0)
    group.nack(one, [0], now_s=0.5)
    assert deliver(group, one, now_s=1.4) == []
    assert deliver(group, one, now_s=1.5) == [(0, 2), (1, 2), (2, 2)]


def test_a_run_goes_on_when_the_record_it_waits_for_is_acknowledged_late():
    one = member(redelivery=Redelivery(max_attempts=10, min_delay_s=100, max_delay_s=100))
    group = group_of(one)
    route(group, 0, "aa")
    deliver(group, one)
    group.nack(one, [0], now_s=0)
    group.ack(one, 0, 0)
    assert deliver(group, one, now_s=1) == [(1, 2)]


def test_a_record_comes_again_after_its_deadline_with_its_attempts_counted():
    one = member(ack_deadline_s=10)
    group = group_of(one)
    route(group, 0, "ab")
    assert deliver(group, one, now_s=0) == [(0, 1), (1, 1)]
    assert one.next_deadline_s == 10
    group.extend(one, 0, now_s=5)
    assert deliver(group, one, now_s=9.9) == []
    assert deliver(group, one, now_s=10) == [(1, 2)]
    assert one.next_deadline_s == 15
    assert deliver(group, one, now_s=15) == [(0, 2)]


def test_an_acknowledged_record_has_no_deadline():
    one = member(ack_deadline_s=10)
    group = group_of(one)
    route(group, 0, "aa")
    deliver(group, one)
    group.ack(one, 0, 1)
    assert one.next_deadline_s is None


def test_a_late_acknowledgement_of_a_record_that_came_back_counts():
    one = member(ack_deadline_s=1)
    group = group_of(one)
    route(group, 0, "aa")
    deliver(group, one)
    group.due(one, 1)
    group.ack(one, 0, 0)
    assert deliver(group, one, now_s=1) == [(1, 2)]
    assert group.committed == 1


def test_a_member_that_dies_hands_its_runs_over_in_order():
    one, two = member(), member()
    group = group_of(one, two)
    route(group, 0, "ababa")
    deliver(group, two)
    assert deliver(group, one, most=1) == [(0, 1)]  # 2 and 4 wait.
    group.leave(one)
    assert deliver(group, two) == [(0, 2), (2, 1), (4, 1)]


def test_what_a_member_that_leaves_had_delayed_goes_to_the_others_at_once():
    one, two = member(redelivery=Redelivery(10, 100, 100)), member()
    group = group_of(one, two)
    route(group, 0, "aab")
    deliver(group, one)
    group.nack(one, [0], now_s=0)
    group.leave(one)
    assert deliver(group, two, now_s=0) == [(0, 2), (1, 2), (2, 1)]


def test_the_last_member_leaves_everything_to_the_next_one():
    one, two = member(), member()
    group = group_of(one)
    route(group, 0, "aab")
    deliver(group, one)
    group.ack(one, 1, 1)
    group.leave(one)
    assert group.cursor == 0
    group.join(two)
    route(group, 0, "aab")
    assert deliver(group, two) == [(0, 2), (2, 2)]


def test_a_member_that_leaves_for_reasons_of_its_own_counts_for_nothing():
    one, two = member(), member()
    group = group_of(one, two)
    route(group, 0, "a")
    deliver(group, one)
    group.leave(one, failed=False)
    assert deliver(group, two) == [(0, 1)]


def test_nobody_settles_what_was_delivered_to_another():
    one, two = member(), member()
    group = group_of(one, two)
    route(group, 0, "ab")
    deliver(group, one)
    group.ack(two, 0, 1)
    group.nack(two, [0], 0.0)
    group.extend(two, 0, 100.0)
    assert group.committed == 0
    assert leased(one) == [0]
    group.ack(one, 0, 2**64 - 1)
    assert group.committed == 1


def test_runs_that_nobody_asked_for_are_done_with():
    one = member()
    group = group_of(one)
    route(group, 0, "xax", frozenset("a"))
    assert offsets(deliver(group, one)) == [1]
    group.ack(one, 1, 1)
    assert group.committed == 3


def test_what_was_purged_is_done_with_and_it_says_whether_something_was_missed():
    one = member()
    group = group_of(one)
    route(group, 0, "aaa")
    assert group.skip_below(2)
    assert group.committed == 2
    assert deliver(group, one) == [(2, 1)]
    assert not group.skip_below(2)
    group.ack(one, 2, 2)
    assert not group.skip_below(3)
    group.nack(one, [2], 0.0)
    assert group.skip_below(10)
    assert group.cursor == 10


def test_a_purge_of_delivered_records_misses_nothing():
    one = member()
    group = group_of(one)
    route(group, 0, "ab")
    deliver(group, one)
    assert not group.skip_below(2)
    assert leased(one) == []
    assert group.waiting == 0


def test_a_purge_of_the_record_that_a_run_waits_for_lets_the_run_go_on():
    one = member(redelivery=Redelivery(10, 100, 100))
    group = group_of(one)
    route(group, 0, "aa")
    deliver(group, one)
    group.nack(one, [0], now_s=0)
    assert group.skip_below(1)
    assert deliver(group, one, now_s=0) == [(1, 2)]


def test_moving_forgets_what_was_under_way():
    one = member()
    group = group_of(one)
    route(group, 0, "ab")
    deliver(group, one)
    group.move(GroupProgress(1, RangeSet([(1, 1), (4, 4)])))
    assert (group.committed, group.cursor, leased(one)) == (2, 2, [])
    group.ack(one, 0, 1)
    assert group.progress == GroupProgress(2, RangeSet([(4, 4)]))


def test_a_record_that_failed_too_often_is_given_up_and_its_run_goes_on():
    one = member(redelivery=Redelivery(max_attempts=3, min_delay_s=0, max_delay_s=0))
    group = group_of(one)
    route(group, 0, "aa")
    for attempt in (1, 2, 3):
        assert deliver(group, one) == [(0, attempt), (1, attempt)]
        group.nack(one, [0], 0.0)
    assert group.given_up == {0: GivenUp(frame=0, attempts=3, reason=NACKED)}
    # The one behind it came back each time, but never for its own sake.
    assert deliver(group, one) == [(1, 4)]
    group.nack(one, [1], 0.0)
    assert deliver(group, one) == [(1, 5)]
    assert group.committed == 0
    group.bury(0)
    assert group.committed == 1


@pytest.mark.parametrize("reason", [EXPIRED, LEFT])
def test_the_reason_says_why_a_record_was_given_up(reason):
    one, two = member(5, Redelivery(1, 0, 0)), member(5, Redelivery(1, 0, 0))
    group = group_of(one)
    route(group, 0, "aab")
    deliver(group, one)
    group.join(two)
    if reason == EXPIRED:
        group.due(one, 5)
    else:
        group.leave(one)
    # Of each run, the first counts as the one that failed.
    assert group.given_up == {0: GivenUp(0, 1, reason), 2: GivenUp(0, 1, reason)}
    assert deliver(group, one if reason == EXPIRED else two, now_s=5) == [(1, 2)]


def test_what_failed_too_often_before_the_server_ended_is_given_up_when_it_is_read_again():
    one = member(redelivery=Redelivery(3, 0, 0))
    group = Group(GroupProgress(0, RangeSet(), ((1, 1, 4, 3), (2, 2, 4, 2))))
    group.join(one)
    route(group, 0, "aaaa")
    assert group.given_up == {1: GivenUp(0, 4, LEFT)}
    assert deliver(group, one) == [(0, 1), (2, 5), (3, 1)]


def test_attempts_are_part_of_the_progress_until_the_record_is_done_with():
    one = member()
    group = group_of(one)
    route(group, 0, "aaab")
    deliver(group, one)
    group.nack(one, [1], 0.0)
    assert group.progress.attempts == ((1, 1, 1, 1), (2, 2, 1, 0))
    restarted = Group(group.progress)
    restarted.join(two := member())
    route(restarted, 0, "aaab")
    assert deliver(restarted, two) == [(0, 1), (1, 2), (2, 2), (3, 1)]
    restarted.ack(two, 0, 3)
    assert restarted.progress == GroupProgress(4, RangeSet())


def test_runs_of_which_nothing_is_under_way_are_forgotten_beyond_a_number(monkeypatch):
    monkeypatch.setattr("esperml.oona.groups._MAX_IDLE_RUNS", 3)
    one = member()
    group = group_of(one)
    runs = [chr(ord("a") + number) for number in range(20)]
    route(group, 0, "z")
    deliver(group, one)
    for offset, run in enumerate(runs, 1):
        route(group, offset, run)
        deliver(group, one)
        group.ack(one, offset, offset)
    assert len(one.runs) <= 7
    assert "z" in one.runs
    assert runs[-1] in one.runs
