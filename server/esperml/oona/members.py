"""Groups of readers on one log, and the subscriptions that are their members."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from esperml.oona.groups import Group, Member
from esperml.oona.subscriptions import Subscription
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from esperml.oona.frames import Frame
    from esperml.oona.log import GroupProgress, Log
    from esperml.oona.subscriptions import Emit
    from esperml.oona.topic import Topic

# Records that may be known by offset and wait for members' credit. Beyond them a member that grants nothing holds up
# the others of its group.
_MAX_WAITING: Final = 65_536


class SharedGroup:
    """A group with its members' subscriptions.

    Args:
        name: its name.
        topic: the log.
        log: where its progress is kept.
        progress: what it has done.

    Attributes:
        name: its name.
        state: who has what.
        run_ids: the runs that its present members asked for.
    """

    def __init__(self, name: str, topic: Topic, log: Log, progress: GroupProgress) -> None:
        self.name = name
        self.state = Group(progress)
        self.state.skip_below(topic.bounds.earliest)
        self.run_ids: frozenset[str] = frozenset()
        self._topic = topic
        self._log = log
        self._routing = asyncio.Lock()
        self._behind_floor: set[Member] = set()

    def save(self) -> asyncio.Future[None]:
        """Store the progress."""
        return self._log.save_group(self._topic.kind, self.name, self.state.progress)

    def move(self, progress: GroupProgress) -> None:
        """Go on elsewhere."""
        self.state.move(progress)
        # What lay there may have been purged while the progress was stored.
        self.state.skip_below(self._topic.bounds.earliest)
        self._topic.wake()

    def join(self, member: Member, run_ids: frozenset[str]) -> None:
        """Take a member in; all members at a time ask for the same runs."""
        self.run_ids = run_ids
        self.state.join(member)

    def leave(self, member: Member) -> None:
        """Let a member go."""
        self.state.leave(member)
        self._behind_floor.discard(member)
        self._topic.wake()

    def purged(self, earliest: int) -> None:
        """Note that offsets below ``earliest`` are gone: members are told where some had yet to be read."""
        if self.state.skip_below(earliest):
            self._behind_floor.update(self.state.members)
        self._topic.wake()

    def fell_behind(self, member: Member) -> bool:
        """Whether records that the member might have got were purged."""
        return member in self._behind_floor

    async def route(self) -> bool:
        """Read on and queue records for their members. Returns whether there were any."""
        if self._is_full_or_through():
            return False
        async with self._routing:
            if self._is_full_or_through():
                return False
            cursor = self.state.cursor
            frames = await self._topic.read(cursor)
            if self.state.cursor != cursor or not frames or frames[0].first_offset > cursor:
                return True  # Moved or purged meanwhile: look again.
            for frame in frames:
                skip = self.state.cursor - frame.first_offset
                run_ids = [event.run_id for event in frame.events[skip:]]
                self.state.route(self.state.cursor, frame.first_offset, run_ids, self.run_ids)
        if len(self.state.members) > 1:
            self._topic.wake()
        return True

    def _is_full_or_through(self) -> bool:
        return self.state.waiting >= _MAX_WAITING or self.state.cursor >= self._topic.bounds.next


class MemberReader(Subscription):
    """A member of a group: it gets its runs' records, and acknowledges them."""

    def __init__(
        self,
        subscription_id: int,
        topic: Topic,
        emit: Emit,
        delivery_records: int,
        *,
        group: SharedGroup,
        run_ids: frozenset[str],
        ack_deadline_s: float,
    ) -> None:
        super().__init__(subscription_id, topic, emit, delivery_records)
        self.start_offset = group.state.committed
        self._group = group
        self._member = Member(ack_deadline_s)
        self._frame: Frame | None = None
        group.join(self._member, run_ids)

    def close(self) -> None:
        """Leave the group: what was not settled goes to the others."""
        super().close()
        self._group.leave(self._member)

    def ack(self, ack: oona_pb2.Ack) -> tuple[int, asyncio.Future[None]]:
        """Settle records. Returns the offset below which the group is done, and a future for when that is stored."""
        state = self._group.state
        now_s = asyncio.get_running_loop().time()
        for settled in ack.acked:
            state.ack(self._member, settled.first, settled.last)
        for offset in ack.extended:
            state.extend(self._member, offset, now_s)
        # The lowest of a run takes the others back with it.
        for offset in sorted(ack.nacked):
            state.nack(self._member, offset)
        self._waker.set()
        return state.committed, self._group.save()

    def _end(self) -> oona_pb2.Closed | None:
        if self._group.fell_behind(self._member):
            return oona_pb2.Closed(
                reason=oona_pb2.CLOSE_REASON_BEHIND_FLOOR, earliest_offset=self._topic.bounds.earliest
            )
        return None

    def _has_caught_up(self) -> bool:
        return self._group.state.cursor >= self._topic.bounds.next and not self._member.waiting

    def _wakes_at_s(self) -> float | None:
        return self._member.next_deadline_s

    async def _advance(self) -> bool:
        loop = asyncio.get_running_loop()
        state, member = self._group.state, self._member
        state.expire(member, loop.time())
        routed = await self._group.route()
        response = self._new_delivery()
        now_s = loop.time()
        while not self._is_full(response.delivery):
            record = state.peek(member)
            if record is None:
                break
            frame = self._loaded(record.frame)
            if frame is None:
                if response.delivery.records:
                    break
                # The world may be another when it has been read: look again.
                await self._load(record.frame)
                return True
            if not self._add(response.delivery, frame, record.offset, state.next_attempt(record.offset)):
                break
            state.lease(member, now_s)
        if not response.delivery.records:
            return routed
        await self._emit(response)
        return True

    def _loaded(self, first_offset: int) -> Frame | None:
        if self._frame is None or self._frame.first_offset != first_offset:
            self._frame = self._topic.cached(first_offset)
        return self._frame

    async def _load(self, first_offset: int) -> None:
        frames = await self._topic.read(first_offset)
        self._frame = frames[0] if frames else None
