"""The floor: a server that speaks the bus's contract to one publisher and one consumer, and stores nothing.

It takes the same frames, sends the same deliveries within the same credit, and answers the same acknowledgements; it
puts records together with the bus's own code. What the bus costs beyond it is what the bus adds: checks, the log, and
groups.

``python -m esperml.bench.oona.relay`` prints ``{"listening": …}`` and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, cast

import grpc

from esperml.bench.oona.bus import say_listening
from esperml.oona import server_options
from esperml.oona.wire import EncodedRecords, encode_delivery, published_events
from esperml.settings import OonaSettings
from esperml.v1 import oona_pb2

# Records that may wait for the consumer before the publisher does.
BUFFERED_RECORDS: Final = 8192


class Relay:
    """Passes events on in memory."""

    def __init__(self, settings: OonaSettings) -> None:
        self._settings = settings
        # Frames that wait, each with its length and how much of it was delivered.
        self._frames: deque[tuple[EncodedRecords, int, int]] = deque()
        self._waiting = 0
        self._subscription_id = 0
        self._next_offset = 0
        self._credit = 0
        self._has_work = asyncio.Event()
        self._has_room = asyncio.Event()

    async def stream(
        self,
        _requests: object,
        context: grpc.aio.ServicerContext[oona_pb2.StreamRequest, oona_pb2.StreamResponse | bytes],
    ) -> None:
        """One stream, of the publisher or of the consumer."""
        # Answers and deliveries share a stream, which takes one frame at a time.
        writing = asyncio.Lock()

        async def write(response: oona_pb2.StreamResponse | bytes) -> None:
            async with writing:
                await context.write(response)

        async with asyncio.TaskGroup() as tasks:
            while isinstance(request := await context.read(), oona_pb2.StreamRequest):
                if request.HasField("subscribe"):
                    self._subscription_id = request.subscribe.subscription_id
                    tasks.create_task(self._deliver(write))
                if (response := await self._answer(request)) is not None:
                    response.request_id = request.request_id
                    await write(response)

    async def _answer(self, request: oona_pb2.StreamRequest) -> oona_pb2.StreamResponse | None:
        response = oona_pb2.StreamResponse()
        match request.WhichOneof("request"):
            case "publish":
                response.published.first_offset = self._next_offset
                response.published.count = await self._pass_on(published_events(request.publish))
            case "grant":
                self._credit += request.grant.messages
                self._has_work.set()
                return None
            case "ack":
                response.acked.committed_offset = request.ack.acked[-1].last + 1
            case "open":
                response.opened.next_sequence = 1
                response.opened.max_frame_bytes = self._settings.max_frame_bytes
                response.opened.durability = "none"
            case "subscribe":
                response.subscribed.subscription_id = request.subscribe.subscription_id
            case _:
                response.closed.subscription_id = request.unsubscribe.subscription_id
        return response

    async def _pass_on(self, events: list[bytes]) -> int:
        while self._waiting >= BUFFERED_RECORDS:
            self._has_room.clear()
            await self._has_room.wait()
        count = len(events)
        self._frames.append((EncodedRecords(self._next_offset, time.time_ns(), events), count, 0))
        self._next_offset += count
        self._waiting += count
        self._has_work.set()
        return count

    async def _deliver(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        while True:
            if parts := self._take():
                await write(encode_delivery(self._subscription_id, parts))
            else:
                self._has_work.clear()
                await self._has_work.wait()

    def _take(self) -> list[bytes]:
        """What may be delivered now, as far as it goes into one delivery."""
        parts: list[bytes] = []
        room = min(self._credit, self._settings.delivery_records)
        while room and self._frames:
            records, count, start = self._frames.popleft()
            stop = min(count, start + room)
            parts.append(records.slice(start, stop))
            if stop < count:
                self._frames.appendleft((records, count, stop))
            room -= stop - start
            self._credit -= stop - start
            self._waiting -= stop - start
        self._has_room.set()
        return parts


def _serialize(response: oona_pb2.StreamResponse | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """The relay on a free port, which it yields."""
    settings = OonaSettings()
    server = grpc.aio.server(options=[*server_options(settings), ("grpc.so_reuseport", 0)])
    stream: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        cast("Any", Relay(settings).stream),
        request_deserializer=oona_pb2.StreamRequest.FromString,
        response_serializer=_serialize,
    )
    name = oona_pb2.DESCRIPTOR.services_by_name["Oona"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"Stream": stream})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def main() -> None:
    """Serve until the process is ended."""
    async with serving() as port:
        say_listening(port)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
