"""Members that come and go at the wrong moment, and what must not be left of them."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration

from esperml.oona.admission import Admission, Doors
from esperml.oona.log import GroupProgress
from esperml.oona.ranges import RangeSet
from esperml.oona.rejection import RequestRejectedError
from esperml.oona.stream import ClientStream, StreamEndedError
from esperml.v1 import event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
LATEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_LATEST)


def subscribe(subscription_id: int = 1, **fields: Any) -> oona_pb2.Subscribe:
    return oona_pb2.Subscribe(subscription_id=subscription_id, **{"kind": EVENTS, **fields})


async def discard(_response: oona_pb2.StreamResponse) -> None:
    pass


@pytest.fixture
def store(bus, make_event):
    """Stores frames of one event each, as one publisher."""

    async def store(count: int) -> None:
        for sequence in range(1, count + 1):
            request = oona_pb2.Publish(kind=EVENTS, first_sequence=sequence, events=[make_event()])
            await bus.broker.publish("publisher", request)

    return store


async def test_a_member_whose_client_reads_nothing_and_vanishes_while_joining_leaves_the_group(bus):
    requests: asyncio.Queue[oona_pb2.StreamRequest | None] = asyncio.Queue()
    takes = asyncio.Event()
    takes.set()

    async def write(_response: oona_pb2.StreamResponse) -> None:
        await takes.wait()
        takes.clear()

    stream = ClientStream(bus.broker, Admission(Doors(bus.settings), None, "peer"), requests.get, write)
    requests.put_nowait(oona_pb2.StreamRequest(request_id=1, open=oona_pb2.Open(client_id="stuck")))
    # What fills the outbox, and then the one whose confirmation finds no room.
    for number in range(1, 5):
        requests.put_nowait(oona_pb2.StreamRequest(request_id=1 + number, subscribe=subscribe(number)))
    requests.put_nowait(oona_pb2.StreamRequest(request_id=6, subscribe=subscribe(5, group="g")))
    await stream.open()
    serving = asyncio.create_task(stream.serve())
    while not (groups := bus.broker.groups(EVENTS)) or not groups[0].members:  # noqa: ASYNC110
        await asyncio.sleep(0)
    serving.cancel()
    await asyncio.wait([serving])
    assert bus.broker.groups(EVENTS)[0].members == 0


async def test_members_that_found_a_group_at_once_agree_on_its_start(bus, store):
    await store(3)
    first, second = await asyncio.gather(
        bus.broker.subscribe(subscribe(group="g", start=LATEST), discard),
        bus.broker.subscribe(subscribe(group="g", start=EARLIEST), discard),
    )
    assert (first.start_offset, second.start_offset) == (3, 3)


async def test_members_that_found_a_group_at_once_must_ask_for_the_same_runs(bus):
    outcomes = await asyncio.gather(
        bus.broker.subscribe(subscribe(group="g", run_ids=["a"]), discard),
        bus.broker.subscribe(subscribe(group="g", run_ids=["b"]), discard),
        return_exceptions=True,
    )
    [refused] = [outcome for outcome in outcomes if isinstance(outcome, RequestRejectedError)]
    assert refused.reason == oona_pb2.REJECT_REASON_GROUP_MISMATCH


async def test_a_group_that_is_moved_to_what_is_being_purged_starts_at_the_floor(bus, store):
    await store(3)
    (await bus.broker.subscribe(subscribe(group="g"), discard)).close()
    _, member = await asyncio.gather(
        bus.broker.purge(EVENTS, 2),
        bus.broker.subscribe(subscribe(group="g", start=oona_pb2.StartAt(offset=0)), discard),
    )
    assert member.start_offset == 2
    assert bus.broker.groups(EVENTS)[0].committed_offset == 2


async def test_a_group_that_is_done_with_more_than_is_known_to_be_stored_has_no_lag(bus, store):
    await store(3)
    await bus.log.save_group(EVENTS, "ahead", GroupProgress(5, RangeSet()))
    await bus.stop()
    await bus.start()
    [group] = bus.broker.groups(EVENTS)
    assert (group.committed_offset, group.lag) == (5, 0)


async def test_credit_for_a_replay_that_has_just_ended_is_taken_without_a_word(bus, open_stream, store):
    await store(1)
    async with open_stream(bus.target) as stream:
        await stream.answer(subscribe=subscribe(start=EARLIEST, end_offset=1))
        await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=1))
        await stream.next("closed")
        await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=1))
        refused = await stream.answer(grant=oona_pb2.Grant(subscription_id=2, messages=1))
        assert refused.rejected.reason == oona_pb2.REJECT_REASON_UNKNOWN_SUBSCRIPTION
        assert [response.WhichOneof("response") for response in stream.unasked if response.HasField("rejected")] == []


async def test_a_log_that_cannot_be_searched_by_time_ends_the_stream_with_data_loss(bus, open_stream, store):
    await store(1)
    async with open_stream(bus.target) as stream:
        bus.execute("DROP TABLE frames")
        start = oona_pb2.StartAt()
        start.time.GetCurrentTime()
        await stream.send(subscribe=subscribe(start=start))
        code, detail = await stream.status()
    assert code is grpc.StatusCode.DATA_LOSS
    assert "cannot be read" in detail


async def test_a_failed_publish_whose_client_is_gone_is_no_unhandled_error(bus, make_event):
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    bus.broker.publish("gone", oona_pb2.Publish(kind=EVENTS, first_sequence=7, events=[make_event()]))
    await bus.broker.next_sequence("gone")
    await asyncio.sleep(0)
    gc.collect()
    assert unhandled == []


async def test_a_stream_that_has_been_replaced_stores_nothing_more(bus, make_event):
    requests: asyncio.Queue[oona_pb2.StreamRequest | None] = asyncio.Queue()
    opened = asyncio.Event()

    async def write(_response: oona_pb2.StreamResponse) -> None:
        opened.set()

    stream = ClientStream(bus.broker, Admission(Doors(bus.settings), None, "peer"), requests.get, write)
    requests.put_nowait(oona_pb2.StreamRequest(request_id=1, open=oona_pb2.Open(client_id="twice")))
    await stream.open()
    serving = asyncio.create_task(stream.serve())
    await opened.wait()
    await asyncio.sleep(0)
    publish = oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[make_event()])
    requests.put_nowait(oona_pb2.StreamRequest(request_id=2, publish=publish))
    stream.end(grpc.StatusCode.ABORTED, "another stream was opened")
    with pytest.raises(StreamEndedError, match="another stream"):
        await serving
    assert await bus.broker.next_sequence("twice") == 1


async def test_a_member_without_credit_holds_up_its_group_only_until_it_leaves(
    bus, open_stream, make_event, monkeypatch
):
    monkeypatch.setattr("esperml.oona.members._MAX_WAITING", 4)
    async with open_stream(bus.target, "stuck") as stuck, open_stream(bus.target, "working") as working:
        await stuck.answer(subscribe=subscribe(group="g"))
        await working.answer(subscribe=subscribe(group="g"))
        await working.send(grant=oona_pb2.Grant(subscription_id=1, messages=100))
        first = oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[make_event(run) for run in "abababab"])
        await working.answer(publish=first)
        assert [record.offset for record in await working.records(4)] == [1, 3, 5, 7]
        second = oona_pb2.Publish(kind=EVENTS, first_sequence=9, events=[make_event("b")])
        with structlog.testing.capture_logs() as logs:
            await working.answer(publish=second)
            while not logs:  # noqa: ASYNC110
                await asyncio.sleep(0)
        [held_up] = logs
        assert held_up["event"] == "group_held_up"
        assert (held_up["kind"], held_up["group"], held_up["waiting_spans"]) == ("events", "g", 4)
        assert (held_up["longest_run"], held_up["longest_run_spans"]) == ("a", 4)
        assert (held_up["behind"], held_up["member"]) == ("member", "stuck/1")
        assert bus.broker._groups[EVENTS, "g"].state.cursor == 8
        assert bus.broker.waiting(EVENTS) == {"g": 4}
        await stuck.answer(unsubscribe=oona_pb2.Unsubscribe(subscription_id=1))
        assert [record.offset for record in await working.records(5)] == [0, 2, 4, 6, 8]


async def test_a_run_whose_delay_is_long_holds_up_its_group_beyond_a_limit_which_is_logged_once(
    bus, open_stream, make_event, monkeypatch
):
    monkeypatch.setattr("esperml.oona.members._MAX_WAITING", 3)
    redelivery = oona_pb2.Redelivery(min_delay=Duration(seconds=60), max_delay=Duration(seconds=60))
    async with open_stream(bus.target) as stream:
        await stream.answer(subscribe=subscribe(group="g", redelivery=redelivery))
        await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=100))
        first = oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[make_event(run) for run in "abababab"])
        await stream.answer(publish=first)
        await stream.records(8)
        with structlog.testing.capture_logs() as logs:
            await stream.answer(ack=oona_pb2.Ack(subscription_id=1, nacked=[0]))
            for sequence in (9, 10):
                more = oona_pb2.Publish(kind=EVENTS, first_sequence=sequence, events=[make_event("b")])
                await stream.answer(publish=more)
            while not logs:  # noqa: ASYNC110
                await asyncio.sleep(0)
        [held_up] = logs
        assert (held_up["event"], held_up["longest_run"], held_up["behind"]) == ("group_held_up", "a", "delay")


async def test_an_acknowledgement_that_cannot_be_stored_is_stored_with_the_next(bus, open_stream, store):
    await store(2)
    async with open_stream(bus.target) as stream:
        await stream.answer(subscribe=subscribe(group="g"))
        await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=2))
        await stream.records(2)
        refuse = "CREATE TRIGGER refuse BEFORE UPDATE ON groups BEGIN SELECT RAISE(ABORT, 'full'); END"
        bus.execute(refuse)
        acked = [oona_pb2.OffsetRange(first=0, last=0)]
        refused = await stream.answer(ack=oona_pb2.Ack(subscription_id=1, acked=acked))
        assert refused.rejected.reason == oona_pb2.REJECT_REASON_STORAGE
        bus.execute("DROP TRIGGER refuse")
        acked = [oona_pb2.OffsetRange(first=1, last=1)]
        stored = await stream.answer(ack=oona_pb2.Ack(subscription_id=1, acked=acked))
        assert stored.acked.committed_offset == 2
    await bus.stop()
    await bus.start()
    assert bus.broker.groups(EVENTS)[0].committed_offset == 2


async def test_every_acknowledgement_among_many_gaps_is_stored_when_it_is_confirmed(bus, store, monkeypatch):
    monkeypatch.setattr("esperml.oona.saver._SHORT", 2)
    await store(200)
    member = await bus.broker.subscribe(subscribe(group="g"), discard)
    running = asyncio.create_task(member.run())
    member.grant(200, 2**20)
    state = bus.broker._groups[EVENTS, "g"].state
    while state.waiting or state.cursor < 200:  # noqa: ASYNC110
        await asyncio.sleep(0)
    odd = range(1, 200, 2)
    acked = [member.ack(oona_pb2.Ack(acked=[oona_pb2.OffsetRange(first=offset, last=offset)])) for offset in odd]
    await asyncio.gather(*acked)
    # As after a crash: the member leaves, and is not heard.
    await bus.break_off()
    running.cancel()
    member.close()
    await bus.start()
    assert list(bus.broker._groups[EVENTS, "g"].state.progress.done) == [(offset, offset) for offset in odd]


async def test_a_stream_on_which_nothing_is_said_is_ended(bus, open_stream, monkeypatch):
    monkeypatch.setattr("esperml.oona.stream._OPEN_TIMEOUT_S", 0.05)
    async with open_stream(bus.target, None) as stream:
        code, detail = await stream.status()
    assert (code, detail) == (grpc.StatusCode.INVALID_ARGUMENT, "request: the first must be open, but is nothing")


async def test_clients_that_vanish_in_the_middle_of_a_delivery_are_no_errors(bus, open_stream, make_event, caplog):
    events = [make_event(mark="x" * 5000) for _ in range(200)]
    for sequence in range(1, 2001, 200):
        request = oona_pb2.Publish(kind=EVENTS, first_sequence=sequence, events=events)
        await bus.broker.publish("publisher", request)

    async def read_a_little(number: int) -> None:
        async with open_stream(bus.target, f"reader-{number % 16}") as stream:
            await stream.answer(subscribe=subscribe(start=EARLIEST))
            await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=10**6))
            for _ in range(number % 8):
                await stream.read()

    for first in range(0, 96, 16):
        await asyncio.gather(*(read_a_little(first + number) for number in range(16)))
    while bus.service._doors.inside:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert [entry.getMessage() for entry in caplog.records if entry.levelname == "ERROR"] == []
