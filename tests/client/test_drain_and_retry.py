"""Finishing in good order, and coming back after a refusal that time mends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from esperml.client import (
    Backoff,
    ClientClosedError,
    DrainTimeoutError,
    OonaClient,
    PublishTimeoutError,
    ResourceExhaustedError,
    StreamEndedError,
)
from esperml.v1 import event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)

Answer = Callable[[oona_pb2.StreamRequest], oona_pb2.StreamResponse | None]


@pytest.fixture
def client(bus):
    return lambda client_id="test": OonaClient(bus.target, client_id=client_id, backoff=Backoff(0.01, 0.05))


@pytest.fixture
def events(make_event):
    return lambda first, count=1, run="run-1": [make_event(run, str(mark)) for mark in range(first, first + count)]


async def test_draining_waits_until_everything_is_confirmed(client, events):
    async with client() as oona:
        publishing = [asyncio.create_task(oona.publish(EVENTS, events(number))) for number in range(50)]
        await asyncio.sleep(0)
        await oona.drain()
        assert [(await task).count for task in publishing] == [1] * 50
        with pytest.raises(ClientClosedError):
            await oona.publish(EVENTS, events(99))


async def test_draining_waits_for_publishers_that_a_full_window_holds_back(bus, client, events, monkeypatch):
    monkeypatch.setattr("esperml.client.oona.WINDOW_BYTES", 200)
    await bus.stop()
    async with client() as oona:
        publishing = [asyncio.create_task(oona.publish(EVENTS, events(number))) for number in range(20)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(oona.drain())
        await asyncio.sleep(0)
        with pytest.raises(ClientClosedError):
            await oona.publish(EVENTS, events(99))
        await bus.start()
        await draining
        assert [(await task).count for task in publishing] == [1] * 20


async def test_draining_lets_readers_settle_what_has_arrived_and_publish_what_came_of_it(bus, client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 5))
        arrived = asyncio.Event()

        async def work() -> int:
            handled = 0
            async with oona.subscribe(EVENTS, group="g") as subscription:
                async for record in subscription:
                    arrived.set()
                    await oona.publish(EVENTS, events(100 + record.offset))
                    await subscription.ack(record)
                    handled += 1
            return handled

        worker = asyncio.create_task(work())
        await arrived.wait()
        await oona.drain()
        assert await worker >= 5
    async with client("after") as oona:
        [group] = (await oona.describe(EVENTS)).groups
        assert group.committed_offset == worker.result()
        assert group.members == 0


async def test_draining_gives_up_after_a_time_and_closes(bus, client, events):
    await bus.stop()
    async with client() as oona:
        publishing = asyncio.create_task(oona.publish(EVENTS, events(0)))
        await asyncio.sleep(0)
        with pytest.raises(DrainTimeoutError) as caught:
            await oona.drain(timeout_s=0.05)
        assert caught.value.timeout_s == 0.05
        with pytest.raises(ClientClosedError):
            await publishing


async def test_draining_a_client_that_had_failed_says_why(client, events):
    async with client("x" * 200) as oona:
        with pytest.raises(StreamEndedError):
            await oona.connected()
        with pytest.raises(StreamEndedError, match=r"open\.client_id"):
            await oona.drain()


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[str]:
    """A server that opens streams and answers each later frame as told, or ends the stream at None; its address."""

    async def stream(_requests: object, context) -> None:
        while isinstance(request := await context.read(), oona_pb2.StreamRequest):
            response = (
                oona_pb2.StreamResponse(opened=oona_pb2.Opened(next_sequence=1, max_frame_bytes=2**20))
                if request.HasField("open")
                else answer(request)
            )
            if response is None:
                return
            response.request_id = request.request_id
            await context.write(response)

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        stream,
        request_deserializer=oona_pb2.StreamRequest.FromString,
        response_serializer=oona_pb2.StreamResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("esperml.v1.Oona", {"Stream": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def refusal(reason: oona_pb2.RejectReason.ValueType, retry_after_s: float = 0.0) -> oona_pb2.StreamResponse:
    response = oona_pb2.StreamResponse(rejected=oona_pb2.Rejected(reason=reason, message="not now"))
    if retry_after_s:
        response.rejected.retry_after.FromNanoseconds(int(retry_after_s * 1e9))
    return response


async def test_a_publisher_over_its_rate_comes_back_no_earlier_than_it_is_told(events):
    asked: list[float] = []

    def answer(request: oona_pb2.StreamRequest) -> oona_pb2.StreamResponse:
        asked.append(time.monotonic())
        if len(asked) == 1:
            return refusal(oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED, 0.2)
        return oona_pb2.StreamResponse(published=oona_pb2.Published(first_offset=0, count=1))

    async with answering(answer) as target, OonaClient(target, client_id="a", backoff=Backoff(0.001, 0.002)) as oona:
        assert (await oona.publish(EVENTS, events(0), timeout_s=10)).count == 1
    assert asked[1] - asked[0] >= 0.2


async def test_a_publisher_that_stays_over_its_rate_is_told_so_when_time_is_up(events):
    exhausted = refusal(oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED, 7)
    async with answering(lambda _: exhausted) as target, OonaClient(target, client_id="a") as oona:
        with pytest.raises(PublishTimeoutError) as caught:
            await oona.publish(EVENTS, events(0), timeout_s=0.2)
    cause = caught.value.__cause__
    assert isinstance(cause, ResourceExhaustedError)
    assert cause.retry_after_s == 7


async def test_a_subscription_that_stood_waits_out_what_a_new_stream_refuses(events):
    """As when a gateway comes back before its cluster does."""
    subscribed = published = 0

    def answer(request: oona_pb2.StreamRequest) -> oona_pb2.StreamResponse | None:
        nonlocal subscribed, published
        if request.HasField("publish"):
            published += 1
            # The first breaks the stream.
            return None if published == 1 else oona_pb2.StreamResponse(published=oona_pb2.Published(count=1))
        if request.HasField("grant"):
            return refusal(oona_pb2.REJECT_REASON_UNKNOWN_SUBSCRIPTION)
        subscribed += 1
        if subscribed in {2, 3}:
            return refusal(oona_pb2.REJECT_REASON_STORAGE)
        return oona_pb2.StreamResponse(
            subscribed=oona_pb2.Subscribed(subscription_id=1, start_offset=0, high_watermark=subscribed)
        )

    async with (
        answering(answer) as target,
        OonaClient(target, client_id="a", backoff=Backoff(0.001, 0.002)) as oona,
        oona.subscribe(EVENTS) as subscription,
        asyncio.timeout(10),
    ):
        await oona.publish(EVENTS, events(0))
        while subscription.high_watermark != 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert (subscribed, published) == (4, 2)
        # It heard nothing of the two refusals: it ends because it is told to, and without an error.
        subscription.drain()
        assert [record async for record in subscription] == []


async def test_a_new_subscription_that_is_refused_says_so_at_once():
    exhausted = refusal(oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED)
    async with answering(lambda _: exhausted) as target, OonaClient(target, client_id="a") as oona:
        with pytest.raises(ResourceExhaustedError):
            async with oona.subscribe(EVENTS):
                pass
