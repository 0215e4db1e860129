"""What a session speaks through, and the link that stays in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from esperml.v1 import event_pb2

Kind: TypeAlias = "event_pb2.Kind.ValueType"
Handler: TypeAlias = "Callable[[Kind, event_pb2.Event], list[tuple[Kind, event_pb2.Event]]]"
Sink: TypeAlias = "Callable[[Kind, event_pb2.Event], None]"


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """What a link did so far.

    Attributes:
        reports_dropped: reports that were dropped, oldest first, because they could not be sent.
        others_dropped: events of other kinds that were dropped for the same reason.
        spooled: events on the disk that are to be sent yet.
        sender_seconds: processor time that the link spent on threads of its own, in s.
        connected: whether the other side can be reached now; of a closed link, whether it sent everything.
    """

    reports_dropped: int = 0
    others_dropped: int = 0
    sender_seconds: float = 0.0
    connected: bool = True
    spooled: int = 0


@runtime_checkable
class Link(Protocol):
    """Transport as the training thread sees it. Nothing here may block, save ``close``."""

    def publish(self, kind: Kind, event: event_pb2.Event) -> None:
        """Take an event to be sent. Events of one kind keep their order."""
        ...

    def received(self) -> list[event_pb2.Event]:
        """What was sent to the run since the last call, of the kind commands, oldest first."""
        ...

    def statistics(self) -> LinkStatistics:
        """What the link did so far."""
        ...

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most ``timeout_s`` seconds, and end."""
        ...


class LocalLink:
    """A link to a controller in the same process: no threads, no waiting, the same result every time.

    Args:
        handle: takes what the session publishes and gives back what the controller publishes in turn.
        sink: sees every event of both sides, in order; a recorder, for example.
    """

    def __init__(self, handle: Handler, sink: Sink | None = None) -> None:
        self._handle = handle
        self._sink = sink
        self._received: deque[event_pb2.Event] = deque()

    def publish(self, kind: Kind, event: event_pb2.Event) -> None:
        """Hand the event to the sink and the controller; keep the commands and notices that come back."""
        if self._sink is not None:
            self._sink(kind, event)
        for answer_kind, answer in self._handle(kind, event):
            if self._sink is not None:
                self._sink(answer_kind, answer)
            if answer_kind == event_pb2.KIND_COMMANDS and answer.run_id == event.run_id:
                self._received.append(answer)

    def received(self) -> list[event_pb2.Event]:
        """The commands and notices that came since the last call, oldest first."""
        drained = list(self._received)
        self._received.clear()
        return drained

    def statistics(self) -> LinkStatistics:
        """Nothing is dropped here, and no thread runs."""
        return LinkStatistics()

    def close(self, timeout_s: float) -> None:
        """There is nothing left to send."""
