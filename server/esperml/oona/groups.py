"""Who in a group gets which record, and what became of it. Pure: no network, no log, no clock of its own.

A run belongs to one member for as long as that lives, so that a member may keep state per run. Each member has its
records waiting in the order of their offsets; a record that is delivered is leased until it is acknowledged, given
back, or its deadline passes. A record that comes back takes the run's later records, which may have been delivered
already, back with it: they wait behind it, and the run stays in order. It is delivered again after a delay; other runs
go on. A record that came back for its own sake too often is given up, and its run goes on behind it.

Everything is done by spans, runs of consecutive records of one run in one frame, which are cut only where they must be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from esperml.oona.attempts import Attempts
from esperml.oona.backlog import Backlog
from esperml.oona.leases import Leases, Span
from esperml.oona.log import GroupProgress
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

# Runs whose owner is remembered while nothing of them is under way. A run that is forgotten goes, when it goes on, to
# whoever holds fewest.
_MAX_IDLE_RUNS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Redelivery:
    """How a record that came back is delivered again.

    Attributes:
        max_attempts: deliveries of a record before it is given up, the first included.
        min_delay_s: time before the second, in s; each further time twice as long.
        max_delay_s: longest time before a delivery, in s.
    """

    max_attempts: int
    min_delay_s: float
    max_delay_s: float

    def delay_s(self, failures: int) -> float:
        """Time before the next delivery of a record that came back ``failures`` times, in s."""
        return min(self.max_delay_s, self.min_delay_s * 2.0 ** min(failures - 1, 64))


class GivenUp(NamedTuple):
    """A record that its group gave up on.

    Attributes:
        frame: first offset of the stored frame that holds it.
        attempts: how often it was delivered.
        reason: why.
    """

    frame: int
    attempts: int
    reason: oona_pb2.DeadLetterReason.ValueType


@dataclass(slots=True, eq=False)
class Member:
    """One member of a group.

    Attributes:
        ack_deadline_s: time that it gets for a record, in s.
        redelivery: what becomes of records that come back from it.
        name: what it is called, also when it comes again. Empty: nothing.
        runs: the runs that it holds.
        backlog: what is to be delivered to it.
        leases: what was delivered to it.
    """

    ack_deadline_s: float
    redelivery: Redelivery
    name: str = ""
    runs: set[str] = field(default_factory=set)
    backlog: Backlog = field(default_factory=Backlog)
    leases: Leases = field(default_factory=Leases)

    @property
    def next_deadline_s(self) -> float | None:
        """When the first of its leases runs out or of its delays ends, on the caller's clock."""
        times = (self.backlog.next_resume_s, self.leases.next_deadline_s)
        return min((time_s for time_s in times if time_s is not None), default=None)


class Group:
    """The records of one kind, shared among members.

    Args:
        progress: what the group has done.

    Attributes:
        members: who is there, in the order of their joining.
        claims: names of the members to which runs are to go that nobody holds, by run. Each goes there once.
        cursor: offset of the next record to be routed.
        given_up: records that the group gave up on and has not done with, by offset: whoever keeps a copy of one says
            so with :meth:`bury`.
    """

    def __init__(self, progress: GroupProgress) -> None:
        self.members: list[Member] = []
        self.claims: dict[str, str] = {}
        self.cursor = 0
        self.given_up: dict[int, GivenUp] = {}
        # The one whose records came last is last.
        self._owners: dict[str, Member] = {}
        self.move(progress)

    @property
    def progress(self) -> GroupProgress:
        """What the group has done, as a value that later changes do not touch."""
        return GroupProgress(self._committed, self._done.copy(), tuple(self._attempts))

    @property
    def progress_length(self) -> int:
        """Ranges that :attr:`progress` has."""
        return len(self._done) + len(self._attempts)

    @property
    def committed(self) -> int:
        """Everything below is done with."""
        return self._committed

    @property
    def waiting(self) -> int:
        """Spans that were routed and not delivered, over all members."""
        return sum(len(member.backlog) for member in self.members)

    def move(self, progress: GroupProgress) -> None:
        """Go on elsewhere: what was under way is forgotten."""
        self._done = progress.done.copy()
        self._committed = self._done.pop_prefix(progress.committed)
        self._attempts = Attempts(progress.attempts)
        self._restart()

    def owners(self, most: int) -> dict[str, str]:
        """The names of the members that hold the runs that went on last, at most so many, by run."""
        return {run_id: member.name for run_id, member in islice(reversed(self._owners.items()), most)}

    def join(self, member: Member) -> None:
        """Take a member in. It gets runs that nobody holds as their records come."""
        self.members.append(member)

    def leave(self, member: Member, *, failed: bool = True) -> None:
        """Let a member go. Its runs, with all that is not done of them, go to the others in order, at once.

        What it held was delivered and came back, and of each run the first record failed; not so where ``failed`` is
        false, because the member left for reasons of its own.
        """
        self.members.remove(member)
        for run_id in member.runs:
            self._owners.pop(run_id, None)
        leased = member.leases.take_all()
        runs: set[str] = set()
        for span in leased if failed else ():
            self._attempts.add(span.first, span.last, deliveries=1, failures=0)
            if span.run_id not in runs:
                runs.add(span.run_id)
                self._attempts.add(span.first, span.first, deliveries=0, failures=1)
        if not self.members:
            # The next member reads them from the log again.
            self._restart()
            return
        undone = (self._trimmed(span) for span in (*leased, *member.backlog))
        for span in sorted(span for span in undone if span is not None):
            self._enqueue(span)

    def route(self, frame: int, spans: Iterable[tuple[int, int, str]], wanted: frozenset[str]) -> None:
        """Queue the records of a frame from the cursor on for those who hold their runs. Needs a member.

        Records of runs outside ``wanted`` (empty: all are wanted), and those that a damaged log lost, which are of no
        run, are done with.

        Args:
            frame: first offset of the frame.
            spans: its consecutive records of one run each, as (first offset, last offset, run), ascending.
            wanted: the runs that the members asked for.
        """
        for first, last, run_id in spans:
            if last < self.cursor:
                continue
            start = max(first, self.cursor)
            self.cursor = last + 1
            if not run_id or (wanted and run_id not in wanted):
                if last >= self._committed:
                    self._finish(start, last)
            elif (span := self._trimmed(Span(start, last, frame, run_id))) is not None:
                self._enqueue(span)

    def due(self, member: Member, now_s: float) -> bool:
        """Let those of its runs go on whose delay is over, and take back what it has held for too long.

        Returns whether there was something to take back.
        """
        expired = member.leases.expired(now_s)
        self._take_back(member, ((span, span.first) for span in expired), now_s, oona_pb2.DEAD_LETTER_REASON_EXPIRED)
        delays = member.backlog.delays
        for run_id in [run_id for run_id, delay in delays.items() if delay.until_s <= now_s]:
            member.backlog.resume(run_id)
        return bool(expired)

    def peek(self, member: Member) -> tuple[Span, int] | None:
        """The next records for a member, delivered equally often so far, and how often they will have been then."""
        backlog = member.backlog
        while (span := backlog.first()) is not None:
            undone = self._undone(span.first, span.last)
            if undone is None:
                backlog.take_first(span.last)  # Acknowledged after it had come back.
                continue
            first, last = undone
            if first > span.first:
                span = span._replace(first=first)
                backlog.take_first(first - 1)
            attempt = 1
            if self._attempts:
                last, deliveries = self._attempts.uniform_end(first, last)
                attempt += deliveries
            return (span if last == span.last else span._replace(last=last)), attempt
        return None

    def lease(self, member: Member, last: int, now_s: float) -> None:
        """Count what :meth:`peek` gave, up to offset ``last``, as delivered."""
        span = member.backlog.take_first(last)
        member.leases.add(span, now_s + member.ack_deadline_s)

    def ack(self, member: Member, first: int, last: int) -> None:
        """Settle what the member was delivered from ``first`` to ``last``, both inside; the rest is ignored."""
        for span in member.leases.take(first, last):
            self._finish(span.first, span.last)
        if not self._attempts or not self._attempts.within(first, last):
            return
        # Some came back: those that wait for this member count, those that wait for another do not.
        backlog = member.backlog
        for span in backlog.overlapping(first, last):
            for tried in self._attempts.within(max(span.first, first), min(span.last, last)):
                self._finish(tried.first, tried.last)
            delay = backlog.delays.get(span.run_id)
            if delay is not None and self._undone(delay.head, delay.head) is None:
                backlog.resume(span.run_id)

    def nack(self, member: Member, offsets: Iterable[int], now_s: float) -> None:
        """Take records back, with the later ones of their runs, to be delivered again.

        Those that are not leased are ignored, and those behind another one of their run.
        """
        leased = ((member.leases.at(offset), offset) for offset in sorted(offsets))
        back = ((span, offset) for span, offset in leased if span is not None)
        self._take_back(member, back, now_s, oona_pb2.DEAD_LETTER_REASON_NACKED)

    def extend(self, member: Member, offset: int, now_s: float) -> None:
        """Start the deadline of a record anew. Ignored where it is not leased."""
        for span in member.leases.take(offset, offset):
            member.leases.add(span, now_s + member.ack_deadline_s)

    def bury(self, offset: int) -> None:
        """Count a record that was given up as done with."""
        if self.given_up.pop(offset, None) is not None:
            self._finish(offset, offset)

    def skip_below(self, floor: int) -> bool:
        """Count what was purged as done with. Returns whether some of it had yet to be read or read again."""
        if floor <= self._committed:
            return False
        unread = self.cursor < floor or any(
            span.first < floor and self._undone(span.first, min(span.last, floor - 1)) is not None
            for member in self.members
            for span in member.backlog
        )
        self._finish(self._committed, floor - 1)
        self._attempts.remove(0, floor - 1)
        self.cursor = max(self.cursor, floor)
        for offset in [offset for offset in self.given_up if offset < floor]:
            del self.given_up[offset]
        for member in self.members:
            member.leases.take(0, floor - 1)
            member.backlog.skip_below(floor)
        return unread

    def _restart(self) -> None:
        self.cursor = self._committed
        self._owners.clear()
        self.given_up.clear()
        for member in self.members:
            member.runs.clear()
            member.backlog.clear()
            member.leases.take_all()

    def _owner(self, run_id: str) -> Member:
        owner = self._owners.pop(run_id, None)
        if owner is None:
            owner = self._claimant(run_id) or min(self.members, key=lambda member: len(member.runs))
            owner.runs.add(run_id)
            if len(self._owners) >= 2 * _MAX_IDLE_RUNS:
                self._forget_idle_runs()
        self._owners[run_id] = owner
        return owner

    def _claimant(self, run_id: str) -> Member | None:
        name = self.claims.pop(run_id, None) if self.claims else None
        return None if name is None else next((member for member in self.members if member.name == name), None)

    def _forget_idle_runs(self) -> None:
        """Forget the owners of runs of which nothing is under way, those that went on longest ago first."""
        busy = {span.run_id for member in self.members for span in (*member.backlog, *member.leases)}
        for run_id in list(self._owners)[: len(self._owners) - _MAX_IDLE_RUNS]:
            if run_id not in busy:
                self._owners.pop(run_id).runs.discard(run_id)

    def _enqueue(self, span: Span) -> None:
        owner = self._owner(span.run_id)
        if self._attempts:
            # Those that failed too often did so when a member left, or before the server ended.
            most = owner.redelivery.max_attempts
            for tried in self._attempts.within(span.first, span.last):
                if tried.failures < most:
                    continue
                for offset in range(tried.first, tried.last + 1):
                    if self._undone(offset, offset) is not None:
                        reason = oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT
                        self.given_up[offset] = GivenUp(span.frame, tried.deliveries, reason)
                if span.first < tried.first:
                    owner.backlog.append(span._replace(last=tried.first - 1))
                if span.last == tried.last:
                    return
                span = span._replace(first=tried.last + 1)
        owner.backlog.append(span)

    def _take_back(
        self,
        member: Member,
        failed: Iterable[tuple[Span, int]],
        now_s: float,
        reason: oona_pb2.DeadLetterReason.ValueType,
    ) -> None:
        """Take leased records back for their own sake, and the later ones of their runs for theirs.

        Args:
            member: who has them.
            failed: the records, ascending, each with the span that holds it. Of a run, the first counts.
            now_s: the time, on the caller's clock.
            reason: why.
        """
        heads: dict[str, tuple[Span, int]] = {}
        for span, offset in failed:
            heads.setdefault(span.run_id, (span, offset))
        taken = member.leases.take_runs({run_id: offset for run_id, (_, offset) in heads.items()})
        for run_id, (span, offset) in heads.items():
            back = taken[run_id]
            for item in back:
                self._attempts.add(item.first, item.last, deliveries=1, failures=0)
            self._attempts.add(offset, offset, deliveries=0, failures=1)
            tried = self._attempts.at(offset)
            if tried.failures >= member.redelivery.max_attempts:
                self.given_up[offset] = GivenUp(span.frame, tried.deliveries, reason)
                if back[0].last == offset:
                    del back[0]
                else:
                    back[0] = back[0]._replace(first=offset + 1)
            else:
                member.backlog.delay(run_id, now_s + member.redelivery.delay_s(tried.failures), offset)
            member.backlog.prepend(run_id, back)

    def _finish(self, first: int, last: int) -> None:
        self._done.add(first, last)
        self._committed = self._done.pop_prefix(self._committed)
        self._attempts.remove(first, last)

    def _trimmed(self, span: Span) -> Span | None:
        """A span from the first of its records on that is not done with, or None."""
        undone = self._undone(span.first, span.last)
        if undone is None:
            return None
        return span if undone[0] == span.first else span._replace(first=undone[0])

    def _undone(self, first: int, last: int) -> tuple[int, int] | None:
        """The first offsets in a range, both ends inside, that are not done with, or None."""
        first = max(first, self._committed)
        if first > last:
            return None
        return self._done.first_gap(first, last) if self._done else (first, last)
