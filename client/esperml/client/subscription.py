"""Reading from the bus: one subscription, which outlives the streams that carry it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Protocol, Self

import structlog

from esperml.client.errors import BehindFloorError, ClientClosedError, OonaError, UnknownSubscriptionError, rejection
from esperml.contract import kind_name
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
    from types import TracebackType

    from esperml.client.flow import FlowControl
    from esperml.v1 import event_pb2

_log = structlog.get_logger(__name__)


class Sender(Protocol):
    """What a subscription needs of the client that owns it."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a stream now."""
        ...

    def send(
        self,
        request: oona_pb2.StreamRequest,
        on_answer: Callable[[oona_pb2.StreamResponse | None], None] | None = None,
    ) -> None:
        """Queue a request; the answer, or None when the stream is lost before it comes, goes to ``on_answer``."""
        ...

    def add(self, subscription: Subscription) -> None:
        """Carry the subscription on this stream and on those that follow."""
        ...

    def remove(self, subscription: Subscription) -> None:
        """Carry it no longer."""
        ...


class Subscription:
    """Records of one kind: an async context manager and an async iterator.

    Entering waits until the server has taken the subscription. When the stream breaks, the client opens another and
    the subscription goes on: a private reader behind the last record that it received, a member of a group with
    whatever the group has not acknowledged. Iteration ends at ``end_offset``, after :meth:`drain` or
    :meth:`unsubscribe`.

    Raises (from entering and from iteration):
        RejectedError: the server refused the subscription.
        BehindFloorError: records yet to be read were purged.
        StreamEndedError: the server ended the stream for good.
        ClientClosedError: the client was closed.

    Attributes:
        subscription_id: its number on the stream.
        kind: the log that it reads.
        start_offset: offset from which it reads, as the server said when it last took the subscription.
        high_watermark: offset of the next record to be stored, as far as the server has told.
    """

    def __init__(self, sender: Sender, request: oona_pb2.Subscribe, flow: FlowControl) -> None:
        self.subscription_id = request.subscription_id
        self.kind: event_pb2.Kind.ValueType = request.kind
        self.start_offset = 0
        self.high_watermark = 0
        self._sender = sender
        self._request = request
        self._flow = flow
        self._buffer: deque[event_pb2.Record] = deque()
        self._stands = asyncio.Event()
        self._caught_up = asyncio.Event()
        self._changed = asyncio.Event()
        self._taken = False
        self._ended = False
        self._error: OonaError | None = None
        # Run → offset that was given back, until the server has answered or the record is here again: what comes of the
        # run beyond it, comes again behind it.
        self._held: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        self._sender.add(self)
        try:
            await self._stands.wait()
        except asyncio.CancelledError:
            self._sender.remove(self)
            # The server may have taken it, or be about to; without a stream this goes nowhere.
            self._sender.send(self._unsubscribe_request(), lambda _: None)
            raise
        if self._error is not None:
            raise self._error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.unsubscribe()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> event_pb2.Record:
        if not self._buffer:
            await self._wait_for_records()
        return self._take()

    @property
    def next_offset(self) -> int:
        """Offset from which a private reader goes on: behind all that has arrived, and all that is not for it.

        It stays where it is once the subscription is drained, and is 0 before the server has taken it.
        """
        return self._request.start.offset

    async def batches(self) -> AsyncGenerator[list[event_pb2.Record], None]:
        """Iterate over whatever has arrived, at least one record at a time: fewer awaits than record by record."""
        while True:
            try:
                await self._wait_for_records()
            except StopAsyncIteration:
                return
            records = list(self._buffer)
            self._buffer.clear()
            self._count_taken(len(records), sum([record.ByteSize() for record in records]))
            yield records

    async def caught_up(self) -> None:
        """Wait until the server has sent everything there was, or the subscription has ended.

        What it sent may still wait here to be iterated over.
        """
        await self._caught_up.wait()
        if self._error is not None:
            raise self._error

    async def ack(self, *records: event_pb2.Record) -> int | None:
        """Say that records are done with, and wait until the server has stored it. Groups only.

        Returns:
            The offset below which the whole group is done with everything, or None where the stream broke or the server
            ended the subscription first: what was not acknowledged then comes again, unless it was purged.

        Raises:
            RejectedError: the server refused, for example because the reader is private.
        """
        return await self._settle(oona_pb2.Ack(acked=_ranges(record.offset for record in records)))

    async def nack(self, record: event_pb2.Record) -> None:
        """Give a record back, to be delivered again.

        Later records of its run wait for it: those that have arrived here are dropped and come again behind it.

        Raises:
            RejectedError: the server refused, for example because the reader is private.
        """
        # A private reader has nothing that would come again, and without a stream there is nobody to hold back.
        if self._request.group and self._sender.is_connected:
            self._hold(record)
        await self._settle(oona_pb2.Ack(nacked=[record.offset]), [record.event.run_id])

    async def extend(self, *records: event_pb2.Record) -> None:
        """Say that records are still being worked on: their deadline starts anew.

        Raises:
            RejectedError: the server refused, for example because the reader is private.
        """
        await self._settle(oona_pb2.Ack(extended=[record.offset for record in records]))

    def drain(self) -> None:
        """Take nothing more in. What has arrived can still be iterated over and acknowledged; then iteration ends."""
        self._ended = True
        self._changed.set()
        self._caught_up.set()

    async def unsubscribe(self) -> None:
        """End the subscription and forget what has arrived. Waits for the server only while there is a stream."""
        self.drain()
        self._buffer.clear()
        if not self._taken:
            return
        self._taken = False
        closed = asyncio.Event()
        self._sender.remove(self)
        self._sender.send(self._unsubscribe_request(), lambda _: closed.set())
        await closed.wait()

    # What the client calls as frames come.

    @property
    def stands(self) -> bool:
        """Whether a server has taken the subscription, on this stream or an earlier one."""
        return self._stands.is_set()

    def requests(self) -> list[oona_pb2.StreamRequest]:
        """What a new stream must be sent so that the subscription goes on where it was."""
        messages, size = self._flow.open(len(self._buffer), sum(record.ByteSize() for record in self._buffer))
        subscribe = oona_pb2.StreamRequest(subscribe=self._request)
        if not messages or not size:
            return [subscribe]
        grant = oona_pb2.Grant(subscription_id=self.subscription_id, messages=messages, bytes=size)
        return [subscribe, oona_pb2.StreamRequest(grant=grant)]

    def on_subscribed(self, answer: oona_pb2.StreamResponse | None) -> None:
        """The server took the subscription, refused it, or the stream was lost."""
        if answer is None:
            return
        if answer.HasField("rejected"):
            self._sender.remove(self)
            self.fail(rejection(answer.rejected))
            return
        self.start_offset = answer.subscribed.start_offset
        self.high_watermark = answer.subscribed.high_watermark
        self._goes_on_at(answer.subscribed.start_offset)
        self._taken = True
        self._stands.set()

    def on_lost(self) -> None:
        """The stream is gone. What a group's member has not taken yet comes again, in order, so it is dropped here."""
        self._held.clear()
        if self._request.group:
            self._buffer.clear()

    def on_delivery(self, records: Iterable[event_pb2.Record]) -> None:
        """Records came."""
        if self._ended:
            return
        # Nearly always there is nothing to do for each record.
        self._buffer.extend(self._without_held(records) if self._held else records)
        if self._buffer:
            self._goes_on_at(self._buffer[-1].offset + 1)
        self._changed.set()

    def on_progress(self, high_watermark: int) -> None:
        """The server has sent everything there is."""
        self.high_watermark = high_watermark
        if not self._ended:  # What came since is not here.
            self._goes_on_at(high_watermark)
        self._caught_up.set()

    def on_closed(self, closed: oona_pb2.Closed) -> None:
        """The server ended the subscription unasked."""
        self._taken = False
        self._sender.remove(self)
        if closed.reason == oona_pb2.CLOSE_REASON_BEHIND_FLOOR:
            self.fail(BehindFloorError(closed.earliest_offset))
        else:
            self.drain()

    def fail(self, error: OonaError) -> None:
        """End the subscription with an error, which follows what has arrived."""
        self._error = error
        self._ended = True
        self._taken = False
        for event in (self._stands, self._caught_up, self._changed):
            event.set()

    # Inside.

    def _goes_on_at(self, offset: int) -> None:
        """Note where a private reader goes on after a break; a group knows that itself."""
        if self._request.group:
            self._request.ClearField("start")
        else:
            self._request.start.offset = offset

    def _unsubscribe_request(self) -> oona_pb2.StreamRequest:
        request = oona_pb2.Unsubscribe(subscription_id=self.subscription_id)
        return oona_pb2.StreamRequest(unsubscribe=request)

    def _hold(self, record: event_pb2.Record) -> None:
        """Drop what has arrived of the run behind a record, and what does until the record is here again."""
        run_id = record.event.run_id
        self._held[run_id] = min(record.offset, self._held.get(run_id, record.offset))
        dropped = [other for other in self._buffer if self._is_held(other)]
        self._buffer = deque(other for other in self._buffer if not self._is_held(other))
        self._count_taken(len(dropped), sum(other.ByteSize() for other in dropped))

    def _without_held(self, records: Iterable[event_pb2.Record]) -> list[event_pb2.Record]:
        """Drop the records of a run behind one that was given back, until that is here again."""
        kept = []
        for record in records:
            if self._is_held(record):
                self._count_taken(1, record.ByteSize())
                continue
            if self._held.get(record.event.run_id) == record.offset:
                del self._held[record.event.run_id]
            kept.append(record)
        return kept

    def _is_held(self, record: event_pb2.Record) -> bool:
        held = self._held.get(record.event.run_id)
        return held is not None and record.offset > held

    async def _wait_for_records(self) -> None:
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()

    def _take(self) -> event_pb2.Record:
        record = self._buffer.popleft()
        self._count_taken(1, record.ByteSize())
        return record

    def _count_taken(self, messages: int, size: int) -> None:
        grant = self._flow.take(messages, size)
        if grant is None or self._ended or not self._taken:
            return
        messages, size = grant
        request = oona_pb2.Grant(subscription_id=self.subscription_id, messages=messages, bytes=size)
        self._sender.send(oona_pb2.StreamRequest(grant=request))

    async def _settle(self, ack: oona_pb2.Ack, given_back: Sequence[str] = ()) -> int | None:
        if isinstance(self._error, ClientClosedError):
            raise self._error
        ack.subscription_id = self.subscription_id
        answered: asyncio.Future[oona_pb2.StreamResponse | None] = asyncio.get_running_loop().create_future()

        def on_answer(answer: oona_pb2.StreamResponse | None) -> None:
            # What the server sends from now on of the runs given back, it sends in order.
            for run_id in given_back:
                self._held.pop(run_id, None)
            if not answered.done():
                answered.set_result(answer)

        self._sender.send(oona_pb2.StreamRequest(ack=ack), on_answer)
        answer = await answered
        refused = rejection(answer.rejected) if answer is not None and answer.HasField("rejected") else None
        # The two frames crossed: this one, and that with which the server ended the subscription.
        crossed = isinstance(refused, UnknownSubscriptionError) and isinstance(self._error, BehindFloorError)
        if answer is None or crossed:
            _log.info("acknowledgement_lost", kind=kind_name(self.kind), group=self._request.group)
            return None
        if refused is not None:
            raise refused
        return answer.acked.committed_offset


def _ranges(offsets: Iterable[int]) -> list[oona_pb2.OffsetRange]:
    """Consecutive offsets as ranges."""
    ordered = sorted(set(offsets))
    if ordered and ordered[-1] - ordered[0] == len(ordered) - 1:
        return [oona_pb2.OffsetRange(first=ordered[0], last=ordered[-1])]
    ranges: list[oona_pb2.OffsetRange] = []
    for offset in ordered:
        if ranges and offset <= ranges[-1].last + 1:
            ranges[-1].last = offset
        else:
            ranges.append(oona_pb2.OffsetRange(first=offset, last=offset))
    return ranges
