"""The contract's messages with their inner messages left as bytes: cut apart and put together without decoding them."""

from __future__ import annotations

from itertools import accumulate, chain, pairwise, repeat
from typing import TYPE_CHECKING, Any, Final, cast

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message


def _opaque(message: type[Message], field: str) -> Any:
    """A message type that knows one field of ``message`` alone, and that as repeated bytes.

    The two are the same on the wire: an inner message is its bytes with their length before them.
    """
    number = message.DESCRIPTOR.fields_by_name[field].number
    name = message.DESCRIPTOR.name
    file = descriptor_pb2.FileDescriptorProto(
        name=f"esperml/oona/wire/{name}.proto", package="esperml.oona.wire", syntax="proto3"
    )
    file.message_type.add(name=name).field.add(
        name=field,
        number=number,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
        label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"esperml.oona.wire.{name}"))


_PUBLISH: Final = _opaque(oona_pb2.Publish, "events")
_EVENT_BATCH: Final = _opaque(event_pb2.EventBatch, "events")
_DELIVERY: Final = _opaque(oona_pb2.Delivery, "records")
# A field that is there once at most is, on the wire, one that may repeat.
_RECORD: Final = _opaque(event_pb2.Record, "event")
_RESPONSE_TAG: Final = bytes([oona_pb2.StreamResponse.DESCRIPTOR.fields_by_name["delivery"].number << 3 | 2])
_RECORD_TAG: Final = bytes([oona_pb2.Delivery.DESCRIPTOR.fields_by_name["records"].number << 3 | 2])
_FIELDS: Final = event_pb2.Record.DESCRIPTOR.fields_by_name
_OFFSET_TAG: Final = bytes([_FIELDS["offset"].number << 3])
_TIME_TAG: Final = bytes([_FIELDS["append_time"].number << 3 | 2])
_EVENT_TAG: Final = bytes([_FIELDS["event"].number << 3 | 2])
_ATTEMPT_TAG: Final = bytes([_FIELDS["delivery_attempt"].number << 3])
_SUBSCRIPTION_TAG: Final = bytes([oona_pb2.Delivery.DESCRIPTOR.fields_by_name["subscription_id"].number << 3])
# The last byte of a number, and one that more bytes follow.
_LAST: Final = [bytes([low]) for low in range(128)]
_MORE: Final = [bytes([low | 128]) for low in range(128)]


def published_events(publish: oona_pb2.Publish) -> list[bytes]:
    """Each event of a request, serialized."""
    return list(_PUBLISH.FromString(publish.SerializeToString()).events)


def join_batch(events: Sequence[bytes]) -> bytes:
    """A serialized ``EventBatch`` of serialized events."""
    return cast("bytes", _EVENT_BATCH(events=events).SerializeToString())


def split_batch(batch: bytes) -> list[bytes]:
    """The serialized events of a serialized ``EventBatch``. Raises ``DecodeError`` where it is none."""
    return list(_EVENT_BATCH.FromString(batch).events)


def varint(number: int) -> bytes:
    """A whole number of at most 64 bits, not negative, as it goes over the wire."""
    encoded = b""
    while number > 127:
        encoded += _MORE[number & 127]
        number >>= 7
    return encoded + _LAST[number]


class EncodedRecords:
    """Consecutive records as they stand in a serialized ``Delivery``.

    Args:
        first_offset: offset of the first.
        append_time_ns: when they were stored, in ns since 1970.
        events: the serialized event of each, at least one.
        attempt: how often they will have been delivered.

    Attributes:
        data: the records, each with the tag and the length that it has as a part of a delivery.
        sizes: bytes of the records before each, without tag and length, and, as the last, of all.
    """

    __slots__ = ("_starts", "data", "sizes")

    def __init__(self, first_offset: int, append_time_ns: int, events: Sequence[bytes], attempt: int = 1) -> None:
        timestamp = Timestamp()
        timestamp.FromNanoseconds(append_time_ns)
        time = timestamp.SerializeToString()
        before_event = _TIME_TAG + varint(len(time)) + time + _EVENT_TAG
        after_event = _ATTEMPT_TAG + varint(attempt)
        event_sizes = list(map(len, events))
        # All that differs from record to record beside offset and event follows from the size of the event.
        middles = {size: before_event + varint(size) for size in set(event_sizes)}
        parts: list[bytes] = []
        record_sizes = [0]
        start = 0
        for numbers in _offset_fields(first_offset, len(events)):
            stop = start + len(numbers)
            sizes = event_sizes[start:stop]
            fixed = len(numbers[0]) + len(after_event)
            record_size = {size: fixed + len(middle) + size for size, middle in middles.items()}
            heads = {size: _RECORD_TAG + varint(whole) for size, whole in record_size.items()}
            record_sizes += map(record_size.__getitem__, sizes)
            columns = (
                map(heads.__getitem__, sizes),
                numbers,
                map(middles.__getitem__, sizes),
                events[start:stop],
                repeat(after_event, len(sizes)),
            )
            parts += chain.from_iterable(zip(*columns, strict=True))
            start = stop
        self.data = b"".join(parts)
        self.sizes = list(accumulate(record_sizes))
        self._starts: list[int] | None = None

    def slice(self, start: int, stop: int) -> bytes:
        """The records from index ``start`` to before ``stop``, as a part of a serialized ``Delivery``."""
        if start == 0 and stop == len(self.sizes) - 1:
            return self.data
        if self._starts is None:
            sizes = (after - before for before, after in pairwise(self.sizes))
            self._starts = list(accumulate((len(_RECORD_TAG) + len(varint(size)) + size for size in sizes), initial=0))
        return self.data[self._starts[start] : self._starts[stop]]

    def events(self, start: int, stop: int) -> list[bytes]:
        """The serialized events of the records from index ``start`` to before ``stop``."""
        records = _DELIVERY.FromString(self.slice(start, stop)).records
        return [_RECORD.FromString(record).event[0] for record in records]


def _offset_fields(first: int, count: int) -> Iterator[list[bytes]]:
    """The field ``offset`` of consecutive records, in pieces whose fields are all of one length."""
    if first == 0:
        yield [b""]  # A number that is 0 is left out.
        first, count = 1, count - 1
    while count:
        high, low = first >> 7, first & 127
        piece = min(count, 128 - low)
        if high:
            end = varint(high)
            yield [_OFFSET_TAG + more + end for more in _MORE[low : low + piece]]
        else:
            yield [_OFFSET_TAG + last for last in _LAST[low : low + piece]]
        first, count = first + piece, count - piece


def encode_delivery(subscription_id: int, parts: Sequence[bytes]) -> bytes:
    """A serialized ``StreamResponse`` with a delivery of records that :class:`EncodedRecords` encoded."""
    start = _SUBSCRIPTION_TAG + varint(subscription_id)
    size = len(start) + sum(map(len, parts))
    return b"".join((_RESPONSE_TAG, varint(size), start, *parts))
