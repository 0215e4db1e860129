from __future__ import annotations

from time import process_time

from esperml.oona.backlog import Backlog
from esperml.oona.groups import Group, Member, Redelivery
from esperml.oona.leases import Span
from esperml.oona.log import GroupProgress
from esperml.oona.ranges import RangeSet


def span(first: int, run_id: str, last: int | None = None) -> Span:
    return Span(first, first if last is None else last, first, run_id)


def firsts(backlog: Backlog) -> list[tuple[int, str]]:
    """Takes out all that may go on."""
    taken = []
    while (following := backlog.first()) is not None:
        taken.append((following.first, following.run_id))
        backlog.take_first(following.last)
    return taken


def test_runs_are_merged_by_offset_and_a_delayed_one_is_left_out_until_it_goes_on():
    backlog = Backlog()
    for offset, run_id in enumerate("abcab"):
        backlog.append(span(offset, run_id))
    backlog.delay("a", 5.0, 0)
    assert backlog.next_resume_s == 5.0
    assert firsts(backlog) == [(1, "b"), (2, "c"), (4, "b")]
    assert len(backlog) == 2
    backlog.resume("a")
    assert firsts(backlog) == [(0, "a"), (3, "a")]
    assert len(backlog) == 0


def test_what_comes_back_stands_before_what_waits_of_its_run():
    backlog = Backlog()
    backlog.append(span(3, "a"))
    backlog.append(span(4, "b"))
    backlog.prepend("a", [span(0, "a"), span(2, "a")])
    backlog.prepend("b", [])
    assert [one.first for one in backlog.overlapping(1, 3)] == [2, 3]
    assert firsts(backlog) == [(0, "a"), (2, "a"), (3, "a"), (4, "b")]


def test_a_part_of_a_span_can_be_taken_and_the_rest_waits():
    backlog = Backlog()
    backlog.append(span(0, "a", 9))
    assert backlog.first() == span(0, "a", 9)
    assert backlog.take_first(3) == span(0, "a", 3)
    assert backlog.first() == span(0, "a", 9)._replace(first=4)


def test_places_of_runs_that_come_back_again_and_again_do_not_pile_up():
    backlog = Backlog()
    backlog.append(span(0, "a"))
    backlog.append(span(1, "a"))
    for _ in range(1000):
        assert backlog.first() == span(0, "a")
        backlog.take_first(0)
        backlog.delay("a", 1.0, 0)
        backlog.prepend("a", [span(0, "a")])
        backlog.resume("a")
    assert len(backlog._heads) < 100
    assert firsts(backlog) == [(0, "a"), (1, "a")]


def seconds_to_recover(runs: int, waiting_of_each: int) -> float:
    """Time for the leases of so many runs to end at once and their records to be acknowledged late, one by one."""
    group = Group(GroupProgress(0, RangeSet()))
    member = Member(1.0, Redelivery(100, 1.0, 1.0))
    group.join(member)
    total = runs * (1 + waiting_of_each)
    for offset in range(total):
        group.route(offset, [(offset, offset, f"run-{offset % runs}")], frozenset())
    for offset in range(runs):
        group.peek(member)
        group.lease(member, offset, 0.0)
    began_s = process_time()
    assert group.due(member, 1.0)
    for offset in range(runs):
        group.ack(member, offset, offset)
    took_s = process_time() - began_s
    assert group.committed == runs
    return took_s


def test_leases_of_many_runs_that_end_at_once_cost_no_more_the_more_waits_behind_them():
    few = min(seconds_to_recover(400, 4) for _ in range(3))
    many = min(seconds_to_recover(400, 64) for _ in range(3))
    # Sixteen times as much waits; a pass over it for each run takes about as many times as long.
    assert many < 8 * few
