"""Dead letters that were given back to their group, and what becomes of them. Pure: no network, no log, no clock.

They belong to no run's order any more: any member that has credit gets them.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from esperml.oona.groups import Member


@dataclass(slots=True)
class _Lease:
    member: Member
    deadline_s: float


class Replays:
    """Dead letters of one group that are being replayed, by offset.

    Attributes:
        given_up: those that failed too often again, with their attempts and the reason, until somebody takes note.
    """

    def __init__(self) -> None:
        self.given_up: dict[int, tuple[int, oona_pb2.DeadLetterReason.ValueType]] = {}
        # Deliveries that came back, of everything that is being replayed.
        self._failures: dict[int, int] = {}
        self._ready: dict[int, None] = {}
        self._delayed: list[tuple[float, int]] = []
        self._leases: dict[int, _Lease] = {}

    def __contains__(self, offset: int) -> bool:
        return offset in self._failures

    def __bool__(self) -> bool:
        return bool(self._failures)

    def add(self, offset: int) -> None:
        """Replay a letter from its first attempt on. One that is being replayed is left as it is."""
        if offset not in self._failures:
            self._failures[offset] = 0
            self._ready[offset] = None

    def remove(self, offset: int) -> None:
        """Replay a letter no longer."""
        self._failures.pop(offset, None)
        self._ready.pop(offset, None)
        self._leases.pop(offset, None)
        self.given_up.pop(offset, None)

    def next_deadline_s(self, member: Member) -> float | None:
        """When something of a member's runs out, or a delay ends, on the caller's clock."""
        times = [lease.deadline_s for lease in self._leases.values() if lease.member is member]
        times += [until_s for until_s, _ in self._delayed[:1]]
        return min(times, default=None)

    def due(self, member: Member, now_s: float) -> None:
        """Make those ready whose delay is over, and take back what a member has held for too long."""
        for offset, lease in list(self._leases.items()):
            if lease.member is member and lease.deadline_s <= now_s:
                self._take_back(offset, now_s, oona_pb2.DEAD_LETTER_REASON_EXPIRED)
        while self._delayed and self._delayed[0][0] <= now_s:
            _, offset = heappop(self._delayed)
            if offset in self._failures and offset not in self._leases and offset not in self.given_up:
                self._ready[offset] = None

    def peek(self) -> tuple[int, int] | None:
        """The next letter to be delivered and how often it will have been then, or None."""
        offset = next(iter(self._ready), None)
        return None if offset is None else (offset, self._failures[offset] + 1)

    def lease(self, member: Member, offset: int, now_s: float) -> None:
        """Count a letter as delivered."""
        del self._ready[offset]
        self._leases[offset] = _Lease(member, now_s + member.ack_deadline_s)

    def ack(self, member: Member, first: int, last: int) -> list[int]:
        """Settle what the member was delivered between two offsets, both inside. Returns which letters that were."""
        settled = [
            offset for offset, lease in self._leases.items() if lease.member is member and first <= offset <= last
        ]
        for offset in settled:
            self.remove(offset)
        return settled

    def nack(self, member: Member, offset: int, now_s: float) -> None:
        """Take a letter back, to be delivered again. Ignored where the member has not got it."""
        if (lease := self._leases.get(offset)) is not None and lease.member is member:
            self._take_back(offset, now_s, oona_pb2.DEAD_LETTER_REASON_NACKED)

    def extend(self, member: Member, offset: int, now_s: float) -> None:
        """Start the deadline of a letter anew. Ignored where the member has not got it."""
        if (lease := self._leases.get(offset)) is not None and lease.member is member:
            lease.deadline_s = now_s + member.ack_deadline_s

    def leave(self, member: Member, now_s: float, *, failed: bool) -> None:
        """Let a member go: what it had goes to the others, at once, and failed unless it left for its own reasons."""
        for offset, lease in list(self._leases.items()):
            if lease.member is member:
                if failed:
                    self._take_back(offset, now_s, oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT)
                else:
                    del self._leases[offset]
                    self._ready[offset] = None

    def _take_back(self, offset: int, now_s: float, reason: oona_pb2.DeadLetterReason.ValueType) -> None:
        member = self._leases.pop(offset).member
        failures = self._failures[offset] = self._failures[offset] + 1
        if failures >= member.redelivery.max_attempts:
            self.given_up[offset] = (failures, reason)
        elif reason == oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT:
            self._ready[offset] = None
        else:
            heappush(self._delayed, (now_s + member.redelivery.delay_s(failures), offset))
