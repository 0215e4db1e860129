"""The floor: a server that speaks the bus's contract to one publisher and one consumer, and stores nothing.

It takes the same frames, sends the same deliveries within the same credit, and answers the same acknowledgements. What
the bus costs beyond it is what the bus adds: checks, the log, groups, leases.

``python -m esperml.bench.oona.relay`` prints ``{"listening": …}`` and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.bench.oona.bus import say_listening
from esperml.oona import server_options
from esperml.settings import OonaSettings
from esperml.v1 import event_pb2, oona_pb2

# Records that may wait for the consumer before the publisher does.
BUFFERED_RECORDS: Final = 8192


class Relay:
    """Passes events on in memory."""

    def __init__(self, settings: OonaSettings) -> None:
        self._settings = settings
        self._events: deque[tuple[event_pb2.Event, Timestamp]] = deque()
        self._delivered = 0
        self._subscription_id = 0
        self._next_offset = 0
        self._credit = 0
        self._has_work = asyncio.Event()
        self._has_room = asyncio.Event()

    async def stream(
        self,
        _requests: object,
        context: grpc.aio.ServicerContext[oona_pb2.StreamRequest, oona_pb2.StreamResponse],
    ) -> None:
        """One stream, of the publisher or of the consumer."""
        # Answers and deliveries share a stream, which takes one frame at a time.
        writing = asyncio.Lock()

        async def write(response: oona_pb2.StreamResponse) -> None:
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
                response.published.count = len(request.publish.events)
                await self._pass_on(request.publish.events)
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

    async def _pass_on(self, events: Sequence[event_pb2.Event]) -> None:
        while len(self._events) >= BUFFERED_RECORDS:
            self._has_room.clear()
            await self._has_room.wait()
        append_time = Timestamp()
        append_time.GetCurrentTime()
        self._events.extend((event, append_time) for event in events)
        self._next_offset += len(events)
        self._has_work.set()

    async def _deliver(self, write: Callable[[oona_pb2.StreamResponse], Awaitable[None]]) -> None:
        while True:
            if count := min(len(self._events), self._credit, self._settings.delivery_records):
                response = oona_pb2.StreamResponse()
                response.delivery.subscription_id = self._subscription_id
                add, take = response.delivery.records.add, self._events.popleft
                for offset in range(self._delivered, self._delivered + count):
                    event, append_time = take()
                    add(offset=offset, append_time=append_time, event=event, delivery_attempt=1)
                self._delivered += count
                self._credit -= count
                self._has_room.set()
                await write(response)
            else:
                self._has_work.clear()
                await self._has_work.wait()


async def main() -> None:
    """Serve until the process is ended."""
    settings = OonaSettings()
    server = grpc.aio.server(options=[*server_options(settings), ("grpc.so_reuseport", 0)])
    relay = Relay(settings)
    stream: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        cast("Any", relay.stream),
        request_deserializer=oona_pb2.StreamRequest.FromString,
        response_serializer=oona_pb2.StreamResponse.SerializeToString,
    )
    name = oona_pb2.DESCRIPTOR.services_by_name["Oona"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, {"Stream": stream})])
    say_listening(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
