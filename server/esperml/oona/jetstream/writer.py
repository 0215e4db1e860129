"""Stores what a gateway is asked to store in one kind's stream: whatever has come in goes out as one atomic batch.

Offsets and publishers' sequences are worked out from what the gateway has seen of the stream, and the batch is stored
only where nothing else was stored since (compare and set on the stream's last sequence). Otherwise the gateway catches
up and works them out anew. A batch that nobody confirmed may be stored all the same, or become so later: it is looked
for before anything is tried again, and can never be stored twice, since it and its successor expect the same last
sequence.
"""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import structlog

from esperml.oona.jetstream.link import MAX_BATCH_MESSAGES, ConflictError, Message, RefusedError, new_id
from esperml.oona.jetstream.names import to_token
from esperml.oona.jetstream.records import (
    FRAME_HEADER,
    PUBLISHER_HEADER,
    FramePart,
    PublisherState,
    StateRecord,
    TopicState,
    split,
)
from esperml.oona.jetstream.topic import encode_notice
from esperml.oona.log import (
    Appended,
    LogDamagedError,
    LogError,
    LogFullError,
    LogMovedError,
    LogUnavailableError,
    SequenceGapError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from esperml.oona.jetstream.link import Link
    from esperml.oona.jetstream.records import Part
    from esperml.oona.jetstream.topic import TopicStream
    from esperml.oona.log import EncodedEvents

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")

# What one batch may take in beyond its first request: the cluster holds it in memory until it is whole.
_MAX_BATCH_BYTES: Final = 8 * 2**20
# A client that only reads leaves no trace for longer than this.
_IDLE_PUBLISHER_TTL: Final = "24h"
_RETRY_S: Final = 0.05
_FULL_RETRY_S: Final = 5.0
_DAMAGED_RETRY_S: Final = 1.0


class PublisherMovedError(LogMovedError):
    """The publisher has opened a stream at another gateway, which stores for it now."""

    def __init__(self, client_id: str) -> None:
        super().__init__(f"{client_id!r} has gone to another server")


@dataclass(slots=True, eq=False)
class Request(Generic[_T]):
    """One thing to store.

    Attributes:
        work: works it out; what it returns is the outcome once the batch is stored.
        messages: most messages that it takes.
        size: about its bytes.
        client_id: the publisher whose order it must keep.
        deadline_s: when to give up, on the loop's clock.
        future: resolved when it is stored, or cannot be.
        after: must be done first.
    """

    work: Callable[[Draft], _T]
    messages: int
    size: int
    client_id: str
    deadline_s: float
    future: asyncio.Future[_T]
    after: asyncio.Future[object] | None = None


@dataclass(slots=True)
class _Outcome(Generic[_T]):
    request: Request[_T]
    value: _T | None = None
    error: LogError | None = None

    def settle(self) -> None:
        if self.request.future.done():
            return
        if self.error is not None:
            fail(self.request.future, self.error)
        else:
            self.request.future.set_result(self.value)  # type: ignore[arg-type]


def fail(future: asyncio.Future[_T], error: LogError) -> None:
    """Fail a future that nobody may be waiting for any more."""
    if not future.done():
        future.set_exception(error)
        future.exception()


class Draft:
    """A batch as it is being put together, and the log as it will be once that is stored.

    Args:
        stream: the stream as it is.
        gateway: this gateway.
        last_sequence: the last sequence of a publisher over all kinds.
        max_message_bytes: most bytes of one message.
    """

    def __init__(
        self, stream: TopicStream, gateway: str, last_sequence: Callable[[str], int], max_message_bytes: int
    ) -> None:
        self.batch_id = new_id()
        self.base = stream.last_sequence
        self.outcomes: list[_Outcome[object]] = []
        self.starts: list[tuple[int, int]] = []
        self.states: list[Message] = []
        self._names = stream.names
        self._here = stream.sequences
        self._topic = stream.state
        self._gateway = gateway
        self._last_sequence = last_sequence
        self._max_message_bytes = max_message_bytes
        self._events: list[Message] = []
        self._sequences: dict[str, int] = {}
        self._publishers: dict[str, int] = {}
        self._floor_moved = False
        self._now_ns = max(time.time_ns(), self._topic.append_time_ns)

    @property
    def messages(self) -> list[Message]:
        """Everything to be stored, in order; complete after :meth:`finish`."""
        return self._events + self.states

    def add(self, request: Request[object]) -> None:
        """Work a request out."""
        try:
            self.outcomes.append(_Outcome(request, request.work(self)))
        except (SequenceGapError, PublisherMovedError) as error:
            self.outcomes.append(_Outcome(request, error=error))

    def append(self, client_id: str, first_sequence: int, events: EncodedEvents, parts: Sequence[Part]) -> Appended:
        """Put events in, which ``parts`` are if all are new. Raises :class:`SequenceGapError`."""
        last = self._sequences.get(client_id)
        if last is None:
            last = self._last_sequence(client_id)
        if first_sequence > last + 1:
            raise SequenceGapError(last + 1, first_sequence)
        topic = self._topic
        duplicates = min(last + 1 - first_sequence, len(events))
        count = len(events) - duplicates
        if count:
            if duplicates:
                parts = split(events, duplicates, self._max_message_bytes)
            self._put(f"{to_token(client_id)} {last + 1}", count, parts)
            self._sequences[client_id] = self._publishers[client_id] = last + count
        return Appended(topic.next, count, duplicates, self._now_ns)

    def acquire(self, client_id: str) -> None:
        """Let this gateway be the one that stores for a publisher: what another still has under way is refused."""
        self._publishers.setdefault(client_id, self._here.get(client_id, 0))

    def move_floor(self, earliest: int, earliest_bytes: int) -> int:
        """Let the log start at an offset. Returns the offset at which it starts, which may lie above."""
        topic = self._topic
        if earliest > topic.earliest:
            self._topic = TopicState(topic.next, topic.next_bytes, topic.append_time_ns, earliest, earliest_bytes)
            self._floor_moved = True
        return self._topic.earliest

    def finish(self) -> None:
        """Put the states behind the events, so that each stream ends with what is known of it."""
        for client_id, sequence in self._publishers.items():
            record = StateRecord(self._topic, self.batch_id, PublisherState(sequence, self._gateway))
            headers = {"Nats-Rollup": "sub"} | ({} if sequence else {"Nats-TTL": _IDLE_PUBLISHER_TTL})
            self.states.append(Message(self._names.publisher(client_id), record.encode(), headers))
        if self._floor_moved:
            record = StateRecord(self._topic, self.batch_id)
            self.states.append(Message(self._names.floor, record.encode(), {"Nats-Rollup": "sub"}))

    def _put(self, publisher: str, count: int, parts: Sequence[Part]) -> None:
        topic = self._topic
        self.starts.append((topic.next, self.base + len(self._events) + 1))
        for number, (run_id, data) in enumerate(parts):
            place = FramePart(topic.next, count, self._now_ns, topic.next_bytes, zlib.crc32(data), number, len(parts))
            headers = {FRAME_HEADER: place.header(), PUBLISHER_HEADER: publisher}
            self._events.append(Message(self._names.run(run_id), data, headers))
        self._topic = TopicState(
            topic.next + count,
            topic.next_bytes + sum(len(part.data) for part in parts),
            self._now_ns,
            topic.earliest,
            topic.earliest_bytes,
        )


@dataclass(slots=True)
class TopicWriter:
    """The one who stores in a stream, for this gateway. Somebody must await :meth:`run`.

    Attributes:
        stream: the stream.
        link: the connection.
        gateway: this gateway.
        last_sequence: the last sequence of a publisher over all kinds.
    """

    stream: TopicStream
    link: Link
    gateway: str
    last_sequence: Callable[[str], int]
    _waiting: deque[Request[object]] = field(default_factory=deque)
    _work: asyncio.Event = field(default_factory=asyncio.Event)
    _attempts: dict[str, Draft] = field(default_factory=dict)
    _problem: str = "other gateways store without a pause"

    def ask(self, request: Request[object]) -> None:
        """Queue a request."""
        self._waiting.append(request)
        self._work.set()
        if request.after is not None:
            request.after.add_done_callback(lambda _: self._work.set())

    async def run(self) -> None:
        """Store what is asked for, until cancelled."""
        while True:
            self._work.clear()
            draft = self._draft()
            if draft is None:
                await self._work.wait()
            elif not draft.messages:
                self._settle(draft)
            else:
                await self._store(draft)

    async def drain(self) -> None:
        """Wait until nothing waits any more: all is stored, or given up."""
        while self._waiting:
            await asyncio.wait([request.future for request in self._waiting])

    def _draft(self) -> Draft | None:
        """Work out the next batch; None where there is nothing to do now. Requests stay queued until it is stored."""
        now_s = asyncio.get_running_loop().time()
        draft = Draft(self.stream, self.gateway, self.last_sequence, self.link.max_message_bytes)
        held_up: set[str] = set()
        messages = size = 0
        for request in list(self._waiting):
            if request.future.cancelled():
                self._waiting.remove(request)  # Nobody wants it any more.
                continue
            if request.deadline_s <= now_s:
                self._give_up(request, LogUnavailableError(f"not confirmed in time: {self._problem}"))
                continue
            if request.client_id in held_up or (request.after is not None and not request.after.done()):
                held_up.add(request.client_id)
                continue
            # Each brings a state besides; the floor may bring one more.
            messages += request.messages + 1
            size += request.size
            if draft.outcomes and (messages >= MAX_BATCH_MESSAGES or size > _MAX_BATCH_BYTES):
                break
            draft.add(request)
        if not draft.outcomes:
            return None
        draft.finish()
        return draft

    async def _store(self, draft: Draft) -> None:
        self._attempts[draft.batch_id] = draft
        self.stream.awaited = set(self._attempts)
        try:
            last = await self.link.store_batch(draft.messages, draft.batch_id, draft.base)
        except ConflictError:
            await self._catch_up()
        except RefusedError as error:
            if error.full:
                self._attempts.pop(draft.batch_id)
                problem = LogFullError(str(error), _FULL_RETRY_S)
                for outcome in draft.outcomes:
                    self._give_up(outcome.request, problem)
            else:
                self._problem = str(error)
                _log.debug("batch_refused", stream=self.stream.names.stream, detail=str(error))
                await self._catch_up()
        except LogUnavailableError as error:
            self._problem = str(error)
            _log.debug("batch_unconfirmed", stream=self.stream.names.stream, detail=str(error))
            await self._catch_up()
        else:
            await self._stored(draft, last)

    async def _catch_up(self) -> None:
        """Learn what was stored instead, and which of the batches that nobody confirmed are stored after all."""
        # Many gateways that lost to the same one must not all come back at once.
        await asyncio.sleep(_RETRY_S * random.random())
        try:
            await self.stream.catch_up_with_leader()
        except LogUnavailableError as error:
            self._problem = str(error)
            await asyncio.sleep(_RETRY_S)
            return
        except LogDamagedError as error:
            self._problem = str(error)
            _log.error("stream_damaged", stream=self.stream.names.stream, detail=self._problem)
            await asyncio.sleep(_DAMAGED_RETRY_S)
            return
        for batch_id in self.stream.landed & self._attempts.keys():
            self._settle(self._attempts[batch_id])
        self.stream.landed.clear()
        # What was stored since keeps any earlier batch from being stored.
        behind = self.stream.last_sequence
        self._attempts = {batch_id: draft for batch_id, draft in self._attempts.items() if draft.base >= behind}

    async def _stored(self, draft: Draft, last: int) -> None:
        self._attempts.clear()
        self.stream.landed.clear()
        for offset, sequence in draft.starts:
            self.stream.remember(offset, sequence)
        # Confirmed and known at the same moment.
        self._settle(draft)
        states = [(message.subject, message.data) for message in draft.states]
        self.stream.apply_batch(draft.base, last, states)
        notice = encode_notice(draft.base, last, draft.states)
        if len(notice) <= self.link.max_message_bytes:
            await self.link.publish(self.stream.names.notices, notice)

    def _settle(self, draft: Draft) -> None:
        for outcome in draft.outcomes:
            # A batch that turns out to be stored may hold what was given up meanwhile.
            with suppress(ValueError):
                self._waiting.remove(outcome.request)
            outcome.settle()

    def _give_up(self, request: Request[object], error: LogError) -> None:
        with suppress(ValueError):
            self._waiting.remove(request)
        fail(request.future, error)
