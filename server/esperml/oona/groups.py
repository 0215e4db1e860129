"""Who in a group gets which record, and what became of it. Pure: no network, no log, no clock of its own.

A run belongs to one member for as long as that lives, so that a member may keep state per run. Each member has its
records waiting in the order of their offsets; a record that is delivered is leased until it is acknowledged, given
back, or its deadline passes. A record that comes back takes the run's later records, which may have been delivered
already, back with it: they wait behind it, and the run stays in order. Other runs go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from esperml.oona.log import GroupProgress

if TYPE_CHECKING:
    from collections.abc import Iterable


class Waiting(NamedTuple):
    """A record that is to be delivered.

    Attributes:
        offset: its offset.
        frame: first offset of the stored frame that holds it.
        run_id: its run.
    """

    offset: int
    frame: int
    run_id: str


@dataclass(slots=True)
class Lease:
    """A record that was delivered and is not settled.

    Attributes:
        record: the record.
        deadline_s: when it comes back, on the caller's clock.
        attempt: how often it was delivered, from 1.
    """

    record: Waiting
    deadline_s: float
    attempt: int


@dataclass(slots=True, eq=False)
class Member:
    """One member of a group.

    Attributes:
        ack_deadline_s: time that it gets for a record, in s.
        runs: the runs that it holds.
        waiting: a heap of what is to be delivered to it.
        leases: what was delivered to it, by offset, the earliest deadline first.
    """

    ack_deadline_s: float
    runs: set[str] = field(default_factory=set)
    waiting: list[Waiting] = field(default_factory=list)
    leases: dict[int, Lease] = field(default_factory=dict)

    @property
    def next_deadline_s(self) -> float | None:
        """When the first of its leases runs out, on the caller's clock."""
        return next((lease.deadline_s for lease in self.leases.values()), None)


class Group:
    """The records of one kind, shared among members.

    Args:
        progress: what the group has done.

    Attributes:
        members: who is there, in the order of their joining.
        cursor: offset of the next record to be routed.
    """

    def __init__(self, progress: GroupProgress) -> None:
        self.members: list[Member] = []
        self._owners: dict[str, Member] = {}
        self._attempts: dict[int, int] = {}
        self.move(progress)

    @property
    def progress(self) -> GroupProgress:
        """What the group has done, as a value that later changes do not touch."""
        return GroupProgress(self._committed, self._done.copy())

    @property
    def committed(self) -> int:
        """Everything below is done with."""
        return self._committed

    @property
    def waiting(self) -> int:
        """Records that were routed and not delivered, over all members."""
        return sum(len(member.waiting) for member in self.members)

    def move(self, progress: GroupProgress) -> None:
        """Go on elsewhere: what was under way is forgotten."""
        self._committed = progress.committed
        self._done = progress.done.copy()
        self._committed = self._done.pop_prefix(self._committed)
        self._attempts.clear()
        self._restart()

    def join(self, member: Member) -> None:
        """Take a member in. It gets runs that nobody holds as their records come."""
        self.members.append(member)

    def leave(self, member: Member) -> None:
        """Let a member go. Its runs, with all that is not done of them, go to the others in order."""
        self.members.remove(member)
        for run_id in member.runs:
            del self._owners[run_id]
        returned = [lease.record for lease in member.leases.values()]
        self._attempts.update((offset, lease.attempt) for offset, lease in member.leases.items())
        returned += member.waiting
        if not self.members:
            # The next member reads them from the log again.
            self._restart()
            return
        for record in sorted(returned):
            self._enqueue(record)

    def route(self, first: int, frame: int, run_ids: Iterable[str], wanted: frozenset[str]) -> None:
        """Queue the records of a frame from offset ``first`` on, in order, for those who hold their runs.

        Records of runs outside ``wanted`` (empty: all are wanted) are done with. Needs a member.
        """
        offset = first
        for offset, run_id in enumerate(run_ids, first):
            if offset < self._committed or offset in self._done:
                continue
            if wanted and run_id not in wanted:
                self._finish(offset, offset)
            else:
                self._enqueue(Waiting(offset, frame, run_id))
        self.cursor = offset + 1

    def peek(self, member: Member) -> Waiting | None:
        """The next record for a member, or None."""
        while member.waiting:
            record = member.waiting[0]
            if record.offset >= self._committed and record.offset not in self._done:
                return record
            heappop(member.waiting)  # Acknowledged after it had come back.
        return None

    def next_attempt(self, offset: int) -> int:
        """How often the record will have been delivered, with the next delivery."""
        return self._attempts.get(offset, 0) + 1

    def lease(self, member: Member, now_s: float) -> None:
        """Count the record that :meth:`peek` gave as delivered."""
        record = heappop(member.waiting)
        attempt = self._attempts.pop(record.offset, 0) + 1
        member.leases[record.offset] = Lease(record, now_s + member.ack_deadline_s, attempt)

    def ack(self, member: Member, first: int, last: int) -> None:
        """Settle what the member was delivered from ``first`` to ``last``, both inside; the rest is ignored."""
        start: int | None = None
        previous = -1
        for offset in self._delivered(member, first, last):
            if member.leases.pop(offset, None) is None:
                self._attempts.pop(offset, None)
            if start is None:
                start = offset
            elif offset != previous + 1:
                self._finish(start, previous)
                start = offset
            previous = offset
        if start is not None:
            self._finish(start, previous)

    def nack(self, member: Member, offset: int) -> None:
        """Take a record back, with the later ones of its run, to be delivered again. Ignored where it is not leased."""
        lease = member.leases.get(offset)
        if lease is None:
            return
        run_id = lease.record.run_id
        for later in [o for o, other in member.leases.items() if o >= offset and other.record.run_id == run_id]:
            back = member.leases.pop(later)
            self._attempts[later] = back.attempt
            heappush(member.waiting, back.record)

    def extend(self, member: Member, offset: int, now_s: float) -> None:
        """Start the deadline of a record anew. Ignored where it is not leased."""
        if (lease := member.leases.pop(offset, None)) is not None:
            lease.deadline_s = now_s + member.ack_deadline_s
            member.leases[offset] = lease

    def expire(self, member: Member, now_s: float) -> None:
        """Take back what the member has held for too long."""
        while member.leases:
            offset, lease = next(iter(member.leases.items()))
            if lease.deadline_s > now_s:
                return
            self.nack(member, offset)

    def skip_below(self, floor: int) -> bool:
        """Count what was purged as done with. Returns whether some of it had yet to be read or read again."""
        if floor <= self._committed:
            return False
        unread = self.cursor < floor or any(
            record.offset < floor and record.offset not in self._done
            for member in self.members
            for record in member.waiting
        )
        self._finish(self._committed, floor - 1)
        self.cursor = max(self.cursor, floor)
        for offset in [offset for offset in self._attempts if offset < floor]:
            del self._attempts[offset]
        for member in self.members:
            member.waiting = [record for record in member.waiting if record.offset >= floor]
            heapify(member.waiting)
            for offset in [offset for offset in member.leases if offset < floor]:
                del member.leases[offset]
        return unread

    def _restart(self) -> None:
        self.cursor = self._committed
        self._owners.clear()
        for member in self.members:
            member.runs.clear()
            member.waiting.clear()
            member.leases.clear()

    def _enqueue(self, record: Waiting) -> None:
        owner = self._owners.get(record.run_id)
        if owner is None:
            owner = min(self.members, key=lambda member: len(member.runs))
            owner.runs.add(record.run_id)
            self._owners[record.run_id] = owner
        heappush(owner.waiting, record)

    def _finish(self, first: int, last: int) -> None:
        self._done.add(first, last)
        self._committed = self._done.pop_prefix(self._committed)

    def _delivered(self, member: Member, first: int, last: int) -> list[int]:
        """Offsets that the member was delivered at least once and that are not done, within a range, ascending."""
        if last - first < len(member.leases) + len(self._attempts):
            candidates = [o for o in range(first, last + 1) if o in member.leases or o in self._attempts]
        else:
            candidates = sorted(o for o in member.leases.keys() | self._attempts.keys() if first <= o <= last)
        if all(offset in member.leases for offset in candidates):
            return candidates
        # Some came back: those that wait for this member count, those that wait for another do not.
        waiting = {record.offset for record in member.waiting}
        return [offset for offset in candidates if offset in member.leases or offset in waiting]
