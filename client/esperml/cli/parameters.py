"""What people write on the command line for kinds, places in a log, and spans of time."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from esperml.v1 import event_pb2, oona_pb2

MAX_OFFSET: Final = 2**64 - 1

_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class KindType(click.ParamType["event_pb2.Kind.ValueType"]):
    """A kind by its short name."""

    name = "kind"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> event_pb2.Kind.ValueType:
        """The kind of that name, or a usage error that lists the names there are."""
        from esperml.contract import parse_kind

        try:
            return parse_kind(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class SpanType(click.ParamType[float]):
    """A span of time such as ``500ms``, ``90s``, ``10m``, ``2h`` or ``1d``, in s."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The span in s, or a usage error that says how it is written."""
        if isinstance(value, float):  # A default.
            return value
        span_s = _span_s(str(value))
        if span_s is None:
            self.fail(f"{value!r} is not a time such as 500ms, 90s, 10m, 2h or 1d", param, ctx)
        return span_s


class StartType(click.ParamType["oona_pb2.StartAt"]):
    """Where to start reading: an anchor, an offset, or a time."""

    name = "start"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> oona_pb2.StartAt:
        """The place, or a usage error that says how it is written."""
        from esperml.v1 import oona_pb2

        text = str(value)
        match text:
            case "earliest":
                return oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
            case "latest":
                return oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_LATEST)
            case _ if text.isdecimal() and int(text) <= MAX_OFFSET:
                return oona_pb2.StartAt(offset=int(text))
        time = _time(text)
        if time is None:
            self.fail(
                f"{text!r} is neither earliest, latest, an offset, a time such as 2026-05-01T12:00:00Z, "
                "nor 10m for that long ago",
                param,
                ctx,
            )
        start = oona_pb2.StartAt()
        start.time.FromDatetime(time)
        return start


KIND: Final = KindType()
SPAN: Final = SpanType()
START: Final = StartType()
START_HELP: Final = "earliest, latest, an offset, a time (2026-05-01T12:00:00Z), or 10m for that long ago."


def _span_s(text: str) -> float | None:
    match = _SPAN.fullmatch(text)
    return None if match is None else float(match[1]) * _UNITS_S[match[2]]


def _time(text: str) -> datetime | None:
    """The moment that a text names, in UTC. A time without a zone is taken for local."""
    try:
        if (ago_s := _span_s(text)) is not None:
            return datetime.now(UTC) - timedelta(seconds=ago_s)
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
