"""Which payloads each kind of event carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from esperml.contract.errors import InvalidFieldError
from esperml.v1 import event_pb2

KindValue: TypeAlias = event_pb2.Kind.ValueType
"""The type of a kind. Generated enums are plain integers, and this is what the type checker calls them."""

PAYLOADS: Final[Mapping[KindValue, frozenset[str]]] = {
    event_pb2.KIND_TELEMETRY: frozenset({"health_report"}),
    event_pb2.KIND_EVENTS: frozenset({"run_started", "structure_changed", "epoch_completed", "run_ended"}),
    event_pb2.KIND_DECISIONS: frozenset({"decision"}),
    event_pb2.KIND_COMMANDS: frozenset({"command", "notice"}),
    event_pb2.KIND_OUTCOMES: frozenset({"applied", "effect"}),
    event_pb2.KIND_EXPERIENCE: frozenset({"experience"}),
}
"""Names of the fields of ``Event.payload`` that each kind carries."""

KINDS: Final = tuple(PAYLOADS)
"""Every kind, in the order of the contract."""

MAX_RUN_ID_LENGTH: Final = 128


def kind_name(kind: KindValue) -> str:
    """The short name that people use: ``telemetry`` for ``KIND_TELEMETRY``."""
    return event_pb2.Kind.Name(kind).removeprefix("KIND_").lower()


def parse_kind(name: str) -> KindValue:
    """The kind of a short name. Raises ``ValueError``, naming the ones there are, for any other."""
    for kind in KINDS:
        if kind_name(kind) == name:
            return kind
    raise ValueError(f"unknown kind {name!r}; kinds are {', '.join(map(kind_name, KINDS))}")


def check_event(kind: KindValue, event: event_pb2.Event, field: str = "event") -> None:
    """Raise :class:`InvalidFieldError` unless ``kind`` may carry ``event``.

    ``field`` is the path by which the error names the event. A payload of another kind is reported under
    ``<field>.payload``.
    """
    if kind not in PAYLOADS:
        raise InvalidFieldError("kind", f"{kind} is not a kind that the bus carries")
    if not event.event_id:
        raise InvalidFieldError(f"{field}.event_id", "is required")
    if not event.run_id or len(event.run_id) > MAX_RUN_ID_LENGTH:
        raise InvalidFieldError(f"{field}.run_id", f"must have 1 to {MAX_RUN_ID_LENGTH} characters")
    payload = event.WhichOneof("payload")
    if payload not in PAYLOADS[kind]:
        carried = ", ".join(sorted(PAYLOADS[kind]))
        raise InvalidFieldError(
            f"{field}.payload", f"is {payload or 'missing'}, but kind {kind_name(kind)} carries {carried}"
        )
