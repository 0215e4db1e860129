"""The client against a real server that comes and goes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from datetime import timedelta

import grpc
import pytest

from esperml.client import (
    Backoff,
    BehindFloorError,
    BelowFloorError,
    CallFailedError,
    ClientClosedError,
    FrameTooLargeError,
    GroupMismatchError,
    InvalidRequestError,
    OonaClient,
    PublishTimeoutError,
    ResourceExhaustedError,
    StreamEndedError,
    WrongPayloadError,
)
from esperml.v1 import event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture
def client(bus):
    return lambda client_id="test": OonaClient(bus.target, client_id=client_id, backoff=Backoff(0.01, 0.05))


@pytest.fixture
def events(make_event):
    return lambda first, count=1, run="run-1": [make_event(run, str(mark)) for mark in range(first, first + count)]


def marks(records) -> list[int]:
    return [int(record.event.run_ended.error) for record in records]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def stored_marks(oona: OonaClient) -> list[int]:
    end = (await oona.describe(EVENTS)).topic.next_offset
    async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=end) as subscription:
        return marks([record async for record in subscription])


async def test_what_is_published_can_be_read_back(client, events):
    async with client() as oona:
        published = await oona.publish(EVENTS, events(0, 5))
        assert (published.first_offset, published.count, published.duplicates) == (0, 5, 0)
        assert await stored_marks(oona) == [0, 1, 2, 3, 4]


async def test_overlapping_calls_are_stored_in_their_order(client, events):
    async with client() as oona:
        await asyncio.gather(*(oona.publish(EVENTS, events(number)) for number in range(100)))
        assert await stored_marks(oona) == list(range(100))


async def test_a_refused_frame_fails_alone(client, events):
    async with client() as oona:
        outcomes = await asyncio.gather(
            oona.publish(EVENTS, events(0)),
            oona.publish(event_pb2.KIND_COMMANDS, events(1)),
            oona.publish(EVENTS, events(2)),
            oona.publish(EVENTS, []),
            oona.publish(EVENTS, events(3)),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], WrongPayloadError)
        assert outcomes[1].reason == oona_pb2.REJECT_REASON_WRONG_PAYLOAD
        assert "publish.events[0].payload" in outcomes[1].message
        assert isinstance(outcomes[3], InvalidRequestError)
        assert await stored_marks(oona) == [0, 2, 3]


async def test_a_frame_over_the_servers_limit_fails_alone_and_names_the_limit(bus, client, make_event, events):
    await bus.stop()
    await bus.start(max_frame_bytes=2**16)
    async with client() as oona:
        with pytest.raises(FrameTooLargeError) as caught:
            await oona.publish(EVENTS, [make_event(mark="x" * 2**16)])
        assert caught.value.limit == 2**16
        assert caught.value.size > 2**16
        assert (await oona.publish(EVENTS, events(0))).count == 1


async def test_reconnecting_after_restarts_loses_and_duplicates_nothing(bus, client, events):
    async with client() as oona, client("reader") as reading:
        got: list[int] = []
        enough = asyncio.Event()

        async def read() -> None:
            async with reading.subscribe(EVENTS, start=EARLIEST, credit=16) as subscription:
                async for record in subscription:
                    got.append(int(record.event.run_ended.error))
                    if len(got) == 400:
                        enough.set()

        reader = asyncio.create_task(read())
        publishing: list[asyncio.Task[oona_pb2.Published]] = []
        for round_ in range(4):
            publishing += [asyncio.create_task(oona.publish(EVENTS, events(100 * round_ + n))) for n in range(100)]
            await publishing[100 * round_ + 10]
            await (bus.break_off() if round_ % 2 else bus.stop())
            await bus.start()
        await asyncio.gather(*publishing)
        await asyncio.wait_for(enough.wait(), 20)
        reader.cancel()
        assert got == list(range(400))
        assert await stored_marks(oona) == list(range(400))


async def test_the_sequence_of_one_publisher_counts_on_over_its_lives(bus, client, events):
    for life in range(3):
        async with client() as oona:
            await oona.publish(EVENTS, events(2 * life, 2))
        assert await bus.broker.next_sequence("test") == 2 * life + 3


async def test_a_dead_server_is_waited_for_in_the_background(bus, client, events):
    await bus.stop()
    async with client() as oona:
        assert not oona.is_connected
        with pytest.raises(PublishTimeoutError) as caught:
            await oona.publish(EVENTS, events(0), timeout_s=0.05)
        assert caught.value.timeout_s == 0.05
        waiting = asyncio.create_task(oona.publish(EVENTS, events(1)))
        await bus.start()
        await waiting
        # What timed out was not withdrawn.
        assert await stored_marks(oona) == [0, 1]
        assert oona.is_connected


async def test_a_full_disk_is_waited_out_and_named_when_time_is_up(bus, client, events, make_event):
    await bus.stop()
    await bus.start(max_log_bytes=200_000)
    async with client() as oona:
        filling = [make_event(mark="0" * 1000) for _ in range(20)]
        with pytest.raises(PublishTimeoutError) as caught:  # noqa: PT012
            while True:
                await oona.publish(EVENTS, filling, timeout_s=0.3)
        assert isinstance(caught.value.__cause__, ResourceExhaustedError)
        waiting = [asyncio.create_task(oona.publish(EVENTS, events(n))) for n in (1, 2)]
        end = (await oona.describe(EVENTS)).topic.next_offset
        assert await oona.purge(EVENTS, end - 20) == end - 20
        offsets = [(await task).first_offset for task in waiting]
        assert offsets == [end + 20, end + 21]


async def test_a_server_that_lost_its_log_is_published_to_all_the_same(bus, client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 5))
        await bus.stop()
        for leftover in bus.path.parent.iterdir():
            leftover.unlink()
        await bus.start()
        await oona.publish(EVENTS, events(5))
        assert await stored_marks(oona) == [5]


async def test_a_second_client_of_the_same_id_ends_the_first(client, events):
    async with client() as first:
        await first.connected()
        async with client() as second:
            await second.connected()
            with pytest.raises(StreamEndedError) as caught:
                await first.publish(EVENTS, events(0))
            assert caught.value.code is grpc.StatusCode.ABORTED
            with pytest.raises(StreamEndedError):
                await first.connected()
            with pytest.raises(StreamEndedError):
                async with first.subscribe(EVENTS):
                    pass
            assert (await second.publish(EVENTS, events(0))).count == 1


async def test_an_impossible_client_id_fails_for_good(client, events):
    async with client("x" * 200) as oona:
        with pytest.raises(StreamEndedError, match=r"open\.client_id"):
            await oona.publish(EVENTS, events(0))


async def test_closing_fails_what_waits(bus, client, events):
    await bus.stop()
    async with client() as oona:
        waiting = asyncio.create_task(oona.publish(EVENTS, events(0)))
        entering = asyncio.create_task(oona.subscribe(EVENTS).__aenter__())
        await asyncio.sleep(0)
    for task in (waiting, entering):
        with pytest.raises(ClientClosedError):
            await task
    with pytest.raises(ClientClosedError):
        await oona.publish(EVENTS, events(0))


async def test_single_calls_name_what_failed(bus, client):
    oona = client()
    with pytest.raises(CallFailedError, match="DescribeTopic failed with INVALID_ARGUMENT: kind: 0"):
        await oona.describe(event_pb2.KIND_UNSPECIFIED)
    with pytest.raises(CallFailedError, match="PurgeTopic"):
        await oona.purge(event_pb2.KIND_UNSPECIFIED, 1)
    assert len(await oona.topics()) == 6
    await bus.stop()
    with pytest.raises(CallFailedError) as caught:
        await oona.topics()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


# Subscriptions.


async def test_a_refused_subscription_raises_on_entering(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 2))
        await oona.publish(EVENTS, events(2, 2))
        await oona.purge(EVENTS, 2)
        with pytest.raises(BelowFloorError) as caught:
            async with oona.subscribe(EVENTS, start=oona_pb2.StartAt(offset=1)):
                pass
        assert caught.value.earliest_offset == 2
        async with oona.subscribe(EVENTS, group="g", run_ids=["a"]):
            with pytest.raises(GroupMismatchError):
                async with oona.subscribe(EVENTS, group="g"):
                    pass


async def test_a_tail_reader_sees_what_comes_after_it_entered_also_over_a_restart(bus, client, events):
    async with client() as oona, oona.subscribe(EVENTS) as subscription:
        await bus.stop()
        await bus.start()
        await oona.publish(EVENTS, events(7, 3))
        assert marks([await anext(subscription) for _ in range(3)]) == [7, 8, 9]


async def test_catching_up_is_told_with_and_without_records(client, events):
    async with client() as oona:
        async with oona.subscribe(EVENTS) as empty:
            await empty.caught_up()
        await oona.publish(EVENTS, events(0, 3))
        async with oona.subscribe(EVENTS, start=EARLIEST, run_ids=["other"]) as filtered:
            await filtered.caught_up()
            assert filtered.high_watermark == 3


async def test_a_slow_reader_gets_no_more_than_its_credit(bus, client, events):
    async with client() as oona, oona.subscribe(EVENTS, start=EARLIEST, credit=4) as subscription:
        await oona.publish(EVENTS, events(0, 50))
        await until(lambda: len(subscription._buffer) == 4)
        await oona.publish(EVENTS, events(50, 50))
        assert len(subscription._buffer) == 4
        assert marks([await anext(subscription) for _ in range(100)]) == list(range(100))


async def test_batches_hand_over_whatever_has_come(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 50))
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=50) as subscription:
            assert [mark async for batch in subscription.batches() for mark in marks(batch)] == list(range(50))


async def test_a_group_goes_on_behind_what_it_acknowledged(bus, client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 6))
        async with oona.subscribe(EVENTS, group="g", start=EARLIEST) as subscription:
            records = [await anext(subscription) for _ in range(4)]
            assert await subscription.ack(records[0], records[1], records[3]) == 2
            await bus.stop()
            await until(lambda: not oona.is_connected)
            await bus.start()
            again = [await anext(subscription) for _ in range(3)]
            assert [record.offset for record in again] == [2, 4, 5]
            assert await subscription.ack(*again) == 6


async def test_an_acknowledgement_lost_with_the_stream_is_told(bus, client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0))
        async with oona.subscribe(EVENTS, group="g") as subscription:
            record = await anext(subscription)
            await bus.stop()
            await until(lambda: not oona.is_connected)
            assert await subscription.ack(record) is None
            await bus.start()
            again = await anext(subscription)
            assert again.offset == 0
            assert await subscription.ack(again) == 1


async def test_a_nacked_record_comes_again_before_the_rest_of_its_run(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 3, "a") + events(3, 2, "b"))
        async with oona.subscribe(EVENTS, group="g") as subscription:
            first = await anext(subscription)
            await subscription.nack(first)
            seen = [(first.offset, 1)]
            while len(seen) < 6:
                record = await anext(subscription)
                seen.append((record.offset, record.delivery_attempt))
                await subscription.ack(record)
    of_run_a = [item for item in seen if item[0] < 3]
    assert [offset for offset, _ in of_run_a] == [0, 0, 1, 2]
    assert of_run_a[1] == (0, 2)
    assert sorted(offset for offset, _ in seen if offset >= 3) == [3, 4]


async def test_an_unacknowledged_record_comes_again_unless_it_is_extended(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0))
        deadline = timedelta(milliseconds=30)
        async with oona.subscribe(EVENTS, group="g", ack_deadline=deadline) as subscription:
            record = await anext(subscription)
            await subscription.extend(record)
            again = await anext(subscription)
            assert again.delivery_attempt == 2
            assert await subscription.ack(again) == 1


async def test_a_private_reader_cannot_acknowledge(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0))
        async with oona.subscribe(EVENTS, start=EARLIEST) as subscription:
            record = await anext(subscription)
            with pytest.raises(InvalidRequestError, match="private reader"):
                await subscription.ack(record)


async def test_draining_hands_over_what_has_come_and_then_ends(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 3))
        async with oona.subscribe(EVENTS, group="g") as subscription:
            first = await anext(subscription)
            subscription.drain()
            rest = [record async for record in subscription]
            assert marks([first, *rest]) == [0, 1, 2]
            assert await subscription.ack(first, *rest) == 3


async def test_leaving_a_group_hands_its_records_to_the_next(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 3))
        async with oona.subscribe(EVENTS, group="g") as subscription:
            await anext(subscription)
        async with oona.subscribe(EVENTS, group="g") as subscription:
            assert (await anext(subscription)).delivery_attempt == 2


async def test_a_reader_whose_records_are_purged_is_told(client, events):
    async with client() as oona:
        for first in range(4):
            await oona.publish(EVENTS, events(first))
        async with oona.subscribe(EVENTS, start=EARLIEST, credit=1) as subscription:
            assert (await anext(subscription)).offset == 0
            assert (await anext(subscription)).offset == 1
            # Offset 2 may be on its way already; 3 cannot be.
            await oona.publish(EVENTS, events(4, 2))
            await oona.purge(EVENTS, 6)
            with pytest.raises(BehindFloorError) as caught:
                async for _ in subscription:
                    pass
            assert caught.value.earliest_offset == 6


async def test_a_full_window_holds_publishers_back_and_keeps_their_order(bus, client, events, monkeypatch):
    monkeypatch.setattr("esperml.client.oona.WINDOW_BYTES", 200)
    await bus.stop()
    async with client() as oona:
        waiting = [asyncio.create_task(oona.publish(EVENTS, events(number))) for number in range(20)]
        await asyncio.sleep(0)
        given_up = asyncio.create_task(oona.publish(EVENTS, events(99), timeout_s=0.01))
        with pytest.raises(PublishTimeoutError):
            await given_up
        await bus.start()
        await asyncio.gather(*waiting)
        # What timed out before it was taken in is not published.
        assert await stored_marks(oona) == list(range(20))


async def test_what_ends_streams_without_a_status_is_tried_again(bus, events):
    async def end_at_once(_requests, _context) -> None:
        return

    async def end_after_opening(_requests, context) -> None:
        await context.write(oona_pb2.StreamResponse(opened=oona_pb2.Opened(next_sequence=1, max_frame_bytes=1000)))

    await bus.stop()
    for behaviour in (end_at_once, end_after_opening):
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(
            behaviour,
            request_deserializer=oona_pb2.StreamRequest.FromString,
            response_serializer=oona_pb2.StreamResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("esperml.v1.Oona", {"Stream": handler})])
        server.add_insecure_port(bus.target)
        await server.start()
        async with OonaClient(bus.target, client_id=behaviour.__name__, backoff=Backoff(0.001, 0.002)) as oona:
            publishing = asyncio.create_task(oona.publish(EVENTS, events(0)))
            with pytest.raises(PublishTimeoutError):
                await oona.publish(EVENTS, events(1), timeout_s=0.1)
            await server.stop(None)
            await bus.start()
            assert (await publishing).count == 1
        await bus.stop()


async def test_a_server_that_does_not_answer_is_tried_again(bus, client, events, monkeypatch):
    monkeypatch.setattr("esperml.client.connection.OPEN_TIMEOUT_S", 0.02)
    await bus.stop()
    with socket.create_server(("127.0.0.1", bus.port)):
        async with client() as oona:
            with pytest.raises(PublishTimeoutError):
                await oona.publish(EVENTS, events(0), timeout_s=0.2)
            assert not oona.is_connected


async def test_a_group_reads_what_is_no_longer_in_memory(bus, client, events):
    await bus.stop()
    await bus.start(cache_bytes=0)
    async with client() as oona:
        async with oona.subscribe(EVENTS, group="g", credit=3) as one, oona.subscribe(EVENTS, group="g") as two:
            for first in range(0, 40, 4):
                await oona.publish(EVENTS, events(first, 2, "a") + events(first + 2, 2, "b"))
            got: dict[str, list[int]] = {"a": [], "b": []}
            for subscription in (one, two):
                for _ in range(20):
                    record = await anext(subscription)
                    got[record.event.run_id].append(int(record.event.run_ended.error))
                    await subscription.ack(record)
        assert got == {
            "a": [number for number in range(40) if number % 4 < 2],
            "b": [number for number in range(40) if number % 4 >= 2],
        }


async def test_credit_in_bytes_bounds_what_waits_for_a_slow_reader(bus, client, make_event):
    async with client() as oona:
        await oona.publish(EVENTS, [make_event(mark="x" * 1000) for _ in range(40)])
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=40, credit_bytes=4000) as subscription:
            await until(lambda: bool(subscription._buffer))
            assert sum(record.ByteSize() for record in subscription._buffer) <= 4000
            assert len([record async for record in subscription]) == 40


async def test_unsubscribing_forgets_what_has_come_and_ends_iteration(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 5))
        async with oona.subscribe(EVENTS, start=EARLIEST) as subscription:
            await anext(subscription)
            await subscription.unsubscribe()
            assert [record async for record in subscription] == []


async def test_entering_can_be_given_up(bus, client):
    await bus.stop()
    async with client() as oona:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), oona.subscribe(EVENTS):
                pass
        assert oona._subscriptions == {}
