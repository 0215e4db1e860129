"""Stored frames, decoded, and the few of them that are worth keeping so."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.oona.log import LogDamagedError
from esperml.v1 import event_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esperml.oona.log import StoredFrame


class Frame:
    """A stored frame, decoded.

    Args:
        first_offset: offset of its first event.
        append_time_ns: when it was stored, in ns since 1970.
        events: its events, which nobody changes any more.
        size: about its bytes.
    """

    __slots__ = ("append_time", "events", "first_offset", "size")

    def __init__(self, first_offset: int, append_time_ns: int, events: Sequence[event_pb2.Event], size: int) -> None:
        self.first_offset = first_offset
        self.append_time = Timestamp()
        self.append_time.FromNanoseconds(append_time_ns)
        self.events = events
        self.size = size

    @property
    def end(self) -> int:
        """Offset after its last event."""
        return self.first_offset + len(self.events)


def decode(kind: int, stored: StoredFrame) -> Frame:
    """Decode a frame as the log holds it. Raises :class:`LogDamagedError` where it is not what was written."""
    try:
        events = event_pb2.EventBatch.FromString(stored.batch).events
    except DecodeError as error:
        raise LogDamagedError(f"log {kind}: the frame at offset {stored.first_offset} cannot be decoded") from error
    if len(events) != stored.count:
        raise LogDamagedError(
            f"log {kind}: the frame at offset {stored.first_offset} holds {len(events)} events, not {stored.count}"
        )
    return Frame(stored.first_offset, stored.append_time_ns, events, len(stored.batch))


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
