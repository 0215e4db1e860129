"""What private readers and members of groups have in common: credit, a waker, deliveries, progress."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol

from esperml.oona.credit import Credit
from esperml.oona.deliveries import DeliveryBuilder
from esperml.oona.rejection import invalid
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from collections.abc import Set as AbstractSet

    from esperml.oona.frames import Frame
    from esperml.oona.log import LogUnavailableError
    from esperml.oona.topic import Topic

    # Deliveries come serialized.
    Emit = Callable[[oona_pb2.StreamResponse | bytes], Awaitable[None]]

# A reader at the tail catches up with every frame; it is told so no more often than this.
_PROGRESS_INTERVAL_S: Final = 0.1
# One that only others' records come by is told more rarely: it learns no more than where it may go on after a break.
_PASSED_PROGRESS_INTERVAL_S: Final = 2.0


class ServedSubscription(Protocol):
    """What a stream asks of a subscription, wherever that is served.

    Attributes:
        subscription_id: its number on the stream.
        start_offset: offset from which it reads.
    """

    subscription_id: int
    start_offset: int

    @property
    def high_watermark(self) -> int:
        """Offset of the next record to be stored."""
        ...

    def grant(self, messages: int, size: int) -> None:
        """Add credit."""
        ...

    def ack(self, ack: oona_pb2.Ack) -> asyncio.Future[int]:
        """Settle records. Returns a future of the offset below which the group is done, for when that is stored.

        Raises:
            RequestRejectedError: there is nothing to acknowledge.
        """
        ...

    async def run(self) -> None:
        """Send records as credit allows; see :meth:`Subscription.run`."""
        ...

    def close(self) -> None:
        """Take no further part."""
        ...


class Subscription(ABC):
    """One subscription, served from the log.

    Somebody must await :meth:`run`, and call :meth:`close` whatever becomes of that.

    Args:
        subscription_id: its number on the stream.
        topic: the log.
        emit: sends a frame to the client, in the order of the calls; waits while the client takes nothing.
        delivery_records: most records in one delivery.

    Attributes:
        subscription_id: its number on the stream.
        start_offset: offset from which it reads.
    """

    def __init__(self, subscription_id: int, topic: Topic, emit: Emit, delivery_records: int) -> None:
        self.subscription_id = subscription_id
        self.start_offset = 0
        self._topic = topic
        self._emit = emit
        self._delivery_records = delivery_records
        self._credit = Credit()
        self._waker = asyncio.Event()
        self._failure: LogUnavailableError | None = None
        self._told_high_watermark: int | None = None
        self._told_at_s = 0.0
        self._attend()

    def _attend(self) -> None:
        """Have the topic say when there is more to read, or less."""
        self._topic.wakers.add(self._waker)

    @property
    def high_watermark(self) -> int:
        """Offset of the next record to be stored."""
        return self._topic.bounds.next

    def grant(self, messages: int, size: int) -> None:
        """Add credit."""
        self._credit.grant(messages, size)
        self._waker.set()

    def ack(self, ack: oona_pb2.Ack) -> asyncio.Future[int]:
        """Settle records; see :meth:`ServedSubscription.ack`."""
        raise invalid("ack.subscription_id", "is a private reader, which has nothing to acknowledge")

    def close(self) -> None:
        """Take no further part. What a member was delivered and did not settle goes to others."""
        self._topic.wakers.discard(self._waker)

    def fail(self, error: LogUnavailableError) -> None:
        """Have :meth:`run` end with an error: this process can serve the subscription no longer."""
        self._failure = error
        self._waker.set()

    async def run(self) -> None:
        """Send records as credit allows, until a bounded replay ends or the reader falls behind the floor.

        Raises:
            LogDamagedError: what is stored cannot be read.
        """
        while True:
            self._waker.clear()
            if self._failure is not None:
                raise self._failure
            if (closed := self._end()) is not None:
                closed.subscription_id = self.subscription_id
                await self._emit(oona_pb2.StreamResponse(closed=closed))
                return
            if await self._advance():
                continue
            await self._wait(await self._tell_progress())

    @abstractmethod
    def _end(self) -> oona_pb2.Closed | None:
        """Why the subscription ends now, or None."""

    @abstractmethod
    async def _advance(self) -> bool:
        """Send what can be sent. Returns whether it is worth while to look again at once."""

    @abstractmethod
    def _has_caught_up(self) -> bool:
        """Whether everything there is was sent."""

    def _wakes_at_s(self) -> float | None:
        """When there will be something to do, on the loop's clock, even if nothing happens."""
        return None

    def _new_delivery(self) -> DeliveryBuilder:
        return DeliveryBuilder(self.subscription_id, self._delivery_records, self._credit)

    async def _deliver(self, delivery: DeliveryBuilder) -> None:
        encoded = delivery.encode()
        self._topic.traffic.delivery_sent(delivery.count, len(encoded))
        await self._emit(encoded)

    async def _tell_progress(self) -> float | None:
        """Say that the reader has caught up, unless it knows. Returns when to do so where it is too early."""
        high_watermark = self._topic.bounds.next
        if not self._has_caught_up() or high_watermark == self._told_high_watermark:
            return None
        now_s = asyncio.get_running_loop().time()
        if self._told_high_watermark is not None and now_s < self._told_at_s + _PROGRESS_INTERVAL_S:
            return self._told_at_s + _PROGRESS_INTERVAL_S
        self._told_high_watermark, self._told_at_s = high_watermark, now_s
        progress = oona_pb2.Progress(subscription_id=self.subscription_id, high_watermark=high_watermark)
        await self._emit(oona_pb2.StreamResponse(progress=progress))
        return None

    async def _wait(self, until_s: float | None) -> None:
        """Wait for the waker, or for the earlier of the two times on the loop's clock."""
        times = [time for time in (until_s, self._wakes_at_s()) if time is not None]
        timer = asyncio.get_running_loop().call_at(min(times), self._waker.set) if times else None
        await self._waker.wait()
        if timer is not None:
            timer.cancel()


class PrivateReader(Subscription):
    """A reader for itself: it sees everything from its start on, and acknowledges nothing.

    Args:
        start: offset to start from.
        end: offset to stop before. None: never.
        run_ids: only records of these runs. Empty: of all.
    """

    def __init__(
        self,
        subscription_id: int,
        topic: Topic,
        emit: Emit,
        delivery_records: int,
        *,
        start: int,
        end: int | None,
        run_ids: frozenset[str],
    ) -> None:
        self._run_ids = run_ids
        super().__init__(subscription_id, topic, emit, delivery_records)
        self.start_offset = start
        self._next = start
        self._end_offset = end
        self._blocked = False
        self._says_progress: asyncio.TimerHandle | None = None

    def _attend(self) -> None:
        if self._run_ids:
            self._topic.passers.add(self._pass)
        else:
            super()._attend()

    def close(self) -> None:
        """Take no further part."""
        super().close()
        self._topic.passers.discard(self._pass)
        if self._says_progress is not None:
            self._says_progress.cancel()

    def _pass(self, start: int, end: int, run_ids: AbstractSet[str] | None) -> None:
        """Move on over what is of other runs; else look.

        With many readers of a run each, whatever is stored is of no interest to almost all of them.
        """
        if (
            run_ids is None
            or self._next != start
            or not (start >= self._topic.bounds.earliest and self._run_ids.isdisjoint(run_ids))
            or (self._end_offset is not None and end >= self._end_offset)
        ):
            self._waker.set()
            return
        self._next = end
        if (self._told_high_watermark or self.start_offset) < self._topic.bounds.earliest:
            # The place from which it would go on after a break is there no longer; the one where it is has to be said.
            self._waker.set()
        elif self._says_progress is None:
            loop = asyncio.get_running_loop()
            self._says_progress = loop.call_later(_PASSED_PROGRESS_INTERVAL_S, self._say_progress)

    def _say_progress(self) -> None:
        self._says_progress = None
        self._waker.set()

    def grant(self, messages: int, size: int) -> None:
        """Add credit."""
        self._blocked = False
        super().grant(messages, size)

    def _end(self) -> oona_pb2.Closed | None:
        if self._end_offset is not None and self._next >= self._end_offset:
            return oona_pb2.Closed(reason=oona_pb2.CLOSE_REASON_END_REACHED)
        earliest = self._topic.bounds.earliest
        if self._next < earliest:
            return oona_pb2.Closed(reason=oona_pb2.CLOSE_REASON_BEHIND_FLOOR, earliest_offset=earliest)
        return None

    def _has_caught_up(self) -> bool:
        return self._next >= self._topic.bounds.next

    async def _advance(self) -> bool:
        if self._blocked or self._has_caught_up():
            return False
        before = self._next
        frames = await self._topic.read(self._next)
        if not frames or frames[0].first_offset > self._next:
            return True  # Purged meanwhile.
        delivery = self._new_delivery()
        self._fill(delivery, frames)
        if delivery.count:
            await self._deliver(delivery)
        return self._next > before

    def _fill(self, delivery: DeliveryBuilder, frames: list[Frame]) -> None:
        """Move on over records until the delivery is full, the credit used up, or the frames are through."""
        for frame in frames:
            for first, last, run_id in frame.spans:
                if last < self._next:
                    continue
                if self._end_offset is not None:
                    last = min(last, self._end_offset - 1)  # noqa: PLW2901
                    if last < self._next:
                        return
                # A record of no run stands for one that a damaged log lost.
                if run_id and (not self._run_ids or run_id in self._run_ids):
                    start = max(first, self._next) - frame.first_offset
                    end = delivery.add(frame.records(), start, last + 1 - frame.first_offset)
                    self._next = frame.first_offset + end
                    if self._next <= last:
                        self._blocked = not delivery.is_full
                        return
                self._next = last + 1
