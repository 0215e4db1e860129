"""Making events."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from google.protobuf.timestamp_pb2 import Timestamp

from esperml.v1 import event_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

_PAYLOADS: Final = frozenset(field.name for field in event_pb2.Event.DESCRIPTOR.oneofs_by_name["payload"].fields)


def new_event(run_id: str, *, session_id: str = "", traceparent: str = "", **payload: Message) -> event_pb2.Event:
    """Make an event with a fresh id, created now.

    Args:
        run_id: the run that the event belongs to.
        session_id: the session of the run that makes it, empty where there is none.
        traceparent: W3C trace context of what caused it, empty where there is none.
        **payload: exactly one payload under the name of its field, for example ``health_report=report``. It is copied.

    Raises:
        TypeError: there is not exactly one payload, the event has no such field, or its type is not the field's.
    """
    if len(payload) != 1 or not payload.keys() <= _PAYLOADS:
        raise TypeError(f"exactly one payload of {', '.join(sorted(_PAYLOADS))} is needed, not {sorted(payload)}")
    event = event_pb2.Event(
        event_id=uuid.uuid4().hex, run_id=run_id, session_id=session_id, traceparent=traceparent, created_at=now()
    )
    [(field, message)] = payload.items()
    getattr(event, field).CopyFrom(message)
    # A payload without any field set would otherwise look absent.
    getattr(event, field).SetInParent()
    return event


def now() -> Timestamp:
    """The present time by this machine's clock."""
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp
