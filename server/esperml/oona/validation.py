"""What requests must look like. Each check names the field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esperml.contract import PAYLOADS, InvalidFieldError, check_event
from esperml.contract.kinds import MAX_RUN_ID_LENGTH
from esperml.oona.groups import Redelivery
from esperml.oona.log import EncodedEvents
from esperml.oona.rejection import RequestRejectedError, invalid
from esperml.oona.wire import published_events
from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

    from esperml.settings import RedeliverySettings

MAX_NAME_LENGTH: Final = 128
MAX_ACK_DEADLINE_S: Final = 24 * 3600
MAX_REDELIVERY_DELAY_S: Final = 24 * 3600
MAX_ATTEMPTS: Final = 1000
# What fits the log's 64-bit columns; later times are as good as this one.
_MAX_TIME_NS: Final = 2**63 - 1
_NS: Final = 10**9
_MAX_SECONDS: Final = 253_402_300_799  # 9999-12-31, the last day that a Timestamp may name.


def check_kind(field: str, kind: event_pb2.Kind.ValueType) -> None:
    """Raise :class:`RequestRejectedError` unless the bus carries ``kind``."""
    if kind not in PAYLOADS:
        raise invalid(field, f"{kind} is not a kind that the bus carries")


def check_client_id(client_id: str) -> None:
    """Raise :class:`RequestRejectedError` unless it can name a publisher."""
    if not 1 <= len(client_id) <= MAX_NAME_LENGTH:
        raise invalid("open.client_id", f"must have 1 to {MAX_NAME_LENGTH} characters, not {len(client_id)}")


def check_publish(publish: oona_pb2.Publish) -> EncodedEvents:
    """The events as they are stored.

    Raises:
        RequestRejectedError: a field is out of range, or an event does not fit the kind.
    """
    check_kind("publish.kind", publish.kind)
    if not publish.first_sequence:
        raise invalid("publish.first_sequence", "must be above 0")
    if not publish.events:
        raise invalid("publish.events", "at least one event is required")
    run_ids: list[str] = []
    event_ids: list[str] = []
    payloads: set[str | None] = set()
    for event in publish.events:
        run_ids.append(event.run_id)
        event_ids.append(event.event_id)
        payloads.add(event.WhichOneof("payload"))
    # All at once what check_event asks of each: a call for each event would cost more than all else that is done here.
    if (
        not (all(run_ids) and all(event_ids) and payloads <= PAYLOADS[publish.kind])
        or max(map(len, run_ids)) > MAX_RUN_ID_LENGTH
    ):
        _name_the_first_wrong_event(publish)
    return EncodedEvents(run_ids, published_events(publish))


def _name_the_first_wrong_event(publish: oona_pb2.Publish) -> None:
    for index, event in enumerate(publish.events):
        try:
            check_event(publish.kind, event, "")
        except InvalidFieldError as error:
            wrong = error.field == ".payload" and event.WhichOneof("payload") is not None
            reason = oona_pb2.REJECT_REASON_WRONG_PAYLOAD if wrong else oona_pb2.REJECT_REASON_INVALID
            raise RequestRejectedError(reason, f"publish.events[{index}]{error}") from error


def check_subscribe(subscribe: oona_pb2.Subscribe) -> None:
    """Raise :class:`RequestRejectedError` unless every field is in range and goes with the others."""
    if not subscribe.subscription_id:
        raise invalid("subscribe.subscription_id", "must be above 0")
    check_kind("subscribe.kind", subscribe.kind)
    for index, run_id in enumerate(subscribe.run_ids):
        if not 1 <= len(run_id) <= MAX_NAME_LENGTH:
            raise invalid(f"subscribe.run_ids[{index}]", f"must have 1 to {MAX_NAME_LENGTH} characters")
    if len(subscribe.group) > MAX_NAME_LENGTH:
        raise invalid("subscribe.group", f"must have at most {MAX_NAME_LENGTH} characters")
    if subscribe.start.anchor not in oona_pb2.Anchor.values():
        raise invalid("subscribe.start.anchor", f"{subscribe.start.anchor} is not an anchor")
    if subscribe.group:
        if subscribe.HasField("end_offset"):
            raise invalid("subscribe.end_offset", "is for private readers, but a group is given")
    elif subscribe.start.anchor == oona_pb2.ANCHOR_COMMITTED:
        raise invalid("subscribe.start.anchor", "COMMITTED is for groups, but none is given")
    elif subscribe.HasField("ack_deadline"):
        raise invalid("subscribe.ack_deadline", "is for groups, but none is given")
    elif subscribe.HasField("redelivery"):
        raise invalid("subscribe.redelivery", "is for groups, but none is given")


def ack_deadline_s(subscribe: oona_pb2.Subscribe, default_s: float) -> float:
    """The deadline asked for, in s. Raises :class:`RequestRejectedError` where it is out of range."""
    if not subscribe.HasField("ack_deadline"):
        return default_s
    deadline_s = subscribe.ack_deadline.seconds + subscribe.ack_deadline.nanos / _NS
    if not 0 < deadline_s <= MAX_ACK_DEADLINE_S:
        raise invalid(
            "subscribe.ack_deadline", f"must be above 0 and at most {MAX_ACK_DEADLINE_S} s, not {deadline_s:g}"
        )
    return deadline_s


def redelivery(subscribe: oona_pb2.Subscribe, default: RedeliverySettings) -> Redelivery:
    """The redelivery asked for. Raises :class:`RequestRejectedError` where a field is out of range."""
    asked = subscribe.redelivery
    if asked.max_attempts > MAX_ATTEMPTS:
        raise invalid("subscribe.redelivery.max_attempts", f"must be at most {MAX_ATTEMPTS}, not {asked.max_attempts}")
    min_delay_s, max_delay_s = default.min_delay_s, default.max_delay_s
    if asked.HasField("min_delay"):
        min_delay_s = _delay_s("min_delay", asked.min_delay)
    if asked.HasField("max_delay"):
        max_delay_s = _delay_s("max_delay", asked.max_delay)
        if asked.HasField("min_delay") and min_delay_s > max_delay_s:
            raise invalid("subscribe.redelivery.max_delay", f"{max_delay_s:g} s is below min_delay, {min_delay_s:g} s")
    return Redelivery(asked.max_attempts or default.max_attempts, min_delay_s, max_delay_s)


def _delay_s(name: str, delay: Duration) -> float:
    delay_s = delay.seconds + delay.nanos / _NS
    if not 0 <= delay_s <= MAX_REDELIVERY_DELAY_S:
        raise invalid(f"subscribe.redelivery.{name}", f"must be 0 to {MAX_REDELIVERY_DELAY_S} s, not {delay_s:g}")
    return delay_s


def check_group(field: str, group: str) -> None:
    """Raise :class:`RequestRejectedError` unless it can name a group."""
    if not 1 <= len(group) <= MAX_NAME_LENGTH:
        raise invalid(field, f"must have 1 to {MAX_NAME_LENGTH} characters, not {len(group)}")


def time_ns(field: str, time: Timestamp) -> int:
    """A time in ns since 1970. Raises :class:`RequestRejectedError` where it is no time that a Timestamp may name."""
    if not (0 <= time.nanos < _NS and -_MAX_SECONDS <= time.seconds <= _MAX_SECONDS):
        raise invalid(field, "is not a time between the years 1 and 9999")
    return max(0, min(time.seconds * _NS + time.nanos, _MAX_TIME_NS))


def check_ack(ack: oona_pb2.Ack) -> None:
    """Raise :class:`RequestRejectedError` unless it says something and its ranges are ranges."""
    if not (ack.acked or ack.nacked or ack.extended):
        raise invalid("ack", "names no record")
    for index, offsets in enumerate(ack.acked):
        if offsets.first > offsets.last:
            raise invalid(f"ack.acked[{index}].last", f"{offsets.last} is below first, {offsets.first}")


def check_grant(grant: oona_pb2.Grant) -> None:
    """Raise :class:`RequestRejectedError` unless it grants something."""
    if not grant.messages and not grant.bytes:
        raise invalid("grant.messages", "must be above 0 where no bytes are granted")
