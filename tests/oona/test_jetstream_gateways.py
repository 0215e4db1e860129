"""Several gateways on one NATS server serve one bus."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from pathlib import Path

import grpc
import pytest

from esperml.client import Backoff, BehindFloorError, OonaClient, RejectedError
from esperml.v1 import event_pb2, oona_pb2

pytest.importorskip("nats")

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture(scope="module")
def gateways_module():
    spec = importlib.util.spec_from_file_location("gateways", Path(__file__).with_name("gateways.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def gateways(gateways_module, jetstream_settings):
    """Two gateways of one cluster."""
    cluster = jetstream_settings.jetstream.model_copy(update={"lease_s": 1.0, "timeout_s": 3.0})
    settings = jetstream_settings.model_copy(update={"jetstream": cluster})
    async with contextlib.AsyncExitStack() as stack:
        both = [gateways_module.Gateway(settings) for _ in range(2)]
        for gateway in both:
            await gateway.start()
            stack.push_async_callback(gateway.stop)
        yield both


@pytest.fixture
def client():
    def connect(*gateways, name: str) -> OonaClient:
        target = ",".join(gateway.target for gateway in gateways)
        return OonaClient(target, client_id=name, backoff=Backoff(initial_s=0.02, longest_s=0.2))

    return connect


def numbers(records) -> list[int]:
    return [int(record.event.run_ended.error) for record in records]


async def read(subscription, count: int) -> list[event_pb2.Record]:
    records = []
    async with asyncio.timeout(20):
        while len(records) < count:
            records.append(await anext(subscription))
    return records


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_is_published_at_one_gateway_is_read_at_the_other(gateways, client, make_event):
    async with (
        client(gateways[0], name="writer") as writer,
        client(gateways[1], name="reader") as reader,
        reader.subscribe(EVENTS, start=EARLIEST) as subscription,
    ):
        for number in range(20):
            await writer.publish(EVENTS, [make_event(mark=str(number))])
        assert numbers(await read(subscription, 20)) == list(range(20))


async def test_publishers_at_both_gateways_share_one_log_without_gaps(gateways, client, make_event):
    async def publish(gateway, name: str) -> None:
        async with client(gateway, name=name) as oona:
            frames = [[make_event(name, f"{first + i}") for i in range(5)] for first in range(0, 200, 5)]
            await asyncio.gather(*(oona.publish(EVENTS, frame) for frame in frames))

    names = [f"p{index}" for index in range(6)]
    await asyncio.gather(*(publish(gateways[index % 2], name) for index, name in enumerate(names)))
    async with (
        client(gateways[0], name="reader") as reader,
        reader.subscribe(EVENTS, start=EARLIEST, end_offset=1200) as subscription,
    ):
        records = [record async for record in subscription]
    assert [record.offset for record in records] == list(range(1200))
    for name in names:
        assert numbers(record for record in records if record.event.run_id == name) == list(range(200))


async def test_a_publisher_that_changes_the_gateway_goes_on_with_its_sequence(gateways, open_stream, make_event):
    async with open_stream(gateways[0].target, "mover") as old:
        publish = oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[make_event(), make_event()])
        assert (await old.answer(publish=publish)).published.count == 2
        async with open_stream(gateways[1].target, "mover") as new:
            assert new.opened.next_sequence == 3
            code, detail = await old.status()
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "another server" in detail
            again = (await new.answer(publish=publish)).published
            assert (again.count, again.duplicates) == (0, 2)
            telemetry = oona_pb2.Publish(kind=EVENTS, first_sequence=3, events=[make_event()])
            assert (await new.answer(publish=telemetry)).published.first_offset == 2


async def test_members_at_both_gateways_share_a_groups_runs(gateways, client, make_event):
    async with (
        client(*gateways, name="one") as one,
        client(gateways[1], name="two") as two,
        one.subscribe(EVENTS, group="g") as first,
        two.subscribe(EVENTS, group="g") as second,
    ):
        runs = [f"run-{index}" for index in range(8)]
        got: dict[str, dict[str, list[int]]] = {"one": {}, "two": {}}

        async def take(name: str, subscription) -> None:
            async for record in subscription:
                got[name].setdefault(record.event.run_id, []).append(int(record.event.run_ended.error))
                await subscription.ack(record)

        tasks = [asyncio.create_task(take("one", first)), asyncio.create_task(take("two", second))]
        for number in range(10):
            await one.publish(EVENTS, [make_event(run_id, str(number)) for run_id in runs])
        await until(lambda: sum(len(n) for runs in got.values() for n in runs.values()) == 80)
        assert not got["one"].keys() & got["two"].keys()
        assert len(got["one"]) == len(got["two"]) == 4
        assert all(seen == list(range(10)) for runs in got.values() for seen in runs.values())
        for oona in (one, two):
            async with asyncio.timeout(10):
                while [group.lag for group in (await oona.describe(EVENTS)).groups] != [0]:
                    pass
        for task in tasks:
            task.cancel()


async def test_a_member_elsewhere_is_refused_as_one_here_is(gateways, client):
    async with (
        client(gateways[0], name="one") as one,
        client(gateways[1], name="two") as two,
        one.subscribe(EVENTS, group="g", run_ids=["a"]),
    ):
        with pytest.raises(RejectedError, match="must all ask for the same runs"):
            async with two.subscribe(EVENTS, group="g", run_ids=["b"]):
                pass


async def test_a_member_elsewhere_gets_back_what_it_gave_back_and_dead_letters_can_be_had_anywhere(
    gateways, client, make_event
):
    again = oona_pb2.Redelivery(max_attempts=2)
    again.min_delay.FromMilliseconds(1)
    again.max_delay.FromMilliseconds(1)
    async with client(gateways[0], name="one") as one, client(gateways[1], name="two") as two:
        async with one.subscribe(EVENTS, group="g"):
            pass
        async with two.subscribe(EVENTS, group="g", redelivery=again) as subscription:
            await two.publish(EVENTS, [make_event(mark="7")])
            for attempt in (1, 2):
                [record] = await read(subscription, 1)
                assert record.delivery_attempt == attempt
                await subscription.nack(record)
            for oona in (one, two):
                async with asyncio.timeout(10):
                    while not (letters := [letter async for letter in oona.dead_letters(EVENTS, "g")]):
                        pass
                assert numbers([letters[0].record]) == [7]
            assert await two.replay_dead_letters(EVENTS, "g") == 1
            [record] = await read(subscription, 1)
            assert numbers([record]) == [7]
            assert await two.purge_dead_letters(EVENTS, "g") == 1
            assert [letter async for letter in one.dead_letters(EVENTS, "g")] == []


async def test_a_purge_at_one_gateway_is_seen_at_the_other(gateways, client, make_event):
    async with client(gateways[0], name="one") as one, client(gateways[1], name="two") as two:
        for number in range(4):
            await one.publish(EVENTS, [make_event(mark=str(number))])
        async with two.subscribe(EVENTS, start=EARLIEST, credit=1) as subscription:
            await read(subscription, 1)
            assert await one.purge(EVENTS, 3) == 3
            with pytest.raises(BehindFloorError) as caught:
                await read(subscription, 4)
            assert caught.value.earliest_offset == 3
        assert (await two.describe(EVENTS)).topic.earliest_offset == 3


async def test_a_gateway_that_ends_hands_its_groups_over(gateways, client, make_event):
    async with (
        client(*gateways, name="one") as one,
        client(*reversed(gateways), name="two") as two,
        one.subscribe(EVENTS, group="g") as first,
        two.subscribe(EVENTS, group="g") as second,
    ):
        await one.publish(EVENTS, [make_event("a", "0"), make_event("b", "0")])
        had = {}
        for name, subscription in (("one", first), ("two", second)):
            [record] = await read(subscription, 1)
            await subscription.ack(record)
            had[name] = record.event.run_id
        await until(lambda: gateways[1].broker._store.records[EVENTS, "g"].owners)
        await gateways[0].stop()
        gateways[0].stop = lambda: asyncio.sleep(0)
        await two.publish(EVENTS, [make_event("a", "1"), make_event("b", "1")])
        for name, subscription in (("one", first), ("two", second)):
            [record] = await read(subscription, 1)
            assert (record.event.run_id, numbers([record])) == (had[name], [1])
