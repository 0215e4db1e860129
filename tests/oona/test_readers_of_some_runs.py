"""Readers of some runs move on over what is of others, without being woken for it."""

from __future__ import annotations

import pytest

from esperml.oona.subscriptions import PrivateReader
from esperml.v1 import event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS


@pytest.fixture
async def reader(bus, open_stream):
    """A stream that reads run-1 alone and has caught up."""
    async with open_stream(bus.target, client_id="reader") as stream:
        await stream.answer(subscribe=oona_pb2.Subscribe(subscription_id=1, kind=EVENTS, run_ids=["run-1"]))
        await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=1000))
        await stream.next("progress")
        yield stream


@pytest.fixture
async def publish(bus, open_stream, make_event):
    """Publishes so many events of a run, a frame each, and returns the offset behind them."""
    async with open_stream(bus.target, client_id="publisher") as stream:
        sequence = 1

        async def publish(run_id: str, count: int = 1) -> int:
            nonlocal sequence
            for _ in range(count):
                frame = oona_pb2.Publish(kind=EVENTS, first_sequence=sequence, events=[make_event(run_id)])
                published = (await stream.answer(publish=frame)).published
                sequence += 1
            return published.first_offset + 1

        yield publish


@pytest.fixture
def looks(monkeypatch):
    """How often a private reader looked for something to send."""
    seen = []
    advance = PrivateReader._advance

    async def counted(self):
        seen.append(self._next)
        return await advance(self)

    monkeypatch.setattr(PrivateReader, "_advance", counted)
    return seen


async def test_records_of_other_runs_do_not_wake_it(looks, reader, publish):
    before = len(looks)
    await publish("run-2", 50)
    assert len(looks) == before
    await publish("run-1")
    assert [record.offset for record in await reader.records(1)] == [50]


async def test_it_is_told_now_and_then_how_far_it_is(reader, publish):
    end = await publish("run-2", 5)
    told = [(await reader.next("progress")).progress.high_watermark]
    while told[-1] < end:
        told.append((await reader.next("progress")).progress.high_watermark)
    assert told[-1] == end
    assert len(told) < 5


async def test_it_is_told_at_once_where_it_is_when_its_old_place_is_purged(bus, reader, publish, monkeypatch):
    monkeypatch.setattr("esperml.oona.subscriptions._PASSED_PROGRESS_INTERVAL_S", 3600)
    end = await publish("run-2", 5)
    assert await bus.broker.purge(EVENTS, end - 1) == end - 1
    assert (await reader.next("progress")).progress.high_watermark == end


async def test_a_purge_of_what_it_moved_over_does_not_end_it(bus, reader, publish):
    end = await publish("run-2", 5)
    assert await bus.broker.purge(EVENTS, end) == end
    await publish("run-1")
    assert [record.offset for record in await reader.records(1)] == [end]


async def test_an_end_that_lies_in_what_is_of_other_runs_ends_it(bus, reader, publish):
    bounded = oona_pb2.Subscribe(subscription_id=2, kind=EVENTS, run_ids=["run-1"], end_offset=3)
    await reader.answer(subscribe=bounded)
    await publish("run-2", 3)
    closed = (await reader.next("closed")).closed
    assert (closed.subscription_id, closed.reason) == (2, oona_pb2.CLOSE_REASON_END_REACHED)


async def test_without_a_cache_it_sees_its_records_all_the_same(bus, open_stream, make_event):
    await bus.stop()
    await bus.start(cache_bytes=0)
    async with open_stream(bus.target) as stream:
        await stream.answer(subscribe=oona_pb2.Subscribe(subscription_id=1, kind=EVENTS, run_ids=["run-1"]))
        await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=10))
        for sequence, run_id in enumerate(("run-2", "run-1", "run-2", "run-1"), 1):
            frame = oona_pb2.Publish(kind=EVENTS, first_sequence=sequence, events=[make_event(run_id)])
            await stream.send(publish=frame)
        assert [record.offset for record in await stream.records(2)] == [1, 3]


async def test_one_that_leaves_is_forgotten(bus, reader, publish):
    await publish("run-2")
    await reader.answer(unsubscribe=oona_pb2.Unsubscribe(subscription_id=1))
    await publish("run-2")
    assert not any(topic.passers for topic in bus.broker._topics.values())
