"""The client where something ends, is given up or is refused at the wrong moment."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from esperml.client import (
    Backoff,
    BehindFloorError,
    FrameTooLargeError,
    InvalidRequestError,
    OonaClient,
    PublishTimeoutError,
)
from esperml.oona import SqliteLog
from esperml.oona.log import GroupProgress
from esperml.oona.ranges import RangeSet
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


async def test_a_subscription_given_up_while_entering_leaves_no_member_behind(client, events):
    async with client() as oona:
        await oona.connected()
        entering = asyncio.create_task(oona.subscribe(EVENTS, group="g").__aenter__())
        await asyncio.sleep(0)
        entering.cancel()
        await asyncio.wait([entering])
        await oona.publish(EVENTS, events(0))
        assert [group.members for group in (await oona.describe(EVENTS)).groups] == [0]


async def test_a_frame_that_is_too_large_makes_room_for_who_waits_behind_it(
    bus, client, make_event, events, monkeypatch
):
    monkeypatch.setattr("esperml.client.oona.WINDOW_BYTES", 2**16)
    await bus.stop()
    await bus.start(max_frame_bytes=2**16)
    async with client() as oona:
        async with asyncio.timeout(10):
            too_large, published = await asyncio.gather(
                oona.publish(EVENTS, [make_event(mark="x" * 2**17)]),
                oona.publish(EVENTS, events(0)),
                return_exceptions=True,
            )
        assert isinstance(too_large, FrameTooLargeError)
        assert isinstance(published, oona_pb2.Published)


async def test_a_private_reader_that_gives_a_record_back_is_refused_and_loses_nothing(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 4))
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=5, credit=2) as subscription:
            first = await anext(subscription)
            with pytest.raises(InvalidRequestError, match="private reader"):
                await subscription.nack(first)
            await oona.publish(EVENTS, events(4))
            assert marks([record async for record in subscription]) == [1, 2, 3, 4]


async def test_a_record_given_back_without_a_stream_and_settled_by_another_holds_nothing_up(bus, events):
    # Slow to come again, so that the next stream is the first that it tries.
    oona = OonaClient(bus.target, client_id="test", backoff=Backoff(1.0, 1.0))
    async with oona, oona.subscribe(EVENTS, group="g") as subscription:
        await oona.publish(EVENTS, events(0))
        record = await anext(subscription)
        await bus.stop()
        while oona.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await subscription.nack(record)
        log = SqliteLog(bus.path)
        await log.save_group(EVENTS, "g", GroupProgress(1, RangeSet()))
        await log.close()
        await bus.start()
        await oona.publish(EVENTS, events(1))
        async with asyncio.timeout(10):
            assert marks([await anext(subscription)]) == [1]


async def test_bounded_reads_log_no_refusals(client, events):
    async with client() as oona:
        await oona.publish(EVENTS, events(0, 50))
        with capture_logs() as logs:
            for _ in range(20):
                async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=50, credit=2) as subscription:
                    assert len([record async for record in subscription]) == 50
            await oona.publish(EVENTS, events(50))
    assert [entry for entry in logs if entry["log_level"] == "warning"] == []


async def test_a_full_disk_is_all_that_is_warned_of_however_much_waits(bus, client, events):
    await bus.stop()
    await bus.start(max_log_bytes=100_000)
    async with client() as oona:
        await oona.connected()
        with capture_logs() as logs:
            outcomes = await asyncio.gather(
                *(oona.publish(EVENTS, events(100 * number, 100), timeout_s=1) for number in range(60)),
                return_exceptions=True,
            )
    assert any(isinstance(outcome, PublishTimeoutError) for outcome in outcomes)
    assert {entry["event"] for entry in logs if entry["log_level"] == "warning"} == {"publishing_waits"}


async def test_acknowledging_what_was_read_before_a_purge_is_told_like_a_broken_stream(client, events):
    async with client() as oona:
        for number in range(3):
            await oona.publish(EVENTS, events(number))
        async with oona.subscribe(EVENTS, group="g", credit=1) as subscription:
            record = await anext(subscription)
            await oona.purge(EVENTS, 3)
            await oona.publish(EVENTS, events(3))
            assert await subscription.ack(record) is None
            with pytest.raises(BehindFloorError):
                assert len([record async for record in subscription]) <= 1
