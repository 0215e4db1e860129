"""What the engine on JetStream does beyond the contract of all engines, and how it is opened."""

from __future__ import annotations

import asyncio
import sys

import pytest

from esperml.oona.engines import open_broker
from esperml.oona.jetstream.nats_server import free_ports
from esperml.oona.log import EncodedEvents, LogFullError, LogUnavailableError
from esperml.oona.wire import join_batch
from esperml.settings import JetStreamSettings, OonaSettings, RetentionLimits, RetentionSettings
from esperml.v1 import event_pb2

pytest.importorskip("nats")

EVENTS = event_pb2.KIND_EVENTS


@pytest.fixture
def open_jetstream(jetstream_settings):
    from esperml.oona.jetstream.log import JetStreamLog

    async def open_log(**settings: object) -> JetStreamLog:
        return await JetStreamLog.open(jetstream_settings.model_copy(update=settings))

    return open_log


async def test_a_frame_larger_than_any_message_is_stored_as_one(open_jetstream):
    log = await open_jetstream()
    events = EncodedEvents(["a", "b"], [bytes(3 * 2**20), b"x"])
    await log.append(EVENTS, "p", 1, events)
    await log.append(EVENTS, "p", 3, EncodedEvents(["a"], [b"y"]))
    await log.close()
    log = await open_jetstream()
    frames = await log.read(EVENTS, 1, 1)
    assert [(frame.first_offset, frame.count) for frame in frames][:1] == [(0, 2)]
    assert frames[0].batch == join_batch(events.events)
    await log.close()


async def test_a_log_over_its_limit_refuses_until_it_was_purged(open_jetstream):
    log = await open_jetstream(max_log_bytes=1000)
    events = EncodedEvents(["a"], [bytes(700)])
    await log.append(EVENTS, "p", 1, events)
    with pytest.raises(LogFullError, match="1000 bytes"):
        await log.append(EVENTS, "p", 2, events)
    assert await log.purge(EVENTS, 1) == 1
    assert (await log.append(EVENTS, "p", 2, events)).first_offset == 1
    await log.close()


async def test_old_records_leave_by_number_and_the_last_frame_stays(open_jetstream):
    log = await open_jetstream(retention=RetentionSettings(events=RetentionLimits(records=3)))
    for first in (1, 3, 5):
        await log.append(EVENTS, "p", first, EncodedEvents(["a", "a"], [b"x", b"y"]))
    await log._retain_kind(EVENTS)
    assert (log.bounds(EVENTS).earliest, log.bounds(EVENTS).next) == (4, 6)
    await log.close()


async def test_a_publisher_that_was_lost_to_another_gateway_is_refused_here(open_jetstream):
    one, two = await open_jetstream(), await open_jetstream()
    moved: list[str] = []
    one.publisher_moved = moved.append
    event = EncodedEvents(["a"], [b"x"])
    assert await one.next_sequence("p") == 1
    await one.append(EVENTS, "p", 1, event)
    assert await two.next_sequence("p") == 2
    with pytest.raises(LogUnavailableError, match="another server"):
        await one.append(EVENTS, "p", 2, event)
    assert moved == ["p"]
    assert (await two.append(EVENTS, "p", 2, event)).first_offset == 1
    await one.close()
    await two.close()


async def test_a_cluster_that_does_not_answer_is_named(tmp_path):
    [port] = free_ports(1)
    cluster = JetStreamSettings(servers=f"nats://127.0.0.1:{port}", timeout_s=1)
    with pytest.raises(LogUnavailableError, match=f"127.0.0.1:{port}"):
        async with open_broker(OonaSettings(engine="jetstream", jetstream=cluster), tmp_path):
            pass


async def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("esperml.oona.jetstream")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(LogUnavailableError, match=r"esperml\[jetstream\]"):
        async with open_broker(OonaSettings(engine="jetstream"), tmp_path):
            pass


async def test_the_embedded_engine_is_the_default(tmp_path):
    async with open_broker(OonaSettings(), tmp_path) as broker:
        assert broker.durability == "fsync"
    assert (tmp_path / "oona.sqlite").exists()


async def test_a_call_that_is_cancelled_as_its_answer_comes_ends_as_cancelled(open_jetstream):
    log = await open_jetstream()
    answered = asyncio.Event()

    async def answer(message):
        await answered.wait()
        await message.respond(b"here")

    subscription = await log.link.subscribe("question", answer)
    asking = asyncio.create_task(log.link.ask("question", b""))
    while not (waiting := list(log.link._client._resp_map.values())):  # noqa: ASYNC110
        await asyncio.sleep(0)
    waiting[0].add_done_callback(lambda _: asking.cancel())
    answered.set()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await log.link.unsubscribe(subscription)
    await log.close()
