"""Groups, which work by spans, against the same rules record by record."""

from __future__ import annotations

from copy import deepcopy
from itertools import groupby

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esperml.oona.groups import Group, Member, Redelivery
from esperml.oona.log import GroupProgress
from esperml.oona.ranges import RangeSet
from esperml.v1 import oona_pb2

NACKED = oona_pb2.DEAD_LETTER_REASON_NACKED
EXPIRED = oona_pb2.DEAD_LETTER_REASON_EXPIRED
LEFT = oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT
REDELIVERIES = (Redelivery(3, 0, 0), Redelivery(3, 1, 3), Redelivery(1, 1, 1), Redelivery(5, 0.5, 60))


class SimpleGroup:
    """What :class:`Group` does, said of each record by itself. Members stand for themselves and do nothing here."""

    def __init__(self, runs: list[str]) -> None:
        self.runs = runs
        self.members: list[Member] = []
        self.wanted: frozenset[str] = frozenset()
        self.done: set[int] = set()
        self.deliveries: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.restart()

    def restart(self) -> None:
        self.cursor = self.committed
        self.owners: dict[str, Member] = {}
        self.queued: dict[int, Member] = {}
        self.leased: dict[int, tuple[Member, float]] = {}
        self.delayed: dict[tuple[Member, str], tuple[float, int]] = {}
        self.given_up: dict[int, oona_pb2.DeadLetterReason.ValueType] = {}

    @property
    def committed(self) -> int:
        offset = 0
        while offset in self.done:
            offset += 1
        return offset

    def finish(self, offset: int) -> None:
        self.done.add(offset)
        for kept in (self.deliveries, self.failures, self.queued, self.leased, self.given_up):
            kept.pop(offset, None)

    def enqueue(self, offset: int) -> None:
        run = self.runs[offset]
        if run not in self.owners:
            held = list(self.owners.values())
            self.owners[run] = min(self.members, key=held.count)
        owner = self.owners[run]
        if self.failures.get(offset, 0) >= owner.redelivery.max_attempts:
            self.given_up[offset] = LEFT
        else:
            self.queued[offset] = owner

    def route(self) -> None:
        for offset in range(self.cursor, len(self.runs)):
            if offset in self.done:
                continue
            if self.wanted and self.runs[offset] not in self.wanted:
                self.finish(offset)
            else:
                self.enqueue(offset)
        self.cursor = max(self.cursor, len(self.runs))

    def waiting(self, member: Member) -> list[tuple[int, int]]:
        return [
            (offset, self.deliveries.get(offset, 0) + 1)
            for offset, owner in sorted(self.queued.items())
            if owner is member and (member, self.runs[offset]) not in self.delayed
        ]

    def deliver(self, member: Member, offset: int, now_s: float) -> None:
        del self.queued[offset]
        self.leased[offset] = (member, now_s + member.ack_deadline_s)

    def held(self, member: Member) -> list[int]:
        return sorted(offset for offset, (holder, _) in self.leased.items() if holder is member)

    def ack(self, member: Member, first: int, last: int) -> None:
        for offset in range(first, last + 1):
            late = self.queued.get(offset) is member and self.deliveries.get(offset, 0) > 0
            if offset in self.held(member) or late:
                self.finish(offset)
        for key, (_, head) in list(self.delayed.items()):
            if key[0] is member and head in self.done:
                del self.delayed[key]

    def take_back(self, member: Member, offset: int, now_s: float, reason: oona_pb2.DeadLetterReason.ValueType) -> None:
        run = self.runs[offset]
        for back in self.held(member):
            if back >= offset and self.runs[back] == run:
                del self.leased[back]
                self.deliveries[back] = self.deliveries.get(back, 0) + 1
                self.queued[back] = member
        failures = self.failures[offset] = self.failures.get(offset, 0) + 1
        if failures >= member.redelivery.max_attempts:
            del self.queued[offset]
            self.given_up[offset] = reason
        else:
            self.delayed[member, run] = (now_s + member.redelivery.delay_s(failures), offset)

    def due(self, member: Member, now_s: float) -> None:
        for offset in self.held(member):
            if offset in self.leased and self.leased[offset][1] <= now_s:
                self.take_back(member, offset, now_s, EXPIRED)
        for key, (until_s, _) in list(self.delayed.items()):
            if key[0] is member and until_s <= now_s:
                del self.delayed[key]

    def leave(self, member: Member, *, failed: bool) -> None:
        held = self.held(member)
        seen: set[str] = set()
        for offset in held:
            del self.leased[offset]
            if failed:
                self.deliveries[offset] = self.deliveries.get(offset, 0) + 1
                if self.runs[offset] not in seen:
                    self.failures[offset] = self.failures.get(offset, 0) + 1
                seen.add(self.runs[offset])
        self.members.remove(member)
        self.owners = {run: owner for run, owner in self.owners.items() if owner is not member}
        self.delayed = {key: value for key, value in self.delayed.items() if key[0] is not member}
        if not self.members:
            self.restart()
            return
        for offset in sorted([*held, *(offset for offset, owner in self.queued.items() if owner is member)]):
            self.queued.pop(offset, None)
            self.enqueue(offset)

    def skip_below(self, floor: int) -> bool:
        if floor <= self.committed:
            return False
        unread = self.cursor < floor or any(offset < floor for offset in self.queued)
        for offset in range(floor):
            self.finish(offset)
        self.cursor = max(self.cursor, floor)
        self.delayed = {key: value for key, value in self.delayed.items() if value[1] >= floor}
        return unread


class GroupMachine(RuleBasedStateMachine):
    """Does the same to both, and compares them after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[int, list[tuple[int, int, str]]]] = []
        self.runs: list[str] = []
        self.group = Group(GroupProgress(0, RangeSet()))
        self.simple = SimpleGroup(self.runs)
        self.now_s = 0.0

    def route(self) -> None:
        if self.simple.members:
            for first, spans in self.frames:
                self.group.route(first, spans, self.simple.wanted)
            self.simple.route()

    @rule(runs=st.text("ab", min_size=1, max_size=8) | st.text("abcd", min_size=1, max_size=5))
    def store(self, runs) -> None:
        spans, start = [], len(self.runs)
        for run, records in groupby(runs):
            count = len(list(records))
            spans.append((start, start + count - 1, run))
            start += count
        self.frames.append((len(self.runs), spans))
        self.runs += runs
        self.route()

    @precondition(lambda self: len(self.simple.members) < 3)
    @rule(deadline_s=st.integers(1, 4), redelivery=st.sampled_from(REDELIVERIES), wanted=st.sampled_from(["", "ab"]))
    def join(self, deadline_s, redelivery, wanted) -> None:
        member = Member(deadline_s, redelivery)
        if not self.simple.members:
            self.simple.wanted = frozenset(wanted)
        self.group.join(member)
        self.simple.members.append(member)
        self.route()

    @precondition(lambda self: self.simple.members)
    @rule(data=st.data(), failed=st.booleans())
    def leave(self, data, failed) -> None:
        member = data.draw(st.sampled_from(self.simple.members))
        self.group.leave(member, failed=failed)
        self.simple.leave(member, failed=failed)
        self.route()

    @precondition(lambda self: self.simple.members)
    @rule(data=st.data(), most=st.integers(1, 10))
    def deliver(self, data, most) -> None:
        member = data.draw(st.sampled_from(self.simple.members))
        while most and (waiting := self.group.peek(member)) is not None:
            span, _ = waiting
            last = min(span.last, span.first + most - 1)
            self.group.lease(member, last, self.now_s)
            for offset in range(span.first, last + 1):
                self.simple.deliver(member, offset, self.now_s)
                most -= 1

    @precondition(lambda self: self.simple.members and self.runs)
    @rule(data=st.data())
    def ack(self, data) -> None:
        member = data.draw(st.sampled_from(self.simple.members))
        first = data.draw(st.integers(0, len(self.runs) - 1))
        last = data.draw(st.integers(first, len(self.runs)))
        self.group.ack(member, first, last)
        self.simple.ack(member, first, last)

    @precondition(lambda self: self.simple.leased)
    @rule(data=st.data(), what=st.sampled_from(["nack", "nack", "extend", "ack"]))
    def settle_one(self, data, what) -> None:
        offset = data.draw(st.sampled_from(sorted(self.simple.leased)))
        member, _ = self.simple.leased[offset]
        if what == "nack":
            self.group.nack(member, [offset], self.now_s)
            self.simple.take_back(member, offset, self.now_s, NACKED)
        elif what == "extend":
            self.group.extend(member, offset, self.now_s)
            self.simple.leased[offset] = (member, self.now_s + member.ack_deadline_s)
        else:
            self.group.ack(member, offset, offset)
            self.simple.ack(member, offset, offset)

    @precondition(lambda self: self.simple.members and self.runs)
    @rule(data=st.data())
    def settle_what_is_not_held(self, data) -> None:
        member = data.draw(st.sampled_from(self.simple.members))
        offset = data.draw(st.integers(0, len(self.runs)))
        if offset not in self.simple.held(member):
            self.group.nack(member, [offset], self.now_s)
            self.group.extend(member, offset, self.now_s)

    @rule(passed_s=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def time_passes(self, passed_s) -> None:
        self.now_s += passed_s
        for member in self.simple.members:
            self.group.due(member, self.now_s)
            self.simple.due(member, self.now_s)

    @precondition(lambda self: self.simple.given_up)
    @rule(data=st.data())
    def bury(self, data) -> None:
        offset = data.draw(st.sampled_from(sorted(self.simple.given_up)))
        self.group.bury(offset)
        self.simple.finish(offset)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def purge(self, data) -> None:
        floor = data.draw(st.integers(0, len(self.runs)))
        assert self.group.skip_below(floor) == self.simple.skip_below(floor)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def move(self, data) -> None:
        start = data.draw(st.integers(0, len(self.runs)))
        self.group.move(GroupProgress(start, RangeSet()))
        self.simple.done = set(range(start))
        self.simple.deliveries.clear()
        self.simple.failures.clear()
        self.simple.restart()
        self.route()

    @rule()
    def restart(self) -> None:
        self.group = Group(self.group.progress)
        self.simple.members.clear()
        self.simple.restart()

    @invariant()
    def they_agree(self) -> None:
        group, simple = self.group, self.simple
        assert group.committed == simple.committed
        assert group.cursor == simple.cursor
        done = {offset for first, last in group.progress.done for offset in range(first, last + 1)}
        assert done == {offset for offset in simple.done if offset >= simple.committed}
        attempts = {
            offset: (deliveries, failures)
            for first, last, deliveries, failures in group.progress.attempts
            for offset in range(first, last + 1)
        }
        assert attempts == {
            offset: (count, simple.failures.get(offset, 0)) for offset, count in simple.deliveries.items()
        }
        assert {offset: given.reason for offset, given in group.given_up.items()} == simple.given_up
        for member in simple.members:
            held = [offset for span in member.leases for offset in range(span.first, span.last + 1)]
            assert held == simple.held(member)
            assert all(span.run_id == self.runs[offset] for span in member.leases for offset in span[:2])
            assert self.waiting(member) == simple.waiting(member)
            deadlines = [deadline_s for holder, deadline_s in simple.leased.values() if holder is member]
            deadlines += [until_s for (owner, _), (until_s, _) in simple.delayed.items() if owner is member]
            assert member.next_deadline_s == min(deadlines, default=None)

    def waiting(self, member: Member) -> list[tuple[int, int]]:
        """What a member would get if it had credit for everything, found out without delivering it."""
        backlog, leases = member.backlog, member.leases
        member.backlog, member.leases = deepcopy(backlog), type(leases)()
        waiting = []
        while (following := self.group.peek(member)) is not None:
            span, attempt = following
            waiting += [(offset, attempt) for offset in range(span.first, span.last + 1)]
            self.group.lease(member, span.last, self.now_s)
        member.backlog, member.leases = backlog, leases
        return waiting


GroupMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestGroups = GroupMachine.TestCase
