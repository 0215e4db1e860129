"""A client that speaks properly, but for what it spoils: it has a place in the grammar, so that deeper code is reached.

It keeps what a proper client keeps (its sequence, its subscriptions, what was delivered to it), makes the next proper
request from that, and spoils some of them: a field that is not as it was, bytes that are not, a frame cut short, sent
twice, or sent behind the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter, deque
from datetime import timedelta
from pathlib import Path
from random import Random

import grpc
from google.protobuf.message import DecodeError

from esperml.client import new_event
from esperml.v1 import event_pb2, oona_pb2, run_pb2

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzzing import alter, mutated

# No frame may hold up the service for longer. A stream whose client id another one takes ends sooner.
DEADLINE_S = 30
# Answered behind everything that came before it, for no stream has such a subscription.
LAST = oona_pb2.StreamRequest(request_id=2**62 + 1, unsubscribe=oona_pb2.Unsubscribe(subscription_id=2**62 + 1))
# A visitor waits for its answers after about so many requests.
IN_FLIGHT = 12
RUNS = ["run-1", "run-2", "run-3"]
GROUPS = ["", "group-1", "group-2"]


def stands(data: bytes) -> bool:
    """Whether the stream stands after it: it is a frame, and does not open the stream once more."""
    try:
        return oona_pb2.StreamRequest.FromString(data).WhichOneof("request") != "open"
    except DecodeError:
        return False


class Visitor:
    """One stream of a client that may spoil what it sends.

    Args:
        channel: to the server.
        client_id: its name.
        random: what it does.
        spoiled: how many of its requests are to be spoiled; then it goes.

    Attributes:
        met: what it was told: answers and rejections by their names, records, records that came again.
    """

    def __init__(self, channel: grpc.aio.Channel, client_id: str, random: Random, spoiled: int) -> None:
        self.met: Counter[str] = Counter()
        self.spoiled = 0
        self._to_spoil = spoiled
        self._client_id = client_id
        self._random = random
        self._call = channel.stream_stream("/esperml.v1.Oona/Stream", None, oona_pb2.StreamResponse.FromString)(None)
        self._request_id = 0
        self._next_sequence = 1
        # Whether each is of a group.
        self._subscriptions: dict[int, bool] = {}
        self._ungranted: list[int] = []
        self._delivered: dict[int, deque[int]] = {}
        self._answered = 0
        self._ended = False
        self._came = asyncio.Event()

    async def visit(self) -> grpc.StatusCode | str:
        """Open a stream, send, and read until the last request is answered or the stream ends; how it ended."""
        reading = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(DEADLINE_S):
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await self._send()
                return await reading
        finally:
            reading.cancel()
            self._call.cancel()

    async def _send(self) -> None:
        opening = self._request(open=oona_pb2.Open(client_id=self._client_id))
        await self._call.write(opening.SerializeToString())
        await self._caught_up()
        held: bytes | None = None
        while self.spoiled < self._to_spoil and not self._ended:
            request = self._proper()
            frames = [request.SerializeToString()]
            if self._random.random() < 0.5:
                self.spoiled += 1
                if self._random.random() < 0.15:
                    frames, held = [], frames[0]
                else:
                    sequence = request.publish.first_sequence
                    frames = self._spoil(request, frames[0])
                    if sequence:
                        # Most that are spoiled are refused; of one that was stored after all, the next is a duplicate.
                        self._next_sequence = sequence
            if held is not None and frames:
                frames, held = [*frames, held], None
            for frame in frames:
                await self._call.write(frame)
            if not all(map(stands, frames)):
                break
            if self._random.random() < 1 / IN_FLIGHT:
                await self._caught_up()
        await self._call.write(LAST.SerializeToString())

    def _spoil(self, request: oona_pb2.StreamRequest, frame: bytes) -> list[bytes]:
        match self._random.randrange(8):
            case 0:
                return [frame, frame]
            case 1 | 2:
                spoiled = mutated(frame, frame, self._random)
            case 3:
                spoiled = frame[: self._random.randrange(len(frame))]
            case _:
                alter(request, self._random)
                spoiled = request.SerializeToString()
        # What ends the stream ends the visit, which shall not always be short.
        return [spoiled] if stands(spoiled) or self._random.random() < 0.2 else [frame, frame]

    def _request(self, **request: object) -> oona_pb2.StreamRequest:
        self._request_id += 1
        return oona_pb2.StreamRequest(request_id=self._request_id, **request)

    def _proper(self) -> oona_pb2.StreamRequest:
        """A request that makes sense at this point."""
        random = self._random
        if self._ungranted:
            return self._request(grant=oona_pb2.Grant(subscription_id=self._ungranted.pop(), messages=50))
        draw = random.random()
        if draw < 0.3 or (not self._subscriptions and draw < 0.5):
            return self._publish()
        if not self._subscriptions or (draw < 0.4 and len(self._subscriptions) < 4):
            return self._subscribe()
        subscription_id = random.choice(list(self._subscriptions))
        delivered = self._delivered[subscription_id]
        if self._subscriptions[subscription_id] and delivered and draw < 0.75:
            return self._acknowledge(subscription_id, delivered)
        if draw < 0.95:
            grant = oona_pb2.Grant(subscription_id=subscription_id, messages=random.randint(1, 20))
            return self._request(grant=grant)
        del self._subscriptions[subscription_id], self._delivered[subscription_id]
        return self._request(unsubscribe=oona_pb2.Unsubscribe(subscription_id=subscription_id))

    def _kind(self) -> event_pb2.Kind.ValueType:
        # Telemetry does not carry what visitors publish.
        return event_pb2.KIND_EVENTS if self._random.random() < 0.95 else event_pb2.KIND_TELEMETRY

    def _publish(self) -> oona_pb2.StreamRequest:
        ended = run_pb2.RunEnded(error="x" * self._random.choice([0, 10, 200]))
        events = [
            new_event(self._random.choice(RUNS), run_ended=ended) for _ in range(self._random.choice([1, 1, 2, 8]))
        ]
        publish = oona_pb2.Publish(kind=self._kind(), first_sequence=self._next_sequence, events=events)
        self._next_sequence += len(events)
        return self._request(publish=publish)

    def _subscribe(self) -> oona_pb2.StreamRequest:
        random = self._random
        subscribe = oona_pb2.Subscribe(
            subscription_id=random.choice([self._request_id + 1, 1, 2]),
            kind=self._kind(),
            group=random.choice(GROUPS),
        )
        if subscribe.group:
            subscribe.redelivery.max_attempts = random.randint(1, 3)
            subscribe.redelivery.min_delay.FromTimedelta(timedelta(milliseconds=random.randint(0, 5)))
            subscribe.redelivery.max_delay.FromTimedelta(timedelta(milliseconds=10))
            subscribe.ack_deadline.FromTimedelta(timedelta(milliseconds=random.choice([10, 1000])))
        else:
            subscribe.start.anchor = random.choice([oona_pb2.ANCHOR_EARLIEST, oona_pb2.ANCHOR_LATEST])
            subscribe.run_ids.extend(random.choice([[], RUNS[:1]]))
            if random.random() < 0.2:
                subscribe.end_offset = random.randint(0, 50)
        self._ungranted.append(subscribe.subscription_id)
        self._subscriptions[subscribe.subscription_id] = bool(subscribe.group)
        self._delivered[subscribe.subscription_id] = deque(maxlen=64)
        return self._request(subscribe=subscribe)

    def _acknowledge(self, subscription_id: int, delivered: deque[int]) -> oona_pb2.StreamRequest:
        ack = oona_pb2.Ack(subscription_id=subscription_id)
        for _ in range(self._random.randint(1, len(delivered))):
            offset = delivered.popleft()
            match self._random.randrange(4):
                case 0:
                    ack.nacked.append(offset)
                case 1:
                    ack.extended.append(offset)
                    delivered.append(offset)
                case _:
                    ack.acked.add(first=offset, last=offset)
        return self._request(ack=ack)

    async def _caught_up(self) -> None:
        """Wait until everything sent so far is answered, or the stream has ended."""
        ping = oona_pb2.Unsubscribe(subscription_id=LAST.unsubscribe.subscription_id)
        request = self._request(unsubscribe=ping)
        await self._call.write(request.SerializeToString())
        while self._answered < request.request_id and not self._ended:
            self._came.clear()
            await self._came.wait()

    async def _read(self) -> grpc.StatusCode | str:
        try:
            with contextlib.suppress(grpc.aio.AioRpcError):
                while isinstance(response := await self._call.read(), oona_pb2.StreamResponse):
                    if response.request_id == LAST.request_id:
                        return "stands"
                    self._note(response)
                    self._came.set()
            # Where the stream ends under a write, this side of gRPC may no longer learn with what.
            return "cut" if await self._call.details() == "Internal error from Core" else await self._call.code()
        finally:
            self._ended = True
            self._came.set()

    def _note(self, response: oona_pb2.StreamResponse) -> None:
        name = response.WhichOneof("response") or "nothing"
        self.met[name] += 1
        if response.request_id <= self._request_id:
            self._answered = max(self._answered, response.request_id)
        match name:
            case "opened":
                self._next_sequence = response.opened.next_sequence
            case "published" if response.published.duplicates:
                self._next_sequence += response.published.duplicates
            case "rejected":
                self.met[oona_pb2.RejectReason.Name(response.rejected.reason)] += 1
                if response.rejected.HasField("expected_sequence"):
                    self._next_sequence = response.rejected.expected_sequence
            case "delivery":
                self.met["records"] += len(response.delivery.records)
                offsets = self._delivered.get(response.delivery.subscription_id)
                for record in response.delivery.records:
                    self.met["again"] += record.delivery_attempt > 1
                    if offsets is not None:
                        offsets.append(record.offset)
