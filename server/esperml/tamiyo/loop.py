"""The service loop: the controller on the bus.

Records are acknowledged after what came of them is stored, so each is handled at least once. Handling one twice does no
harm: ids of decisions derive from the run and the step, and the controller knows events that it has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
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
from esperml.tamiyo.rebuilding import FAILURES, RETRY_S, Rebuilding
from esperml.tamiyo.sessions import stale_reports
from esperml.tamiyo.tracing import log_decisions, log_outcome, under
from esperml.tamiyo.work import Work
from esperml.v1 import event_pb2, oona_pb2

GROUP: Final = "tamiyo"
CONSUMED: Final = (event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES, event_pb2.KIND_TELEMETRY)
FRAME_BYTES: Final = 2**20
"""Bytes after which what is published goes into another frame."""

RECORDS_TOGETHER: Final = 32
"""Records that are handled before what came of them is published, and others have their turn."""

Batch = list[tuple[event_pb2.Kind.ValueType, list[event_pb2.Event]]]

CATCH_UP_S: Final = 5.0
"""Longest time that the end of a run waits for its last reports, in s."""

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
        self._rebuilding = Rebuilding(controller, self._publish_rebuilt)
        # Run → the handling of its end, and what that waits for: its last reports.
        self._ending: dict[str, tuple[asyncio.Task[None], asyncio.Task[None]]] = {}
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
                    tasks = [group.create_task(self._rebuilding.run(client))]
                    tasks += [group.create_task(self._consume(client, kind, group)) for kind in CONSUMED]
                    yield
                    for task in (*tasks, *itertools.chain.from_iterable(self._ending.values())):
                        task.cancel()
            finally:
                self._client = None
                self._ending.clear()

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

    async def _consume(self, client: OonaClient, kind: event_pb2.Kind.ValueType, tasks: asyncio.TaskGroup) -> None:
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_COMMITTED)
        while True:
            try:
                async with client.subscribe(kind, group=GROUP, start=start) as subscription:
                    async for records in subscription.batches():
                        await self._take(subscription, records, tasks)
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

    async def _take(
        self, subscription: Subscription, records: Sequence[event_pb2.Record], tasks: asyncio.TaskGroup
    ) -> None:
        stale = stale_reports([record.event for record in records])
        done: list[event_pb2.Record] = []
        outgoing: Outgoing = []
        for record, is_stale in zip(records, stale, strict=True):
            ends = record.event.HasField("run_ended") and self._controller.follows(record.event.run_id)
            if ends or (subscription.kind == event_pb2.KIND_EVENTS and record.event.run_id in self._ending):
                # What comes of the end is published by itself, and must not overtake what came before.
                await self._publish_what_can_be(outgoing)
                outgoing = []
                await self._hurry_end(record.event.run_id)
            if ends:
                self._begin_end(subscription, record, tasks)
                continue
            backlog = subscription.kind == event_pb2.KIND_TELEMETRY and record.offset < self._start
            outgoing += self._handle(subscription.kind, record, stale=is_stale or backlog)
            done.append(record)
            if len(done) % RECORDS_TOGETHER == 0:
                await self._publish_what_can_be(outgoing)
                outgoing = []
                await asyncio.sleep(0)
        await self._publish_what_can_be(outgoing)
        await self._acknowledge(subscription, done)

    def _begin_end(self, subscription: Subscription, record: event_pb2.Record, tasks: asyncio.TaskGroup) -> None:
        last_reports = tasks.create_task(self._catch_up(record.event.run_id))
        end = tasks.create_task(self._end(subscription, record, last_reports))
        self._ending[record.event.run_id] = (end, last_reports)

    async def _hurry_end(self, run_id: str) -> None:
        """Have the end of a run, if it is being waited with, handled at once.

        What follows it, another start for example, stays behind it and waits for no report.
        """
        if run_id in self._ending:
            end, last_reports = self._ending[run_id]
            last_reports.cancel()
            await end

    async def _end(
        self, subscription: Subscription, record: event_pb2.Record, last_reports: asyncio.Task[None]
    ) -> None:
        """Handle the end of a run once what it reported before is handled. Nobody else waits for that."""
        try:
            await asyncio.wait([last_reports])
            await self._publish_what_can_be(self._handle(subscription.kind, record, stale=False))
        finally:
            del self._ending[record.event.run_id]
        await self._acknowledge(subscription, [record])

    async def _publish_rebuilt(self, outgoing: Outgoing) -> None:
        self.work.decided(outgoing)
        await self._publish_what_can_be(outgoing)

    async def _publish_what_can_be(self, outgoing: Outgoing) -> None:
        try:
            await self.publish(outgoing)
        except (RejectedError, FrameTooLargeError) as error:
            # The bus stands, and will not take this ever: what can be done is to say so and go on. What was stored
            # already comes twice, under the same ids.
            if len(outgoing) > 1:
                for item in outgoing:
                    await self._publish_what_can_be([item])
                return
            [(_, event)] = outgoing
            log.error("publish_refused", run_id=event.run_id, problem=str(error))  # noqa: TRY400

    async def _acknowledge(self, subscription: Subscription, records: Sequence[event_pb2.Record]) -> None:
        if not records:
            return
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

    def _handle(self, kind: event_pb2.Kind.ValueType, record: event_pb2.Record, *, stale: bool) -> Outgoing:
        event = record.event
        with under(event):
            try:
                if event.HasField("run_started"):
                    self._rebuilding.started(event.run_id)
                else:
                    self._rebuilding.want(event.run_id, kind, record.offset)
                began_s = time.perf_counter()
                at_s = record.append_time.ToNanoseconds() / 1e9
                outgoing = self._controller.handle(kind, event, stale=stale, at_s=at_s)
                self.work.handled(kind, outgoing, time.perf_counter() - began_s)
                log_outcome(event)
            except InvalidFieldError as error:
                log.warning("event_refused", run_id=event.run_id, field=error.field, problem=error.problem)
            except FAILURES:
                log.exception("event_failed", run_id=event.run_id, kind=kind_name(kind), offset=record.offset)
            else:
                return outgoing
        return []

    def _client_now(self) -> OonaClient:
        if self._client is None:
            raise NotConnectedError
        return self._client


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
