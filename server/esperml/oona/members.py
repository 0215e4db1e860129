"""Groups of readers on one log, and the subscriptions that are their members."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import structlog

from esperml.contract import kind_name
from esperml.oona.groups import Group, Member
from esperml.oona.letters import Letters
from esperml.oona.log import NO_LETTERS, DeadLetter
from esperml.oona.saver import Saver
from esperml.oona.subscriptions import Subscription
from esperml.oona.wire import EncodedRecords
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from esperml.oona.deliveries import DeliveryBuilder
    from esperml.oona.frames import Frame
    from esperml.oona.groups import Redelivery
    from esperml.oona.log import GroupProgress, Log
    from esperml.oona.subscriptions import Emit
    from esperml.oona.topic import Topic

_logger = structlog.get_logger(__name__)

# Spans (see groups.py) that may be known by offset and wait for members' credit. Beyond them a member that grants
# nothing, or a run whose delay is not over, holds up the others of its group.
_MAX_WAITING: Final = 65_536
# How often at most it is said of a group that it is held up.
_HELD_UP_INTERVAL_S: Final = 60.0


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
        letters: the records that it gave up on.
        run_ids: the runs that its present members asked for.
    """

    def __init__(self, name: str, topic: Topic, log: Log, progress: GroupProgress) -> None:
        self.name = name
        self.state = Group(progress)
        self.state.skip_below(topic.bounds.earliest)
        self.letters = Letters(topic.kind, name, log, self.save, self.wake)
        self.run_ids: frozenset[str] = frozenset()
        self._topic = topic
        self._log = log
        self._routing = asyncio.Lock()
        self._burying = asyncio.Lock()
        self._behind_floor: set[Member] = set()
        self._wakers: dict[Member, Callable[[], None]] = {}
        self._saver = Saver(self._store, lambda: self.state.progress_length)
        self._server_ends = False
        self._says_held_up_from_s = 0.0

    def save(self, changed: Mapping[int, DeadLetter | None] = NO_LETTERS) -> asyncio.Future[None]:
        """Store the progress, and what became of dead letters; long progress not as often as it changes.

        ``changed`` is stored now or never: no later save has it.
        """
        # Who lists dead letters reads them from the log.
        return self._store(changed) if changed or self.letters.unsaved else self._saver.save()

    def _store(self, changed: Mapping[int, DeadLetter | None] = NO_LETTERS) -> asyncio.Future[None]:
        unsaved = dict(self.letters.unsaved)
        stored = self._log.save_group(self._topic.kind, self.name, self.state.progress, {**unsaved, **changed})

        def forget(future: asyncio.Future[None]) -> None:
            # What is not stored is stored with the next progress.
            if future.cancelled() or future.exception() is not None:
                return
            for offset, letter in unsaved.items():
                if self.letters.unsaved.get(offset, self) is letter:
                    del self.letters.unsaved[offset]

        if unsaved:
            stored.add_done_callback(forget)
        return stored

    def save_soon(self) -> None:
        """Store the progress, which nobody waits for: where it cannot be now, it is with the next acknowledgement."""
        self.save().add_done_callback(lambda future: future.cancelled() or future.exception())

    def move(self, progress: GroupProgress) -> None:
        """Go on elsewhere."""
        self.state.move(progress)
        # What lay there may have been purged while the progress was stored.
        self.state.skip_below(self._topic.bounds.earliest)
        self.wake()

    def join(self, member: Member, run_ids: frozenset[str], wake: Callable[[], None]) -> None:
        """Take a member in; all members at a time ask for the same runs. ``wake`` lets it look again."""
        self.run_ids = run_ids
        self.state.join(member)
        self._wakers[member] = wake

    def leave(self, member: Member) -> None:
        """Let a member go."""
        had = bool(member.leases)
        self.state.leave(member, failed=not self._server_ends)
        self.letters.replays.leave(member, asyncio.get_running_loop().time(), failed=not self._server_ends)
        self._behind_floor.discard(member)
        del self._wakers[member]
        if had and not self._server_ends:
            self.save_soon()
        self.wake()

    def server_ends(self) -> None:
        """From now on, members that leave do so because the server ends, which is no record's fault."""
        self._server_ends = True
        self._saver.end()

    def purged(self, earliest: int) -> None:
        """Note that offsets below ``earliest`` are gone: members are told where some had yet to be read."""
        if self.state.skip_below(earliest):
            self._behind_floor.update(self.state.members)

    def fell_behind(self, member: Member) -> bool:
        """Whether records that the member might have got were purged."""
        return member in self._behind_floor

    def wake(self) -> None:
        """Let every member look again."""
        for wake in self._wakers.values():
            wake()

    def starves(self, member: Member) -> None:
        """Say that a member with credit has nothing to get, if that is because what waits for others holds it up."""
        now_s = asyncio.get_running_loop().time()
        if self.state.waiting < _MAX_WAITING or now_s < self._says_held_up_from_s:
            return
        if self.state.cursor >= self._topic.bounds.next or self.state.peek(member) is not None:
            return
        self._says_held_up_from_s = now_s + _HELD_UP_INTERVAL_S
        spans, run_id, holder = max(
            ((*one.backlog.longest(), one) for one in self.state.members), key=lambda longest: longest[0]
        )
        _logger.warning(
            "group_held_up",
            kind=kind_name(self._topic.kind),
            group=self.name,
            waiting_spans=self.state.waiting,
            longest_run=run_id,
            longest_run_spans=spans,
            behind="delay" if run_id in holder.backlog.delays else "member",
            member=holder.name or None,
        )

    async def route(self) -> bool:
        """Read on and queue records for their members. Returns whether there were any.

        Raises:
            LogDamagedError: what is stored cannot be read.
        """
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
                self.state.route(frame.first_offset, frame.spans, self.run_ids)
        if len(self._wakers) > 1:
            self.wake()
        return True

    async def bury(self) -> None:
        """Keep a copy of each record that was given up, and be done with it.

        Raises:
            LogDamagedError: what is stored cannot be read.
            LogUnavailableError: the log cannot be asked now.
        """
        if not self.state.given_up and not self.letters.replays.given_up:
            return
        async with self._burying:
            changed = await self.letters.end_replays(time.time_ns())
            for offset, given_up in list(self.state.given_up.items()):
                frame = await self._topic.frame(given_up.frame)
                if frame is None or self.state.given_up.get(offset) is not given_up:
                    continue  # Moved or purged meanwhile.
                [event] = frame.events(offset, offset)
                times = (frame.append_time_ns, time.time_ns())
                self._topic.traffic.given_up += 1
                self.letters.put(DeadLetter(offset, times[0], event, given_up.attempts, times[1], given_up.reason))
                self.state.bury(offset)
                changed = True
            if changed:
                self.save_soon()

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
        redelivery: Redelivery,
        name: str = "",
    ) -> None:
        super().__init__(subscription_id, topic, emit, delivery_records)
        self.start_offset = group.state.committed
        self._group = group
        self._member = Member(ack_deadline_s, redelivery, name)
        self._frame: Frame | None = None
        self._letter: DeadLetter | None = None
        group.join(self._member, run_ids, self._waker.set)

    def close(self) -> None:
        """Leave the group: what was not settled goes to the others."""
        super().close()
        self._group.leave(self._member)

    def ack(self, ack: oona_pb2.Ack) -> asyncio.Future[int]:
        """Settle records; see :meth:`esperml.oona.subscriptions.ServedSubscription.ack`."""
        state, letters, member = self._group.state, self._group.letters, self._member
        now_s = asyncio.get_running_loop().time()
        traffic = self._topic.traffic
        traffic.given_back += len(ack.nacked)
        for settled in ack.acked:
            # Whoever names more than there is, is done with no more than there is.
            traffic.acknowledged += max(min(settled.last + 1, self._topic.bounds.next) - settled.first, 0)
            state.ack(member, settled.first, settled.last)
        for offset in ack.extended:
            state.extend(member, offset, now_s)
        state.nack(member, ack.nacked, now_s)
        if letters.replays:
            for settled in ack.acked:
                for offset in letters.replays.ack(member, settled.first, settled.last):
                    letters.acknowledged(offset)
            for offset in ack.extended:
                letters.replays.extend(member, offset, now_s)
            for offset in ack.nacked:
                letters.replays.nack(member, offset, now_s)
        self._waker.set()
        return _when_stored(state.committed, self._group.save())

    def _end(self) -> oona_pb2.Closed | None:
        if self._group.fell_behind(self._member):
            return oona_pb2.Closed(
                reason=oona_pb2.CLOSE_REASON_BEHIND_FLOOR, earliest_offset=self._topic.bounds.earliest
            )
        return None

    def _has_caught_up(self) -> bool:
        state, member = self._group.state, self._member
        return state.cursor >= self._topic.bounds.next and not member.backlog.delays and state.peek(member) is None

    def _wakes_at_s(self) -> float | None:
        times = (self._member.next_deadline_s, self._group.letters.replays.next_deadline_s(self._member))
        return min((time_s for time_s in times if time_s is not None), default=None)

    async def _advance(self) -> bool:
        loop = asyncio.get_running_loop()
        state, letters, member = self._group.state, self._group.letters, self._member
        if state.due(member, loop.time()):
            self._group.save_soon()
        letters.replays.due(member, loop.time())
        await self._group.bury()
        routed = await self._group.route()
        delivery = self._new_delivery()
        if await self._fill(delivery, loop.time()) or await self._fill_with_letters(delivery, loop.time()):
            return True
        if not delivery.count:
            if not routed and self._credit:
                self._group.starves(member)
            return routed
        await self._deliver(delivery)
        return True

    async def _fill(self, delivery: DeliveryBuilder, now_s: float) -> bool:
        """Put in what waits. Returns True, with nothing put in, where something had to be read and all may be new."""
        state, member = self._group.state, self._member
        while not delivery.is_full and (waiting := state.peek(member)) is not None:
            span, attempt = waiting
            frame = self._loaded(span.frame)
            if frame is None:
                if delivery.count:
                    return False
                self._frame = await self._topic.frame(span.frame)
                return True
            if attempt == 1:
                records, first = frame.records(), frame.first_offset
            else:
                records, first = frame.records_again(span.first, span.last, attempt), span.first
            taken = delivery.add(records, span.first - first, span.last + 1 - first) + first - 1
            if taken < span.first:
                return False
            if attempt > 1:
                self._topic.traffic.redelivered += taken - span.first + 1
            state.lease(member, taken, now_s)
        return False

    async def _fill_with_letters(self, delivery: DeliveryBuilder, now_s: float) -> bool:
        """Put in dead letters that are replayed. Returns True, with nothing put in, where one had to be read."""
        replays = self._group.letters.replays
        while not delivery.is_full and (ready := replays.peek()) is not None:
            offset, attempt = ready
            letter = self._letter
            if letter is None or letter.offset != offset:
                if delivery.count:
                    return False
                self._letter = await self._group.letters.read(offset)
                if self._letter is None:
                    replays.remove(offset)
                return True
            records = EncodedRecords(offset, letter.append_time_ns, [letter.event], attempt)
            if not delivery.add(records, 0, 1):
                return False
            replays.lease(self._member, offset, now_s)
        return False

    def _loaded(self, first_offset: int) -> Frame | None:
        if self._frame is None or self._frame.first_offset != first_offset:
            self._frame = self._topic.cached(first_offset)
        return self._frame


def _when_stored(committed: int, stored: asyncio.Future[None]) -> asyncio.Future[int]:
    """A future of the offset, done or failed with ``stored``."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def settle(stored: asyncio.Future[None]) -> None:
        if future.done() or stored.cancelled():
            future.cancel()
        elif (error := stored.exception()) is not None:
            future.set_exception(error)
            # Who asked may be gone; that is no error nobody handled.
            future.exception()
        else:
            future.set_result(committed)

    stored.add_done_callback(settle)
    return future
