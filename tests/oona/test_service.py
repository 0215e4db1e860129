"""What goes over the wire, frame by frame."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esperml.client import new_event
from esperml.v1 import event_pb2, health_pb2, oona_pb2, oona_pb2_grpc

EVENTS, COMMANDS = event_pb2.KIND_EVENTS, event_pb2.KIND_COMMANDS
# What a later contract might say.
UNKNOWN: Any = 99
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture
async def stream(bus, open_stream):
    async with open_stream(bus.target) as stream:
        yield stream


@pytest.fixture
def publish(make_event):
    """A Publish of so many events, whose marks count on from ``first``."""

    def make(first: int = 1, count: int = 1, runs: tuple[str, ...] = ("run-1",), kind=EVENTS) -> oona_pb2.Publish:
        events = [make_event(runs[index % len(runs)], str(first + index)) for index in range(count)]
        return oona_pb2.Publish(kind=kind, first_sequence=first, events=events)

    return make


def subscribe(subscription_id: int = 1, **fields) -> oona_pb2.Subscribe:
    return oona_pb2.Subscribe(subscription_id=subscription_id, **{"kind": EVENTS, **fields})


def grant(messages: int, size: int = 0, subscription_id: int = 1) -> oona_pb2.Grant:
    return oona_pb2.Grant(subscription_id=subscription_id, messages=messages, bytes=size)


def offsets(records) -> list[int]:
    return [record.offset for record in records]


async def test_opening_says_what_the_client_must_know(bus, stream):
    assert stream.opened.next_sequence == 1
    assert stream.opened.max_frame_bytes == bus.settings.max_frame_bytes
    assert stream.opened.durability == "fsync"


@pytest.mark.parametrize(
    ("frame", "detail"),
    [
        (oona_pb2.StreamRequest(request_id=1, publish=oona_pb2.Publish()), "the first must be open, but is publish"),
        (oona_pb2.StreamRequest(request_id=1), "the first must be open, but is empty"),
        (oona_pb2.StreamRequest(open=oona_pb2.Open(client_id="a")), "request_id: must be above 0"),
        (oona_pb2.StreamRequest(request_id=1, open=oona_pb2.Open()), "open.client_id: must have 1 to 128"),
        (oona_pb2.StreamRequest(request_id=1, open=oona_pb2.Open(client_id="x" * 129)), "not 129"),
    ],
)
async def test_a_first_frame_that_is_no_proper_open_ends_the_stream(bus, open_stream, frame, detail):
    async with open_stream(bus.target, client_id=None) as stream:
        await stream.send_bytes(frame.SerializeToString())
        code, said = await stream.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert detail in said


async def test_a_stream_that_ends_before_it_opens_is_told_so(bus, open_stream):
    async with open_stream(bus.target, client_id=None) as stream:
        await stream.call.done_writing()
        code, said = await stream.status()
    assert (code, said) == (grpc.StatusCode.INVALID_ARGUMENT, "request: the first must be open, but is nothing")


async def test_a_second_open_ends_the_stream(stream):
    await stream.send(open=oona_pb2.Open(client_id="raw"))
    assert (await stream.status())[0] is grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=64))
async def test_bytes_that_are_no_frame_end_one_stream_and_leave_the_server_standing(bus, open_stream, data):
    async with open_stream(bus.target, "good") as good:
        async with open_stream(bus.target, "garbage") as stream:
            await stream.send_bytes(data)
            try:
                oona_pb2.StreamRequest.FromString(data)
            except Exception:  # noqa: BLE001 - whatever protobuf calls malformed
                code, detail = await stream.status()
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert "malformed" in detail
        assert (await good.answer(subscribe=subscribe())).HasField("subscribed")


async def test_a_frame_over_the_limit_ends_the_stream_and_says_the_limit(bus, open_stream, publish):
    await bus.stop()
    await bus.start(max_frame_bytes=2**16)
    for size in (2**16, 2**22):
        async with open_stream(bus.target) as stream:
            await stream.send_bytes(b"\x00" * (size + 1))
            code, detail = await stream.status()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(2**16 if size == 2**16 else 2**22 + 1) in detail
    async with open_stream(bus.target) as stream:
        assert (await stream.answer(publish=publish())).published.count == 1


@pytest.mark.parametrize(
    ("request_fields", "reason", "message"),
    [
        ({}, "INVALID", "request: is required"),
        ({"publish": oona_pb2.Publish()}, "INVALID", "publish.kind: 0 is not a kind"),
        ({"publish": oona_pb2.Publish(kind=UNKNOWN)}, "INVALID", "publish.kind: 99"),
        ({"publish": oona_pb2.Publish(kind=EVENTS)}, "INVALID", "publish.first_sequence: must be above 0"),
        ({"publish": oona_pb2.Publish(kind=EVENTS, first_sequence=1)}, "INVALID", "publish.events: at least one"),
        (
            {"publish": oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[event_pb2.Event()])},
            "INVALID",
            "publish.events[0].event_id",
        ),
        (
            {"publish": oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=[event_pb2.Event(event_id="e")])},
            "INVALID",
            "publish.events[0].run_id",
        ),
        (
            {
                "publish": oona_pb2.Publish(
                    kind=EVENTS, first_sequence=1, events=[event_pb2.Event(event_id="e", run_id="r")]
                )
            },
            "INVALID",
            "publish.events[0].payload: is missing",
        ),
        (
            {
                "publish": oona_pb2.Publish(
                    kind=COMMANDS,
                    first_sequence=1,
                    events=[new_event("r", health_report=health_pb2.HealthReport())],
                )
            },
            "WRONG_PAYLOAD",
            "publish.events[0].payload: is health_report, but kind commands carries command",
        ),
        ({"subscribe": oona_pb2.Subscribe(kind=EVENTS)}, "INVALID", "subscribe.subscription_id: must be above 0"),
        ({"subscribe": subscribe(kind=event_pb2.KIND_UNSPECIFIED)}, "INVALID", "subscribe.kind"),
        ({"subscribe": subscribe(run_ids=["a", ""])}, "INVALID", "subscribe.run_ids[1]"),
        ({"subscribe": subscribe(group="g" * 129)}, "INVALID", "subscribe.group"),
        ({"subscribe": subscribe(start=oona_pb2.StartAt(anchor=UNKNOWN))}, "INVALID", "subscribe.start.anchor: 99"),
        (
            {"subscribe": subscribe(start=oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_COMMITTED))},
            "INVALID",
            "subscribe.start.anchor: COMMITTED is for groups",
        ),
        (
            {"subscribe": subscribe(start=oona_pb2.StartAt(offset=1))},
            "INVALID",
            "subscribe.start.offset: 1 is beyond the end of the log, 0",
        ),
        (
            {"subscribe": subscribe(start=oona_pb2.StartAt(time=Timestamp(nanos=-1)))},
            "INVALID",
            "subscribe.start.time",
        ),
        ({"subscribe": subscribe(group="g", end_offset=5)}, "INVALID", "subscribe.end_offset: is for private readers"),
        (
            {"subscribe": subscribe(ack_deadline=Duration(seconds=1))},
            "INVALID",
            "subscribe.ack_deadline: is for groups",
        ),
        (
            {"subscribe": subscribe(group="g", ack_deadline=Duration(seconds=-1))},
            "INVALID",
            "subscribe.ack_deadline: must be above 0",
        ),
        ({"grant": grant(1)}, "UNKNOWN_SUBSCRIPTION", "grant.subscription_id: 1"),
        ({"grant": grant(0)}, "INVALID", "grant.messages: must be above 0"),
        ({"ack": oona_pb2.Ack(subscription_id=1)}, "INVALID", "ack: names no record"),
        (
            {"ack": oona_pb2.Ack(subscription_id=1, acked=[oona_pb2.OffsetRange(first=2, last=1)])},
            "INVALID",
            "ack.acked[0].last: 1 is below first, 2",
        ),
        ({"ack": oona_pb2.Ack(subscription_id=1, nacked=[1])}, "UNKNOWN_SUBSCRIPTION", "ack.subscription_id: 1"),
        (
            {"unsubscribe": oona_pb2.Unsubscribe(subscription_id=1)},
            "UNKNOWN_SUBSCRIPTION",
            "unsubscribe.subscription_id: 1",
        ),
    ],
)
async def test_a_request_that_cannot_be_met_is_rejected_by_name_and_the_stream_stands(
    stream, publish, request_fields, reason, message
):
    rejected = (await stream.answer(**request_fields)).rejected
    assert oona_pb2.RejectReason.Name(rejected.reason) == f"REJECT_REASON_{reason}"
    assert message in rejected.message
    assert (await stream.answer(publish=publish())).published.count == 1


async def test_a_request_without_an_id_is_rejected(stream):
    await stream.send_bytes(oona_pb2.StreamRequest(subscribe=subscribe()).SerializeToString())
    assert (await stream.next("rejected")).rejected.message == "request_id: must be above 0"


async def test_duplicates_are_confirmed_and_gaps_rejected(stream, publish):
    first = (await stream.answer(publish=publish(1, 3))).published
    again = (await stream.answer(publish=publish(1, 3))).published
    overlap = (await stream.answer(publish=publish(3, 2))).published
    gap = (await stream.answer(publish=publish(6))).rejected
    assert (first.first_offset, first.count, first.duplicates) == (0, 3, 0)
    assert (again.HasField("first_offset"), again.count, again.duplicates) == (False, 0, 3)
    assert (overlap.first_offset, overlap.count, overlap.duplicates) == (3, 1, 1)
    assert gap.reason == oona_pb2.REJECT_REASON_SEQUENCE_GAP
    assert gap.expected_sequence == 5


async def test_answers_to_publishing_keep_the_order_of_the_requests(stream, publish):
    requests = [publish(1, 2), oona_pb2.Publish(kind=EVENTS), publish(3), publish(9), publish(4)]
    ids = [await stream.send(publish=request) for request in requests]
    answers = [await stream.read() for _ in ids]
    assert [answer.request_id for answer in answers] == ids
    names = [answer.WhichOneof("response") for answer in answers]
    assert names == ["published", "rejected", "published", "rejected", "published"]


async def test_nothing_is_delivered_without_credit_and_never_more_than_was_granted(stream, publish):
    await stream.answer(publish=publish(1, 10))
    await stream.answer(subscribe=subscribe(start=EARLIEST))
    await stream.send(grant=grant(3))
    assert offsets(await stream.records(3)) == [0, 1, 2]
    # What would have come by now stands in front of this answer.
    await stream.answer(publish=publish(11))
    assert not any(response.HasField("delivery") for response in stream.unasked)
    await stream.send(grant=grant(100))
    assert offsets(await stream.records(8)) == list(range(3, 11))


async def test_credit_in_bytes_limits_what_is_delivered(stream, publish):
    await stream.answer(publish=publish(1, 4))
    await stream.answer(subscribe=subscribe(start=EARLIEST))
    await stream.send(grant=grant(4, 1))
    await stream.answer(publish=publish(5))
    assert not any(response.HasField("delivery") for response in stream.unasked)
    await stream.send(grant=grant(0, 10_000))
    records = await stream.records(4)
    assert offsets(records) == [0, 1, 2, 3]
    assert all(record.delivery_attempt == 1 and record.HasField("append_time") for record in records)


async def test_a_filter_lets_only_its_runs_through(stream, publish):
    await stream.answer(publish=publish(1, 6, runs=("a", "b", "c")))
    await stream.answer(subscribe=subscribe(start=EARLIEST, run_ids=["a", "c"]))
    await stream.send(grant=grant(100))
    assert offsets(await stream.records(4)) == [0, 2, 3, 5]
    assert (await stream.next("progress")).progress.high_watermark == 6


async def test_a_bounded_replay_closes_at_its_end(stream, publish):
    await stream.answer(publish=publish(1, 6, runs=("a", "b")))
    await stream.answer(subscribe=subscribe(start=EARLIEST, end_offset=5, run_ids=["a"]))
    await stream.send(grant=grant(3))
    assert offsets(await stream.records(3)) == [0, 2, 4]
    closed = await stream.next("closed")
    assert (closed.request_id, closed.closed.reason) == (0, oona_pb2.CLOSE_REASON_END_REACHED)
    # The number is free again.
    assert (await stream.answer(subscribe=subscribe(end_offset=0))).HasField("subscribed")
    assert (await stream.next("closed")).closed.reason == oona_pb2.CLOSE_REASON_END_REACHED


async def test_a_bounded_replay_ends_without_credit_where_nothing_matches(stream, publish):
    await stream.answer(publish=publish(1, 6))
    await stream.answer(subscribe=subscribe(start=EARLIEST, end_offset=6, run_ids=["other"]))
    assert (await stream.next("closed")).closed.reason == oona_pb2.CLOSE_REASON_END_REACHED


async def test_reading_starts_at_an_offset_a_time_or_the_end(stream, publish):
    await stream.answer(publish=publish(1, 3))
    await stream.answer(subscribe=subscribe(start=EARLIEST))
    await stream.send(grant=grant(3))
    last = (await stream.records(3))[-1]
    await stream.answer(publish=publish(4))
    later = Timestamp()
    later.FromNanoseconds(last.append_time.ToNanoseconds() + 1)
    starts = {
        2: oona_pb2.StartAt(offset=1),
        3: oona_pb2.StartAt(time=later),
        4: oona_pb2.StartAt(time=Timestamp(seconds=253_402_300_799)),
        5: oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_LATEST),
        6: None,
        7: oona_pb2.StartAt(time=Timestamp()),
    }
    found = {
        number: (await stream.answer(subscribe=subscribe(number, start=start))).subscribed.start_offset
        for number, start in starts.items()
    }
    assert found == {2: 1, 3: 3, 4: 4, 5: 4, 6: 4, 7: 0}


async def test_a_subscription_number_is_used_once_at_a_time(stream):
    await stream.answer(subscribe=subscribe())
    again = (await stream.answer(subscribe=subscribe())).rejected
    assert again.message == "subscribe.subscription_id: 1 is in use on this stream"
    closed = (await stream.answer(unsubscribe=oona_pb2.Unsubscribe(subscription_id=1))).closed
    assert closed.reason == oona_pb2.CLOSE_REASON_UNSUBSCRIBED
    assert (await stream.answer(subscribe=subscribe())).HasField("subscribed")


async def test_a_private_reader_has_nothing_to_acknowledge(stream):
    await stream.answer(subscribe=subscribe())
    ack = oona_pb2.Ack(subscription_id=1, acked=[oona_pb2.OffsetRange(first=0, last=0)])
    assert "private reader" in (await stream.answer(ack=ack)).rejected.message


async def test_a_reader_whose_records_are_purged_is_told_where_the_log_begins(bus, stream, publish):
    await stream.answer(publish=publish(1, 3))
    await stream.answer(publish=publish(4, 3))
    await stream.answer(subscribe=subscribe(1, start=EARLIEST))
    await stream.answer(subscribe=subscribe(2, start=EARLIEST, group="g"))
    await bus.broker.purge(EVENTS, 4)
    closed: dict[int, tuple[int, int]] = {}
    while len(closed) < 2:
        frame = (await stream.next("closed")).closed
        closed[frame.subscription_id] = (frame.reason, frame.earliest_offset)
    assert closed == dict.fromkeys((1, 2), (oona_pb2.CLOSE_REASON_BEHIND_FLOOR, 3))
    rejected = (await stream.answer(subscribe=subscribe(1, start=oona_pb2.StartAt(offset=2)))).rejected
    assert (rejected.reason, rejected.earliest_offset) == (oona_pb2.REJECT_REASON_BELOW_FLOOR, 3)
    assert (await stream.answer(subscribe=subscribe(2, group="g"))).subscribed.start_offset == 3


async def test_a_group_goes_on_where_it_was_unless_it_is_moved(bus, stream, publish):
    await stream.answer(publish=publish(1, 6))
    fresh = (await stream.answer(subscribe=subscribe(1, group="g"))).subscribed
    await stream.send(grant=grant(6))
    await stream.records(6)
    ack = oona_pb2.Ack(subscription_id=1, acked=[oona_pb2.OffsetRange(first=0, last=3)])
    assert (await stream.answer(ack=ack)).acked.committed_offset == 4
    await stream.answer(unsubscribe=oona_pb2.Unsubscribe(subscription_id=1))
    starts = {
        2: None,
        3: EARLIEST,
        4: oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_LATEST),
        5: oona_pb2.StartAt(offset=1),
        6: oona_pb2.StartAt(time=Timestamp()),
    }
    found = [
        (await stream.answer(subscribe=subscribe(number, group="g", start=start))).subscribed.start_offset
        for number, start in starts.items()
    ]
    late = await stream.answer(
        subscribe=subscribe(7, group="late", start=oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_LATEST))
    )
    assert fresh.start_offset == 0
    assert found == [4, 4, 4, 1, 0]
    assert late.subscribed.start_offset == 6


async def test_members_of_a_group_must_ask_for_the_same_runs(stream):
    await stream.answer(subscribe=subscribe(1, group="g", run_ids=["a"]))
    rejected = (await stream.answer(subscribe=subscribe(2, group="g"))).rejected
    assert rejected.reason == oona_pb2.REJECT_REASON_GROUP_MISMATCH
    await stream.answer(unsubscribe=oona_pb2.Unsubscribe(subscription_id=1))
    assert (await stream.answer(subscribe=subscribe(2, group="g"))).HasField("subscribed")


async def test_a_record_that_nobody_acknowledged_comes_again_after_its_deadline(stream, publish):
    await stream.answer(publish=publish())
    await stream.answer(subscribe=subscribe(group="g", ack_deadline=Duration(nanos=20_000_000)))
    await stream.send(grant=grant(3))
    attempts = [record.delivery_attempt for record in await stream.records(3)]
    assert attempts == [1, 2, 3]


async def test_an_extended_record_is_kept_longer(stream, publish):
    await stream.answer(publish=publish())
    await stream.answer(subscribe=subscribe(group="g"))
    await stream.send(grant=grant(1))
    await stream.records(1)
    extend = oona_pb2.Ack(subscription_id=1, extended=[0])
    assert (await stream.answer(ack=extend)).acked.committed_offset == 0


async def test_what_a_vanished_member_held_goes_to_the_other_in_order(bus, open_stream, stream, publish):
    async with open_stream(bus.target, "vanishes") as vanishing:
        await vanishing.answer(subscribe=subscribe(group="g"))
        await stream.answer(subscribe=subscribe(group="g"))
        await vanishing.send(grant=grant(100))
        await stream.send(grant=grant(100))
        await stream.answer(publish=publish(1, 8, runs=("a", "b")))
        assert offsets(await vanishing.records(4)) == [0, 2, 4, 6]
        mine = await stream.records(4)
    assert offsets(mine) == [1, 3, 5, 7]
    assert [(r.offset, r.delivery_attempt) for r in await stream.records(4)] == [(0, 2), (2, 2), (4, 2), (6, 2)]


async def test_a_client_that_comes_again_ends_its_old_stream(bus, open_stream, stream, publish):
    await stream.answer(publish=publish(1, 2))
    async with open_stream(bus.target) as again:
        assert again.opened.next_sequence == 3
        code, detail = await stream.status()
    assert code is grpc.StatusCode.ABORTED
    assert "'raw'" in detail


async def test_a_client_that_stops_sending_still_gets_what_it_asked_for(bus, stream, publish):
    confirmed = await stream.send(publish=publish(1, 3))
    await stream.send(subscribe=subscribe(start=oona_pb2.StartAt(offset=0), end_offset=3))
    await stream.send(grant=grant(3))
    await stream.call.done_writing()
    assert offsets(await stream.records(3)) == [0, 1, 2]
    assert (await stream.next("published")).request_id == confirmed
    assert (await stream.status())[0] is grpc.StatusCode.OK


async def test_streams_over_the_limit_are_told_to_try_later(bus, open_stream):
    await bus.stop()
    await bus.start(max_streams=1)
    async with open_stream(bus.target):
        async with open_stream(bus.target, client_id=None) as second:
            code, detail = await second.status()
        assert (code, detail) == (grpc.StatusCode.UNAVAILABLE, "1 streams are open, which is the limit")


async def test_a_full_log_rejects_publishing_and_recovers_after_a_purge(bus, open_stream, publish):
    await bus.stop()
    await bus.start(max_log_bytes=200_000)
    async with open_stream(bus.target) as stream:
        sequence = 1
        while (answer := await stream.answer(publish=publish(sequence, 100))).HasField("published"):
            sequence += 100
        assert answer.rejected.reason == oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED
        assert answer.rejected.message == "oona.sqlite: is full: the limit is 200000 bytes; purge, or raise it"
        assert answer.rejected.retry_after.seconds > 0
        async with grpc.aio.insecure_channel(bus.target) as channel:
            request = oona_pb2.PurgeTopicRequest(kind=EVENTS, before_offset=sequence // 2)
            earliest = (await oona_pb2_grpc.OonaStub(channel).PurgeTopic(request)).earliest_offset
        assert earliest > 0
        assert (await stream.answer(publish=publish(sequence, 100))).published.first_offset == sequence - 1


async def test_a_damaged_record_ends_the_readers_stream_with_data_loss(bus, stream, publish):
    await stream.answer(publish=publish())
    await bus.stop()
    await bus.start(cache_bytes=0)
    bus.execute("UPDATE frames SET batch = x'ffff'")
    bus.execute("UPDATE frames SET crc32 = crc32 + 1")
    async with grpc.aio.insecure_channel(bus.target) as channel:
        call = oona_pb2_grpc.OonaStub(channel).Stream(None)
        await call.write(oona_pb2.StreamRequest(request_id=1, open=oona_pb2.Open(client_id="reader")))
        await call.write(oona_pb2.StreamRequest(request_id=2, subscribe=subscribe(start=EARLIEST)))
        await call.write(oona_pb2.StreamRequest(request_id=3, grant=grant(1)))
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert "offset 0 is damaged" in str(caught.value.details())


@pytest.mark.parametrize("group", ["", "g"])
async def test_a_record_that_is_missing_ends_the_readers_stream_with_data_loss(
    bus, open_stream, stream, publish, group
):
    for first in (1, 2, 3):
        await stream.answer(publish=publish(first))
    await bus.stop()
    await bus.start(cache_bytes=0)
    bus.execute("DELETE FROM frames WHERE first_offset = 1")
    async with open_stream(bus.target) as reader:
        await reader.answer(subscribe=subscribe(start=EARLIEST, group=group))
        await reader.send(grant=grant(3))
        code, detail = await reader.status()
    assert (code, detail) == (grpc.StatusCode.DATA_LOSS, "log 2: the record at offset 1 is missing")


async def test_readers_survive_a_purge_under_their_feet(bus, stream, publish):
    await stream.answer(subscribe=subscribe(1, start=EARLIEST))
    await stream.answer(subscribe=subscribe(2, start=EARLIEST, group="g"))
    for first in range(1, 40):
        await stream.answer(publish=publish(first))
        await bus.broker.purge(EVENTS, first)
        if (first % 5) == 0:
            for _ in range(2):
                await stream.next("closed")
            for number, group in ((1, ""), (2, "g")):
                await stream.answer(subscribe=subscribe(number, start=EARLIEST, group=group))
                await stream.send(grant=grant(1, subscription_id=number))
    assert (await stream.answer(publish=publish(40))).published.first_offset == 39


async def test_topics_are_listed_and_described_with_their_groups(bus, stream, publish):
    await stream.answer(publish=publish(1, 3))
    await stream.answer(subscribe=subscribe(group="g"))
    async with grpc.aio.insecure_channel(bus.target) as channel:
        stub = oona_pb2_grpc.OonaStub(channel)
        listed = (await stub.ListTopics(oona_pb2.ListTopicsRequest())).topics
        described = await stub.DescribeTopic(oona_pb2.DescribeTopicRequest(kind=EVENTS))
        for call in (
            stub.DescribeTopic(oona_pb2.DescribeTopicRequest()),
            stub.PurgeTopic(oona_pb2.PurgeTopicRequest(kind=UNKNOWN)),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="is not a kind") as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert {topic.kind: topic.next_offset for topic in listed} == dict.fromkeys(range(1, 7), 0) | {EVENTS: 3}
    assert described.topic.bytes > 0
    [group] = described.groups
    assert (group.name, group.committed_offset, group.lag, group.members) == ("g", 0, 3, 1)


async def test_a_reader_that_takes_nothing_costs_little_memory(bus, open_stream, stream, make_event):
    await bus.stop()
    await bus.start(cache_bytes=2**20)
    async with open_stream(bus.target, "slow") as slow, open_stream(bus.target, "fast") as fast:
        await slow.answer(subscribe=subscribe(start=EARLIEST))
        await slow.send(grant=grant(10**6))
        for sequence in range(1, 65):
            event = make_event(mark="x" * 2**19)
            await fast.answer(publish=oona_pb2.Publish(kind=EVENTS, first_sequence=sequence, events=[event]))
        # 32 MiB are stored; what waits for the slow reader is what the transport and the outbox hold.
        [server_side] = [s for s in bus.service._streams.values() if s.client_id == "slow"]
        [(reader, _)] = server_side._subscriptions.values()
        assert reader._next < 64
        assert server_side._outbox.qsize() <= 4
        assert len(await slow.records(64)) == 64


async def test_a_publisher_that_vanishes_has_stored_what_was_taken_and_readers_see_it(
    bus, open_stream, stream, publish
):
    await stream.answer(subscribe=subscribe())
    await stream.send(grant=grant(100))
    async with open_stream(bus.target, "vanishes") as vanishing:
        for sequence in range(1, 20):
            await vanishing.send(publish=publish(sequence))
        assert (await vanishing.next("published")).published.count == 1
    async with open_stream(bus.target, "vanishes") as again:
        stored = again.opened.next_sequence - 1
    assert offsets(await stream.records(stored)) == list(range(stored))


async def test_shutting_down_ends_streams_with_unavailable(bus, stream):
    bus.service.shut_down()
    assert await stream.status() == (grpc.StatusCode.UNAVAILABLE, "the server shuts down")
    await asyncio.wait_for(bus.stop(), 5)
