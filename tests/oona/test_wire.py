"""What is put together from bytes is what protobuf would have made of the messages."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from esperml.oona.wire import (
    EncodedRecords,
    encode_delivery,
    join_batch,
    published_events,
    split_batch,
    varint,
)
from esperml.v1 import event_pb2, oona_pb2, run_pb2

uint64 = st.integers(0, 2**64 - 1)
events = st.lists(
    st.builds(
        event_pb2.Event,
        event_id=st.text(max_size=3),
        run_id=st.sampled_from(["", "a", "b" * 127, "c" * 128]),
        run_ended=st.none() | st.builds(run_pb2.RunEnded, error=st.sampled_from(["", "x", "y" * 20_000])),
    ),
    min_size=1,
    max_size=5,
)
# Where the number of bytes of an offset changes, and any other.
offsets = st.sampled_from([0, 125, 127, 128, 2**14 - 2, 2**21 - 1, 2**63 - 8]) | st.integers(0, 2**63 - 8)
times = st.integers(0, 2**63 - 1)
attempts = st.sampled_from([1, 2, 127, 128, 300]) | st.integers(1, 2**32 - 1)


def expected_records(first, time_ns, events, attempt) -> list[event_pb2.Record]:
    records = [
        event_pb2.Record(offset=offset, event=event, delivery_attempt=attempt)
        for offset, event in enumerate(events, first)
    ]
    for record in records:
        record.append_time.FromNanoseconds(time_ns)
    return records


@given(uint64)
def test_a_number_is_encoded_as_protobuf_does(number):
    tag = oona_pb2.Progress(subscription_id=1).SerializeToString()[:1]
    assert oona_pb2.Progress.FromString(tag + varint(number)).subscription_id == number
    assert number == 0 or oona_pb2.Progress(subscription_id=number).SerializeToString() == tag + varint(number)


@given(first=offsets, time_ns=times, events=events, attempt=attempts, subscription_id=st.integers(1, 2**64 - 1))
def test_an_encoded_delivery_is_byte_for_byte_the_serialized_message(first, time_ns, events, attempt, subscription_id):
    encoded = EncodedRecords(first, time_ns, [event.SerializeToString() for event in events], attempt)
    records = expected_records(first, time_ns, events, attempt)
    delivery = oona_pb2.Delivery(subscription_id=subscription_id, records=records)
    parts = [encoded.slice(index, index + 1) for index in range(len(events))]
    data = encode_delivery(subscription_id, parts)
    assert data == oona_pb2.StreamResponse(delivery=delivery).SerializeToString()
    assert oona_pb2.StreamResponse.FromString(data).delivery == delivery


@given(data=st.data(), first=offsets, time_ns=times, events=events)
def test_parts_of_a_frame_have_the_sizes_and_events_of_its_records(data, first, time_ns, events):
    serialized = [event.SerializeToString() for event in events]
    encoded = EncodedRecords(first, time_ns, serialized)
    records = expected_records(first, time_ns, events, 1)
    assert [after - before for before, after in zip(encoded.sizes, encoded.sizes[1:], strict=False)] == [
        record.ByteSize() for record in records
    ]
    start = data.draw(st.integers(0, len(events)))
    stop = data.draw(st.integers(start, len(events)))
    assert list(oona_pb2.Delivery.FromString(encoded.slice(start, stop)).records) == records[start:stop]
    assert encoded.events(start, stop) == serialized[start:stop]


@given(events)
def test_a_batch_is_the_serialized_message_and_comes_apart_again(events):
    serialized = [event.SerializeToString() for event in events]
    batch = join_batch(serialized)
    assert batch == event_pb2.EventBatch(events=events).SerializeToString()
    assert split_batch(batch) == serialized


@given(events)
def test_the_events_of_a_request_are_those_that_were_put_in(events):
    request = oona_pb2.Publish(kind=event_pb2.KIND_EVENTS, first_sequence=7, events=events)
    assert published_events(request) == [event.SerializeToString() for event in events]


def test_fields_of_a_later_contract_pass_through():
    unknown = event_pb2.Event(event_id="e").SerializeToString() + b"\xf8\x7f\x01"
    request = oona_pb2.Publish(events=[event_pb2.Event.FromString(unknown)])
    assert published_events(request) == [unknown]


def test_what_is_no_batch_is_refused():
    with pytest.raises(DecodeError):
        split_batch(b"\xff\xff")
