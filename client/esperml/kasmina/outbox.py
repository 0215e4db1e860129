"""What a session has published and its link has not passed on: bounded, the oldest goes first, and is counted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from esperml.kasmina.link import Kind
from esperml.v1 import event_pb2

MAX_REPORTS: Final = 256
"""Reports that wait to be sent; the oldest goes when another comes."""

MAX_OTHERS: Final = 4096
"""Events and outcomes that wait in memory; likewise."""

FRAME_EVENTS: Final = 64
"""Most events that are passed on together."""


class Entry(NamedTuple):
    """A published event.

    Attributes:
        published_ns: when, in ns since 1970; no two events of a session have the same, and the order is theirs.
        kind: its kind.
        event: the event.
    """

    published_ns: int
    kind: Kind
    event: event_pb2.Event


class Outbox:
    """Two bounded queues in the order of publication; any thread may use it, and none waits in it.

    Args:
        max_reports: most reports (kind telemetry) that wait.
        max_others: most events of other kinds that wait.

    Attributes:
        reports_dropped: reports that were dropped because there was no room.
        others_dropped: events of other kinds that were.
    """

    def __init__(self, max_reports: int = MAX_REPORTS, max_others: int = MAX_OTHERS) -> None:
        self.reports_dropped = 0
        self.others_dropped = 0
        self._max_reports = max_reports
        self._max_others = max_others
        self._lock = threading.Lock()
        self._reports: deque[Entry] = deque()
        self._others: deque[Entry] = deque()
        self._last_ns = 0

    def __len__(self) -> int:
        return len(self._reports) + len(self._others)

    @property
    def others(self) -> int:
        """Events that wait and are no reports."""
        return len(self._others)

    def put(self, kind: Kind, event: event_pb2.Event) -> None:
        """Add an event; where there is no room, the oldest of its sort goes."""
        with self._lock:
            self._last_ns = max(self._last_ns + 1, time.time_ns())
            (self._reports if kind == event_pb2.KIND_TELEMETRY else self._others).append(
                Entry(self._last_ns, kind, event)
            )
            self._bound()

    def put_back(self, entries: Sequence[Entry]) -> None:
        """Put back what was taken, of one sort, in front of what has come since."""
        if entries:
            with self._lock:
                queue = self._reports if entries[0].kind == event_pb2.KIND_TELEMETRY else self._others
                queue.extendleft(reversed(entries))
                self._bound()

    def drop(self, kind: Kind, events: int) -> None:
        """Count ``events`` of a kind that were taken and cannot be passed on."""
        if kind == event_pb2.KIND_TELEMETRY:
            self.reports_dropped += events
        else:
            self.others_dropped += events

    def oldest_ns(self) -> int | None:
        """When the oldest event here was published; ``None`` where there is none."""
        with self._lock:
            return min((queue[0].published_ns for queue in (self._reports, self._others) if queue), default=None)

    def oldest_other_ns(self) -> int | None:
        """The same of events that are no reports."""
        with self._lock:
            return self._others[0].published_ns if self._others else None

    def take(self) -> list[Entry]:
        """Take the oldest events of one kind, as many as follow each other and are passed on together."""
        with self._lock:
            queues = [queue for queue in (self._reports, self._others) if queue]
            if not queues:
                return []
            queue, *newer = sorted(queues, key=lambda entries: entries[0].published_ns)
            kind = queue[0].kind
            until_ns = newer[0][0].published_ns if newer else self._last_ns + 1
            entries: list[Entry] = []
            while queue and queue[0].kind == kind and queue[0].published_ns < until_ns and len(entries) < FRAME_EVENTS:
                entries.append(queue.popleft())
            return entries

    def take_others(self) -> list[Entry]:
        """Take all that are no reports."""
        with self._lock:
            entries = list(self._others)
            self._others.clear()
            return entries

    def _bound(self) -> None:
        while len(self._reports) > self._max_reports:
            self._reports.popleft()
            self.reports_dropped += 1
        while len(self._others) > self._max_others:
            self._others.popleft()
            self.others_dropped += 1
