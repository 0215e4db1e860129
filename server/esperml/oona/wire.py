"""The contract's messages with their inner messages left as bytes: cut apart and put together without decoding them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message


def _opaque(message: type[Message], field: str) -> Any:
    """A message type that knows one repeated field of ``message`` alone, and that as bytes.

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


def published_events(publish: oona_pb2.Publish) -> list[bytes]:
    """Each event of a request, serialized."""
    return list(_PUBLISH.FromString(publish.SerializeToString()).events)


def join_batch(events: Sequence[bytes]) -> bytes:
    """A serialized ``EventBatch`` of serialized events."""
    return cast("bytes", _EVENT_BATCH(events=events).SerializeToString())


def split_batch(batch: bytes) -> list[bytes]:
    """The serialized events of a serialized ``EventBatch``. Raises ``DecodeError`` where it is none."""
    return list(_EVENT_BATCH.FromString(batch).events)


def split_delivery(delivery: bytes) -> list[bytes]:
    """The serialized records of a serialized ``Delivery``. Raises ``DecodeError`` where it is none."""
    return list(_DELIVERY.FromString(delivery).records)
