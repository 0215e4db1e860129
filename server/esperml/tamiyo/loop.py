"""The service loop: the controller on the bus.

Records are acknowledged after what came of them is stored, so each is handled at least once. Handling one twice does no
harm: ids of decisions derive from the run and the step, and the controller knows events that it has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Final

import structlog

from esperml.client import (
    BehindFloorError,
    CallFailedError,
    FrameTooLargeError,
    OonaClient,
    OonaError,
    RejectedError,
    StorageError,
    Subscription,
)
from esperml.client.credentials import NO_CREDENTIALS, Credentials
from esperml.contract import InvalidFieldError, kind_name
from esperml.tamiyo.controller import Controller, Outgoing
from esperml.tamiyo.sessions import stale_reports
from esperml.tamiyo.tracing import log_decisions, log_outcome, under
from esperml.tamiyo.work import Work
from esperml.v1 import event_pb2, oona_pb2

GROUP: Final = "tamiyo"
CONSUMED: Final = (event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES, event_pb2.KIND_TELEMETRY)
REPLAYED: Final = (*CONSUMED, event_pb2.KIND_DECISIONS)
FRAME_BYTES: Final = 2**20
"""Bytes after which what is published goes into another frame."""

MAX_MISSING: Final = 1024
"""Runs of which no start was found, remembered so that the logs are not searched for each of their records."""

FAILURES: Final = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What a defect in the handling of one record can raise. It must not stop the other runs."""

Batch = list[tuple[event_pb2.Kind.ValueType, list[event_pb2.Event]]]

CATCH_UP_S: Final = 5.0
"""Longest time that the end of a run waits for its last reports, in s."""

RETRY_S: Final = 1.0
"""Time between two tries of what the bus could not do just then, in s."""

log = structlog.get_logger(__name__)


class NotConnectedError(OonaError):
    """Tamiyo is not on the bus: it is starting or stopping."""

    def __init__(self) -> None:
        super().__init__("Tamiyo is not connected to the bus")


class TamiyoLoop:
    """Feeds a controller from the bus, and puts on the bus what it answers.

    Args:
        controller: decides.
        credentials: token and TLS, where the bus asks for them.

    Attributes:
        work: counts of what the controller did.
    """

    def __init__(self, controller: Controller, *, credentials: Credentials = NO_CREDENTIALS) -> None:
        self._controller = controller
        self._credentials = credentials
        self._client: OonaClient | None = None
        self._turn = asyncio.Lock()
        self._missing: OrderedDict[str, None] = OrderedDict()
        self._start = 0  # Reports below this offset were there before this loop: they say how hosts were then.
        self._committed: dict[event_pb2.Kind.ValueType, int] = {}
        self._progress = asyncio.Condition()
        self.work = Work()

    @contextlib.asynccontextmanager
    async def running(self, target: str) -> AsyncIterator[None]:
        """Serve while the context lasts.

        Args:
            target: address of the bus.

        Raises:
            OonaError: the bus refused the connection for good, or another uses the same client id.
        """
        async with OonaClient(target, client_id=f"tamiyo-{uuid.uuid4().hex}", credentials=self._credentials) as client:
            self._client = client
            try:
                self._start = await self._head(client)
                async with asyncio.TaskGroup() as group:
                    consumers = [group.create_task(self._consume(client, kind)) for kind in CONSUMED]
                    yield
                    for consumer in consumers:
                        consumer.cancel()
            finally:
                self._client = None

    @property
    def is_running(self) -> bool:
        """Whether it is on the bus."""
        return self._client is not None

    async def publish(self, outgoing: Outgoing) -> None:
        """Put events on the bus, in order within each kind, and return when all are stored.

        Raises:
            NotConnectedError: the loop is not running.
            OonaError: the bus will not take them.
        """
        client = self._client_now()
        for kind, events in in_frames(outgoing):
            await client.publish(kind, events)
        log_decisions(outgoing)

    async def _consume(self, client: OonaClient, kind: event_pb2.Kind.ValueType) -> None:
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_COMMITTED)
        while True:
            try:
                async with client.subscribe(kind, group=GROUP, start=start) as subscription:
                    async for records in subscription.batches():
                        await self._take(subscription, records)
            except BehindFloorError as error:
                log.warning("records_purged", kind=kind_name(kind), earliest_offset=error.earliest_offset)
            except StorageError as error:
                # The group is new, and where it starts cannot be stored yet.
                log.warning("group_not_founded", kind=kind_name(kind), problem=str(error))
                await asyncio.sleep(RETRY_S)

    async def _head(self, client: OonaClient) -> int:
        """Offset of the next report to come."""
        while True:
            try:
                return (await client.describe(event_pb2.KIND_TELEMETRY)).topic.next_offset
            except CallFailedError as error:
                log.warning("bus_not_reached", problem=str(error))
                await asyncio.sleep(RETRY_S)

    async def _take(self, subscription: Subscription, records: Sequence[event_pb2.Record]) -> None:
        stale = stale_reports([record.event for record in records])
        for record, is_stale in zip(records, stale, strict=True):
            if record.event.HasField("run_ended"):
                await self._catch_up(record.event.run_id)
            backlog = subscription.kind == event_pb2.KIND_TELEMETRY and record.offset < self._start
            async with self._turn:
                with under(record.event):
                    outgoing = await self._handle(subscription.kind, record, stale=is_stale or backlog)
            try:
                await self.publish(outgoing)
            except (RejectedError, FrameTooLargeError) as error:
                # The bus stands, and will not take this ever: what can be done is to say so and go on.
                log.error("publish_refused", run_id=record.event.run_id, problem=str(error))  # noqa: TRY400
        try:
            committed = await subscription.ack(*records)
        except StorageError as error:
            # It holds while the server runs, and is stored with the next one that can be.
            log.warning("acknowledgement_not_stored", kind=kind_name(subscription.kind), problem=str(error))
            return
        if committed is not None:
            async with self._progress:
                self._committed[subscription.kind] = committed
                self._progress.notify_all()

    async def _catch_up(self, run_id: str) -> None:
        """Wait until what a run reported before its end is handled.

        Each kind has a log of its own, and the end may overtake the last reports. What was stored before the end was
        delivered is waited for, and not for ever: another member of the group may have it.
        """
        client = self._client_now()
        try:
            async with asyncio.timeout(CATCH_UP_S):
                for kind in (event_pb2.KIND_OUTCOMES, event_pb2.KIND_TELEMETRY):
                    described = await client.describe(kind)
                    end = described.topic.next_offset
                    committed = max(
                        (group.committed_offset for group in described.groups if group.name == GROUP), default=0
                    )
                    async with self._progress:
                        while max(committed, self._committed.get(kind, 0)) < end:
                            await self._progress.wait()
        except (TimeoutError, CallFailedError) as error:
            log.warning("end_not_awaited", run_id=run_id, problem=str(error) or f"no progress within {CATCH_UP_S:g} s")

    async def _handle(self, kind: event_pb2.Kind.ValueType, record: event_pb2.Record, *, stale: bool) -> Outgoing:
        event = record.event
        try:
            if event.WhichOneof("payload") != "run_started":
                await self._ensure_known(event.run_id, kind, record.offset)
            began_s = time.perf_counter()
            outgoing = self._controller.handle(kind, event, stale=stale)
            self.work.handled(kind, outgoing, time.perf_counter() - began_s)
            log_outcome(event)
        except InvalidFieldError as error:
            log.warning("event_refused", run_id=event.run_id, field=error.field, problem=error.problem)
        except FAILURES:
            log.exception("event_failed", run_id=event.run_id, kind=kind_name(kind), offset=record.offset)
        else:
            return outgoing
        return []

    async def _ensure_known(self, run_id: str, kind: event_pb2.Kind.ValueType, before: int) -> None:
        """Rebuild a run that started before this process did, and its twin, from what the bus has kept.

        Args:
            run_id: the run.
            kind: kind of the record that is about to be handled.
            before: its offset: the record itself and what follows it come by themselves.
        """
        if self._controller.knows(run_id) or run_id in self._missing:
            return
        kept = await self._kept(run_id, {kind: before})
        twin = next((event.run_started.paired_run for _, event in kept if event.HasField("run_started")), "")
        if twin and not self._controller.knows(twin):
            kept += await self._kept(twin, {})
        if not any(event.HasField("run_started") and event.run_id == run_id for _, event in kept):
            self._missing[run_id] = None
            if len(self._missing) > MAX_MISSING:
                self._missing.popitem(last=False)
        self._controller.rebuild(kept)
        log.info("run_rebuilt", run_id=run_id, events=len(kept))

    async def _kept(self, run_id: str, ends: dict[event_pb2.Kind.ValueType, int]) -> Outgoing:
        while True:
            try:
                return await _replay(self._client_now(), run_id, ends)
            except CallFailedError as error:
                log.warning("replay_failed", run_id=run_id, problem=str(error))
                await asyncio.sleep(RETRY_S)

    def _client_now(self) -> OonaClient:
        if self._client is None:
            raise NotConnectedError
        return self._client


async def _replay(client: OonaClient, run_id: str, ends: dict[event_pb2.Kind.ValueType, int]) -> Outgoing:
    """What the bus has kept of a run, up to the offsets of ``ends`` where a kind has one."""
    kept: Outgoing = []
    for topic in await client.topics():
        end = ends.get(topic.kind, topic.next_offset)
        if topic.kind not in REPLAYED or end <= topic.earliest_offset:
            continue
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
        async with client.subscribe(topic.kind, run_ids=[run_id], start=start, end_offset=end) as subscription:
            kept += [(topic.kind, record.event) async for record in subscription]
    return kept


def in_frames(outgoing: Outgoing, most: int = FRAME_BYTES) -> Batch:
    """Group events by kind, in the order in which the kinds first come, in frames of about ``most`` bytes.

    Args:
        outgoing: events with their kinds.
        most: bytes after which another frame begins. An event that is larger by itself goes alone.
    """
    by_kind: dict[event_pb2.Kind.ValueType, list[event_pb2.Event]] = {}
    for kind, event in outgoing:
        by_kind.setdefault(kind, []).append(event)
    frames: Batch = []
    for kind, events in by_kind.items():
        size = most
        for event in events:
            length = event.ByteSize()
            if size + length > most:
                frames.append((kind, []))
                size = 0
            frames[-1][1].append(event)
            size += length
    return frames
