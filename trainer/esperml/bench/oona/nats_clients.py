"""JetStream through nats-py: a stream on disk a block, a durable pull consumer with explicit acknowledgement."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import nats
from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig, PubAck, StorageType, StreamConfig
from nats.js.client import JetStreamContext

from esperml.bench.oona.clients import IN_FLIGHT, RUNS, Arrivals, make_payloads

FETCH_TIMEOUT_S: Final = 30.0


class NatsPublisher:
    """Publishes asynchronously: there are no frames."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection: Client
        self._jetstream: JetStreamContext
        self._block = ""
        self._payloads: list[bytes] = []

    async def connect(self) -> None:
        """Connect to the server."""
        self._connection = await nats.connect(f"nats://{self._address}")
        self._jetstream = self._connection.jetstream(publish_async_max_pending=IN_FLIGHT)

    async def prepare(self, block: str, payload: int) -> None:
        """Make the messages."""
        self._block = block
        self._payloads = make_payloads(payload)

    async def publish(self, count: int, frame: int) -> None:
        """Publish, waiting while as many as may be are unconfirmed. One alone is sent and waited for."""
        if count == 1:
            await self._jetstream.publish(f"{self._block}.0", self._payloads[0])
            return
        confirmed: list[asyncio.Future[PubAck]] = []
        for index in range(count):
            payload = self._payloads[index % len(self._payloads)]
            confirmed.append(
                await self._jetstream.publish_async(f"{self._block}.{index % RUNS}", payload, FETCH_TIMEOUT_S)
            )
        await asyncio.gather(*confirmed)

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()


class NatsConsumer:
    """Fetches batches and acknowledges each message."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection: Client
        self._jetstream: JetStreamContext
        self._subscription: JetStreamContext.PullSubscription
        self._block = ""

    async def connect(self) -> None:
        """Connect to the server."""
        self._connection = await nats.connect(f"nats://{self._address}")
        self._jetstream = self._connection.jetstream()

    async def prepare(self, block: str) -> None:
        """Make the stream and its consumer."""
        self._block = block
        await self._jetstream.add_stream(StreamConfig(name=block, subjects=[f"{block}.*"], storage=StorageType.FILE))
        config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, max_ack_pending=65_536)
        self._subscription = await self._jetstream.pull_subscribe(
            f"{block}.*", durable="bench", stream=block, config=config
        )

    async def consume(self, count: int, batch: int) -> Arrivals:
        """Fetch and acknowledge; the last acknowledgement is waited for."""
        arrivals = Arrivals()
        while count:
            messages = await self._subscription.fetch(min(batch, count), timeout=FETCH_TIMEOUT_S)
            arrivals.add(len(messages))
            count -= len(messages)
            for message in messages if count else messages[:-1]:
                await message.ack()
        await messages[-1].ack_sync(timeout=FETCH_TIMEOUT_S)
        arrivals.settled_s = time.monotonic()
        return arrivals

    async def finish(self) -> None:
        """Delete the stream."""
        await self._subscription.unsubscribe()
        await self._jetstream.delete_stream(self._block)

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()
