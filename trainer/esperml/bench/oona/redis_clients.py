"""Redis Streams through redis-py: a stream a block, a group of one consumer.

Reading and acknowledging share a round trip: what was read last is acknowledged in the pipeline that reads on.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any, Final, cast

import redis
import redis.asyncio

from esperml.bench.oona.clients import Arrivals, make_payloads, side_by_side

GROUP: Final = "bench"
FIELD: Final = b"e"
BLOCK_MS: Final = 1000
ASYNC_CONNECTIONS: Final = 4


def _address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _ids(reply: Any) -> list[bytes]:
    """Ids in what XREADGROUP answered, of one stream or of none."""
    return [entry[0] for entry in reply[0][1]] if reply else []


class SyncRedisPublisher:
    """redis-py's synchronous client: a pipeline of XADD a frame, one after the other."""

    def __init__(self, address: str) -> None:
        host, port = _address(address)
        self._redis = redis.Redis(host, port, protocol=2)
        self._stream = ""
        self._payloads: list[bytes] = []

    async def connect(self) -> None:
        """Connect to the server."""
        self._redis.ping()

    async def prepare(self, block: str, payload: int) -> None:
        """Make the messages."""
        self._stream = block
        self._payloads = make_payloads(payload)

    async def publish(self, count: int, frame: int) -> None:
        """Publish in pipelines."""
        payloads = self._payloads[:frame]
        for _ in range(count // frame):
            pipeline = self._redis.pipeline(transaction=False)
            for payload in payloads:
                pipeline.xadd(self._stream, {FIELD: payload})
            pipeline.execute()

    async def close(self) -> None:
        """Disconnect."""
        self._redis.close()


class SyncRedisConsumer:
    """redis-py's synchronous client, reading."""

    def __init__(self, address: str) -> None:
        host, port = _address(address)
        self._redis = redis.Redis(host, port, protocol=2)
        self._stream = ""

    async def connect(self) -> None:
        """Connect to the server."""
        self._redis.ping()

    async def prepare(self, block: str) -> None:
        """Make the stream and its group."""
        self._stream = block
        self._redis.xgroup_create(block, GROUP, id="0", mkstream=True)

    async def consume(self, count: int, batch: int) -> Arrivals:
        """Read and acknowledge."""
        arrivals = Arrivals()
        unacknowledged: list[bytes] = []
        while count:
            pipeline = self._redis.pipeline(transaction=False)
            if unacknowledged:
                pipeline.xack(self._stream, GROUP, *unacknowledged)
            pipeline.xreadgroup(GROUP, "member", {self._stream: ">"}, count=min(batch, count), block=BLOCK_MS)
            unacknowledged = _ids(pipeline.execute()[-1])
            arrivals.add(len(unacknowledged))
            count -= len(unacknowledged)
        self._redis.xack(self._stream, GROUP, *unacknowledged)
        arrivals.settled_s = time.monotonic()
        return arrivals

    async def finish(self) -> None:
        """Delete the stream."""
        self._redis.unlink(self._stream)

    async def close(self) -> None:
        """Disconnect."""
        self._redis.close()


class AsyncRedisPublisher:
    """redis-py's asyncio client: a pipeline of XADD a frame, several under way, each on a connection of its own."""

    def __init__(self, address: str) -> None:
        host, port = _address(address)
        self._redis = redis.asyncio.Redis(host=host, port=port, protocol=2)
        self._stream = ""
        self._payloads: list[bytes] = []

    async def connect(self) -> None:
        """Connect to the server."""
        await cast("Coroutine[Any, Any, bool]", self._redis.ping())

    async def prepare(self, block: str, payload: int) -> None:
        """Make the messages."""
        self._stream = block
        self._payloads = make_payloads(payload)

    async def publish(self, count: int, frame: int) -> None:
        """Publish in pipelines."""
        payloads = self._payloads[:frame]

        async def publish_frame() -> None:
            pipeline = self._redis.pipeline(transaction=False)
            for payload in payloads:
                pipeline.xadd(self._stream, {FIELD: payload})
            await pipeline.execute()

        await side_by_side(count // frame, ASYNC_CONNECTIONS, publish_frame)

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()


class AsyncRedisConsumer:
    """redis-py's asyncio client, reading."""

    def __init__(self, address: str) -> None:
        host, port = _address(address)
        self._redis = redis.asyncio.Redis(host=host, port=port, protocol=2)
        self._stream = ""

    async def connect(self) -> None:
        """Connect to the server."""
        await cast("Coroutine[Any, Any, bool]", self._redis.ping())

    async def prepare(self, block: str) -> None:
        """Make the stream and its group."""
        self._stream = block
        await self._redis.xgroup_create(block, GROUP, id="0", mkstream=True)

    async def consume(self, count: int, batch: int) -> Arrivals:
        """Read and acknowledge."""
        arrivals = Arrivals()
        unacknowledged: list[bytes] = []
        while count:
            pipeline = self._redis.pipeline(transaction=False)
            if unacknowledged:
                pipeline.xack(self._stream, GROUP, *unacknowledged)
            pipeline.xreadgroup(GROUP, "member", {self._stream: ">"}, count=min(batch, count), block=BLOCK_MS)
            unacknowledged = _ids((await pipeline.execute())[-1])
            arrivals.add(len(unacknowledged))
            count -= len(unacknowledged)
        await self._redis.xack(self._stream, GROUP, *unacknowledged)
        arrivals.settled_s = time.monotonic()
        return arrivals

    async def finish(self) -> None:
        """Delete the stream."""
        await self._redis.unlink(self._stream)

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()
