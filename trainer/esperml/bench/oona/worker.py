"""A process that publishes, or one that consumes, and does as it is told over its standard input.

``python -m esperml.bench.oona.worker CLIENT ROLE ADDRESS``. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from dataclasses import asdict
from typing import Any, Final

from esperml.bench.oona.clients import Consumer, Publisher
from esperml.settings import LogSettings, configure_logging

CLIENTS: Final = {
    "oona": ("esperml.bench.oona.clients", "OonaPublisher", "OonaConsumer"),
    "redis-sync": ("esperml.bench.oona.redis_clients", "SyncRedisPublisher", "SyncRedisConsumer"),
    "redis-asyncio": ("esperml.bench.oona.redis_clients", "AsyncRedisPublisher", "AsyncRedisConsumer"),
    "nats": ("esperml.bench.oona.nats_clients", "NatsPublisher", "NatsConsumer"),
}
"""Client → module, publisher and consumer: a process imports the client that it is and no other."""


class PublisherProcess:
    """Answers requests to publish.

    Args:
        publisher: the client.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def prepare(self, block: str, payload: int) -> dict[str, Any]:
        """Make the messages of a block."""
        await self._publisher.prepare(block, payload)
        return {}

    async def publish(self, count: int, frame: int) -> dict[str, Any]:
        """Publish; when the first was handed over."""
        started_s = time.monotonic()
        await self._publisher.publish(count, frame)
        return {"started_s": started_s}

    async def publish_singly(self, count: int, pause_s: float) -> dict[str, Any]:
        """Publish one message at a time and pause after its confirmation; when each was handed over."""
        sent_s: list[float] = []
        for _ in range(count):
            sent_s.append(time.monotonic())
            await self._publisher.publish(1, 1)
            await asyncio.sleep(pause_s)
        return {"sent_s": sent_s}


class ConsumerProcess:
    """Answers requests to consume.

    Args:
        consumer: the client.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def prepare(self, block: str) -> dict[str, Any]:
        """Make the queue of a block."""
        await self._consumer.prepare(block)
        return {}

    async def consume(self, count: int, batch: int) -> dict[str, Any]:
        """Read and acknowledge so many messages."""
        return asdict(await self._consumer.consume(count, batch))

    async def finish(self) -> dict[str, Any]:
        """Delete the queue."""
        await self._consumer.finish()
        return {}


def make_peer(client: str, role: str, address: str) -> Any:
    """The publisher or the consumer of a client."""
    module, publisher, consumer = CLIENTS[client]
    name = publisher if role == "publisher" else consumer
    return getattr(importlib.import_module(module), name)(address)


async def main(client: str, role: str, address: str) -> None:
    """Serve requests until standard input ends."""
    configure_logging(LogSettings(level="warning"))
    peer = make_peer(client, role, address)
    process = PublisherProcess(peer) if role == "publisher" else ConsumerProcess(peer)
    await peer.connect()
    _say({})
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        _say(await getattr(process, request.pop("do"))(**request))
    await peer.close()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
