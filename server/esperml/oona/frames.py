"""Stored frames, in the form in which they are delivered, and the few of them that are worth keeping so."""

from __future__ import annotations

from collections import OrderedDict
from itertools import groupby
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from esperml.oona.log import EncodedEvents, LogDamagedError
from esperml.oona.wire import EncodedRecords, split_batch
from esperml.v1 import event_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esperml.oona.log import StoredFrame

# What a record costs in memory beside its event, and a frame beside its records, about.
_RECORD_OVERHEAD_BYTES = 64
_FRAME_OVERHEAD_BYTES = 450


class Frame:
    """A stored frame.

    Args:
        first_offset: offset of its first event.
        append_time_ns: when it was stored, in ns since 1970.
        events: its events, at least one.

    Attributes:
        first_offset: offset of its first event.
        append_time_ns: when it was stored, in ns since 1970.
        end: offset after its last event.
        spans: consecutive events of one run, as (first offset, last offset, run), in order.
        size: about its bytes in memory.
    """

    __slots__ = ("_events", "_records", "append_time_ns", "end", "first_offset", "size", "spans")

    def __init__(self, first_offset: int, append_time_ns: int, events: EncodedEvents) -> None:
        self.first_offset = first_offset
        self.append_time_ns = append_time_ns
        self.end = first_offset + len(events)
        self.spans = _spans(first_offset, events.run_ids)
        self.size = events.size + _RECORD_OVERHEAD_BYTES * len(events) + _FRAME_OVERHEAD_BYTES
        self._events: Sequence[bytes] | None = events.events
        self._records: EncodedRecords | None = None

    def records(self) -> EncodedRecords:
        """Its records as they are delivered for the first time."""
        if self._records is None:
            self._records = EncodedRecords(self.first_offset, self.append_time_ns, self.events(self.first_offset))
            self._events = None
        return self._records

    def records_again(self, first: int, last: int, attempt: int) -> EncodedRecords:
        """The records from offset ``first`` to ``last``, both inside, as they are delivered another time."""
        return EncodedRecords(first, self.append_time_ns, self.events(first, last), attempt)

    def events(self, first: int, last: int | None = None) -> Sequence[bytes]:
        """The serialized events from offset ``first`` to ``last``, both inside; without ``last``, to the end."""
        start = first - self.first_offset
        stop = (self.end if last is None else last + 1) - self.first_offset
        if self._events is not None:
            return self._events[start:stop]
        return self.records().events(start, stop)


def _spans(first_offset: int, run_ids: Sequence[str]) -> list[tuple[int, int, str]]:
    if run_ids.count(run_ids[0]) == len(run_ids):
        return [(first_offset, first_offset + len(run_ids) - 1, run_ids[0])]
    spans = []
    for run_id, group in groupby(run_ids):
        after = first_offset + sum(1 for _ in group)
        spans.append((first_offset, after - 1, run_id))
        first_offset = after
    return spans


def decode(kind: int, stored: StoredFrame) -> Frame:
    """Decode a frame as the log holds it. Raises :class:`LogDamagedError` where it is not what was written."""
    try:
        run_ids = [event.run_id for event in event_pb2.EventBatch.FromString(stored.batch).events]
        events = split_batch(stored.batch)
    except DecodeError as error:
        raise LogDamagedError(f"log {kind}: the frame at offset {stored.first_offset} cannot be decoded") from error
    if len(events) != stored.count:
        raise LogDamagedError(
            f"log {kind}: the frame at offset {stored.first_offset} holds {len(events)} events, not {stored.count}"
        )
    return Frame(stored.first_offset, stored.append_time_ns, EncodedEvents(run_ids, events))


class FrameCache:
    """The frames of one log that were used last, up to ``max_bytes``, by their first offset."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._frames: OrderedDict[int, Frame] = OrderedDict()

    def get(self, first_offset: int) -> Frame | None:
        """The frame that starts at an offset, if it is here."""
        frame = self._frames.get(first_offset)
        if frame is not None:
            self._frames.move_to_end(first_offset)
        return frame

    def put(self, frame: Frame) -> None:
        """Keep a frame, at the cost of those not used for longest."""
        if (old := self._frames.pop(frame.first_offset, None)) is not None:
            self._bytes -= old.size
        self._frames[frame.first_offset] = frame
        self._bytes += frame.size
        while self._bytes > self._max_bytes and len(self._frames) > 1:
            _, dropped = self._frames.popitem(last=False)
            self._bytes -= dropped.size

    def drop_below(self, offset: int) -> None:
        """Forget the frames that end at or below an offset."""
        for first in [first for first, frame in self._frames.items() if frame.end <= offset]:
            self._bytes -= self._frames.pop(first).size
