"""What the bench measures: each client against its server, and the relay."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from dataclasses import replace

import pytest

from esperml.bench.oona import bus, relay, servers, worker
from esperml.bench.oona.clients import make_events
from esperml.bench.oona.lane import SYSTEMS
from esperml.bench.oona.measure import QUICK, measure
from esperml.bench.oona.servers import PeerAbsentError
from esperml.bench.oona.worker import ConsumerProcess, PublisherProcess, make_peer
from esperml.client import OonaClient
from esperml.settings import OonaSettings
from esperml.v1 import event_pb2

COUNT, FRAME = 512, 32
PEERS = {
    "redis-sync": (servers.redis, {"appendfsync": "everysec"}),
    "redis-asyncio": (servers.redis, {"appendfsync": "always"}),
    "nats": (servers.nats, {}),
}


@pytest.fixture(params=["bus", "relay", *PEERS])
async def served(request, tmp_path):
    """The key of a client, and the address of its server."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "bus":
            port = await stack.enter_async_context(bus.serving(OonaSettings(), tmp_path))
            yield "oona", f"127.0.0.1:{port}"
        elif request.param == "relay":
            yield "oona", f"127.0.0.1:{await stack.enter_async_context(relay.serving())}"
        else:
            start, settings = PEERS[request.param]
            try:
                yield request.param, stack.enter_context(start(tmp_path, settings))
            except PeerAbsentError as error:
                pytest.skip(str(error))


@contextlib.asynccontextmanager
async def connected(client: str, address: str):
    publisher, consumer = (make_peer(client, role, address) for role in ("publisher", "consumer"))
    await publisher.connect()
    await consumer.connect()
    yield PublisherProcess(publisher), ConsumerProcess(consumer)
    await consumer.close()
    await publisher.close()


async def test_every_client_reads_and_acknowledges_what_it_published(served):
    async with connected(*served) as (publisher, consumer):
        for block in ("block0", "block1"):
            await consumer.prepare(block)
            await publisher.prepare(block, 256)
            # Synchronous clients hold the loop: all is published before anything is read.
            started_s = (await publisher.publish(COUNT, FRAME))["started_s"]
            arrivals = await consumer.consume(COUNT, 100)
            assert sum(arrivals["counts"]) == COUNT
            assert started_s < arrivals["times_s"][0] <= arrivals["times_s"][-1] < arrivals["settled_s"]
            sent_s = (await publisher.publish_singly(2, 0.001))["sent_s"]
            arrivals = await consumer.consume(2, 1)
            assert sent_s == sorted(sent_s)
            assert sum(arrivals["counts"]) == 2
            await consumer.finish()


async def test_the_relay_keeps_order_and_sends_no_more_than_was_granted():
    async with (
        relay.serving() as port,
        OonaClient(f"127.0.0.1:{port}", client_id="publisher") as publisher,
        OonaClient(f"127.0.0.1:{port}", client_id="consumer") as consumer,
    ):
        events = make_events(200, count=600)
        publishing = asyncio.create_task(publisher.publish(event_pb2.KIND_EVENTS, events))
        async with consumer.subscribe(event_pb2.KIND_EVENTS, group="g", credit=100) as subscription:
            seen = [await anext(subscription) for _ in events]
            assert await subscription.ack(*seen) == 600
        assert (await publishing).count == 600
        assert [record.event for record in seen] == events
        assert [record.offset for record in seen] == list(range(600))


async def test_a_publisher_waits_where_the_relay_has_nobody_to_send_to(monkeypatch):
    monkeypatch.setattr(relay, "BUFFERED_RECORDS", 100)
    async with (
        relay.serving() as port,
        OonaClient(f"127.0.0.1:{port}", client_id="publisher") as publisher,
        OonaClient(f"127.0.0.1:{port}", client_id="consumer") as consumer,
    ):
        frames = [
            asyncio.create_task(publisher.publish(event_pb2.KIND_EVENTS, make_events(200, count=80))) for _ in range(3)
        ]
        await asyncio.wait(frames[:2])
        assert not frames[2].done()
        async with consumer.subscribe(event_pb2.KIND_EVENTS, group="g") as subscription:
            for _ in range(240):
                await anext(subscription)
        assert (await frames[2]).count == 80


async def test_a_worker_does_what_it_is_told_over_its_standard_input(monkeypatch, capsys):
    requests = [
        {"do": "prepare", "block": "block0", "payload": 256},
        {"do": "publish", "count": 32, "frame": 32},
        {"do": "publish_singly", "count": 1, "pause_s": 0},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    async with relay.serving() as port:
        await worker.main("oona", "publisher", f"127.0.0.1:{port}")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(answer) for answer in said] == [[], [], ["started_s"], ["sent_s"]]


def test_the_bus_is_measured_on_jetstream_too(tmp_path):
    systems = [system for system in SYSTEMS if (system.name, system.durability) == ("oona-jetstream", "default")]
    plan = replace(QUICK, rounds=1, block_s=0.001, warm_up_events=256, singles=2, syncs=2)
    steps: list[str] = []
    found = measure(plan, systems=systems, folder=tmp_path, advance=lambda words, _total: steps.append(words))
    if found["skipped"]:
        pytest.skip(found["skipped"][0]["reason"])
    assert found["cases"][0]["e2e_per_s"] > 0
    assert found["ratio_floor"] is None, "there is nothing to compare with"
    assert found["single_p99_over_floor"] is None
    assert len(steps) == 3
