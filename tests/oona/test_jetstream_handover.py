"""What clients see when a group or a publisher goes to another gateway: nothing that they must mind."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from pathlib import Path

import grpc
import pytest

from esperml.client import Backoff, OonaClient
from esperml.v1 import event_pb2, oona_pb2

pytest.importorskip("nats")

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture
async def gateways(jetstream_settings):
    """Two gateways of one cluster."""
    spec = importlib.util.spec_from_file_location("gateways", Path(__file__).with_name("gateways.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cluster = jetstream_settings.jetstream.model_copy(update={"lease_s": 1.0, "timeout_s": 3.0})
    settings = jetstream_settings.model_copy(update={"jetstream": cluster})
    async with contextlib.AsyncExitStack() as stack:
        both = [module.Gateway(settings) for _ in range(2)]
        for gateway in both:
            await gateway.start()
            stack.push_async_callback(gateway.stop)
        yield both


def connect(gateway, name: str) -> OonaClient:
    return OonaClient(gateway.target, client_id=name, backoff=Backoff(initial_s=0.02, longest_s=0.2))


def check_nothing_counts_as_trouble(gateways) -> None:
    assert [gateway.service._doors.storage_problem for gateway in gateways] == ["", ""]


@pytest.mark.parametrize("at", [0, 1])
async def test_an_acknowledgement_as_its_group_moves_raises_nothing_and_its_record_comes_again(
    gateways, make_event, at
):
    async with connect(gateways[0], "founder") as founder, connect(gateways[at], "member") as member:
        async with founder.subscribe(EVENTS, group="g"):
            pass
        await founder.publish(EVENTS, [make_event(mark="0")])
        async with member.subscribe(EVENTS, group="g", start=EARLIEST) as subscription, asyncio.timeout(20):
            record = await anext(subscription)
            # As if the first gateway had been silent for too long.
            while not await gateways[1].broker._store.claim((EVENTS, "g")):
                pass
            acknowledged = await subscription.ack(record)
            if acknowledged is None:
                again = await anext(subscription)
                assert (again.offset, again.event.run_ended.error) == (record.offset, "0")
                acknowledged = await subscription.ack(again)
            assert acknowledged == 1
    check_nothing_counts_as_trouble(gateways)


async def test_a_publisher_that_was_taken_over_at_another_gateway_goes_on_and_nothing_is_lost_or_doubled(
    gateways, open_stream, make_event
):
    async with connect(gateways[0], "publisher") as oona, asyncio.timeout(30):
        under_way = []
        for number in range(60):
            under_way.append(asyncio.create_task(oona.publish(EVENTS, [make_event(mark=str(number))])))
            await asyncio.wait(under_way[-4:], return_when=asyncio.FIRST_COMPLETED)
            if number in (20, 40):
                # As a connection of the same client that ended, and of which the news comes late.
                async with open_stream(gateways[1].target, "publisher") as late:
                    assert late.opened.next_sequence > 1
        published = [task.result() for task in under_way if await asyncio.wait([task])]
        assert sum(one.count + one.duplicates for one in published) == 60
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=60) as subscription:
            assert [int(record.event.run_ended.error) async for record in subscription] == list(range(60))
    check_nothing_counts_as_trouble(gateways)


async def test_what_comes_too_late_from_a_publisher_that_moved_ends_its_stream_and_is_no_trouble(
    gateways, open_stream, make_event
):
    gateways[0].broker.on_publisher_moved(lambda _: None)  # The news has not come yet.
    async with open_stream(gateways[0].target, "mover") as old, open_stream(gateways[1].target, "mover") as new:
        await old.send(publish=oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[make_event()]))
        async with asyncio.timeout(20):
            code, detail = await old.status()
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "another server" in detail
        published = await new.answer(publish=oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[make_event()]))
        assert published.published.count == 1
    check_nothing_counts_as_trouble(gateways)
