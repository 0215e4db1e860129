"""Publishers and consumers: what a measurement asks of them, and those of the bus."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Final, Protocol

from esperml.client import OonaClient, Subscription, new_event
from esperml.v1 import event_pb2, oona_pb2, run_pb2

KIND: Final = event_pb2.KIND_EVENTS
RUNS: Final = 8
LARGEST_FRAME: Final = 256
READ_BATCH: Final = 256
IN_FLIGHT: Final = 4096
"""Events that a publisher keeps unconfirmed, and a consumer unread, where its client can: the same for all systems."""


@dataclass(slots=True)
class Arrivals:
    """What a consumer read.

    Attributes:
        times_s: when each batch arrived, on the monotonic clock, which all processes of a machine share, in s.
        counts: messages in each.
        settled_s: when the last acknowledgement was confirmed, in s.
    """

    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    settled_s: float = 0.0

    def add(self, count: int) -> None:
        """Note that messages arrived now."""
        self.times_s.append(time.monotonic())
        self.counts.append(count)


class Publisher(Protocol):
    """Publishes messages that were made beforehand."""

    async def connect(self) -> None:
        """Connect to the server."""
        ...

    async def prepare(self, block: str, payload: int) -> None:
        """Make messages of ``payload`` bytes, for the queue of a block."""
        ...

    async def publish(self, count: int, frame: int) -> None:
        """Publish ``count`` messages, ``frame`` at a time where the system can; returns when all are confirmed."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...


class Consumer(Protocol):
    """Reads messages as a member of a group and acknowledges each."""

    async def connect(self) -> None:
        """Connect to the server."""
        ...

    async def prepare(self, block: str) -> None:
        """Make the queue of a block and join its group."""
        ...

    async def consume(self, count: int, batch: int) -> Arrivals:
        """Read and acknowledge ``count`` messages, at most ``batch`` at a time; returns when all are acknowledged."""
        ...

    async def finish(self) -> None:
        """Delete the queue of the block."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...


class Job(Protocol):
    """Something that is done again and again."""

    def __call__(self) -> Coroutine[Any, Any, object]:
        """Do it once."""
        ...


async def side_by_side(jobs: int, lanes: int, job: Job) -> None:
    """Do ``job`` so many times, in ``lanes`` at once: each starts its next when its last is done."""
    left = iter(range(jobs))

    async def lane() -> None:
        for _ in left:
            await job()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(lanes, jobs)):
            tasks.create_task(lane())


def make_events(payload: int, run_id: str = "run-0", count: int = LARGEST_FRAME) -> list[event_pb2.Event]:
    """Events of one run, of exactly ``payload`` bytes each as they go over the wire.

    Raises:
        ValueError: an event cannot be that small.
    """
    events = []
    for _ in range(count):
        event = new_event(run_id, run_ended=run_pb2.RunEnded(error="x" * payload))
        while (surplus := event.ByteSize() - payload) > 0:
            text = event.run_ended.error
            if surplus > len(text):
                raise ValueError(f"an event has at least {event.ByteSize() - len(text)} bytes, not {payload}")
            event.run_ended.error = text[surplus:]
        # A length prefix that shrank with the text leaves room for a byte or two.
        event.traceparent = ""
        event.event_id += "0" * (payload - event.ByteSize())
        events.append(event)
    return events


def make_payloads(payload: int) -> list[bytes]:
    """The same as bytes ready to send, for brokers that carry bytes."""
    return [event.SerializeToString() for event in make_events(payload)]


class OonaPublisher:
    """The bus's own client.

    Args:
        address: ``host:port``.
    """

    def __init__(self, address: str) -> None:
        self._client = OonaClient(address, client_id=f"bench-publisher-{uuid.uuid4().hex}")
        self._runs: list[list[event_pb2.Event]] = []

    async def connect(self) -> None:
        """Connect to the server."""
        await self._client.__aenter__()
        await self._client.connected()

    async def prepare(self, block: str, payload: int) -> None:
        """Make the events; the bus has one log for all blocks."""
        self._runs = [make_events(payload, f"run-{run}") for run in range(RUNS)]

    async def publish(self, count: int, frame: int) -> None:
        """Publish in frames, several of them under way. A frame is of one run, as a session's is; runs take turns."""
        frames = cycle([events[:frame] for events in self._runs])

        def publish_frame() -> Coroutine[Any, Any, object]:
            return self._client.publish(KIND, next(frames))

        await side_by_side(count // frame, frames_in_flight(frame), publish_frame)

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()


def frames_in_flight(frame: int) -> int:
    """Frames that a publisher keeps under way."""
    return max(1, IN_FLIGHT // frame)


class OonaConsumer:
    """The bus's own client, as the one member of a group.

    Args:
        address: ``host:port``.
    """

    def __init__(self, address: str) -> None:
        self._client = OonaClient(address, client_id=f"bench-consumer-{uuid.uuid4().hex}")
        self._subscription: Subscription = self._client.subscribe(
            KIND, group="bench", start=oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_LATEST), credit=IN_FLIGHT
        )
        self._batches = self._subscription.batches()

    async def connect(self) -> None:
        """Connect to the server and join the group."""
        await self._client.__aenter__()
        await self._subscription.__aenter__()

    async def prepare(self, block: str) -> None:
        """The bus has one log and one group for all blocks."""

    async def consume(self, count: int, batch: int) -> Arrivals:
        """Read whatever has arrived, acknowledge it, and wait until that is stored."""
        arrivals = Arrivals()
        while count:
            records = await anext(self._batches)
            arrivals.add(len(records))
            await self._subscription.ack(*records)
            count -= len(records)
        arrivals.settled_s = time.monotonic()
        return arrivals

    async def finish(self) -> None:
        """The log stays."""

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()
