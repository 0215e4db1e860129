"""What the engine's messages say: frames of events, cut into messages, and the states that stand beside them."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from esperml.oona.log import LogDamagedError, StoredFrame
from esperml.oona.wire import join_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esperml.oona.jetstream.link import Stored
    from esperml.oona.log import EncodedEvents

FRAME_HEADER: Final = "Oona-Frame"
"""Header of a message with events: the fields of :class:`FramePart`, in decimal, separated by blanks."""

PUBLISHER_HEADER: Final = "Oona-Publisher"
"""Header of a message with events, for people: the publisher's token and the sequence of the frame's first event."""

# Stretches of one run that a frame may have before it goes under no run's subject. Each is a message, and a message
# costs the cluster far more than an event.
_MAX_STRETCHES: Final = 16


class Part(NamedTuple):
    """What one message carries of a frame.

    Attributes:
        run_id: the run of all its events; None where there are many.
        data: a piece of the frame's serialized ``EventBatch``.
    """

    run_id: str | None
    data: bytes


@dataclass(frozen=True, slots=True)
class FramePart:
    """Where a message stands in its log.

    Attributes:
        first_offset: offset of the frame's first event.
        count: events in the frame.
        append_time_ns: when the frame was stored, in ns since 1970.
        bytes_before: bytes of all frames that were ever stored before this one.
        crc32: checksum of the message's body.
        part: number of the message in its frame, from 0.
        parts: messages of the frame.
    """

    first_offset: int
    count: int
    append_time_ns: int
    bytes_before: int
    crc32: int
    part: int
    parts: int

    @property
    def end(self) -> int:
        """Offset after the frame's last event."""
        return self.first_offset + self.count

    def header(self) -> str:
        """The value of the header."""
        return (
            f"{self.first_offset} {self.count} {self.append_time_ns} {self.bytes_before} {self.crc32} "
            f"{self.part} {self.parts}"
        )

    @classmethod
    def of(cls, message: Stored) -> FramePart:
        """The place of a stored message. Raises :class:`LogDamagedError` where it has none."""
        try:
            return cls(*map(int, message.headers[FRAME_HEADER].split(" ")))
        except (KeyError, TypeError, ValueError) as error:
            raise LogDamagedError(
                f"message {message.sequence} on {message.subject}: was not written by a bus"
            ) from error


_TOPIC_FIELDS: Final = ("next", "next_bytes", "append_time_ns", "earliest", "earliest_bytes")


@dataclass(frozen=True, slots=True)
class TopicState:
    """What is known of a log beside its events; every batch ends with it.

    Attributes:
        next: offset of the next event.
        next_bytes: bytes of all frames ever stored.
        append_time_ns: when the last frame was stored, in ns since 1970.
        earliest: the floor.
        earliest_bytes: bytes of all frames below the floor.
    """

    next: int = 0
    next_bytes: int = 0
    append_time_ns: int = 0
    earliest: int = 0
    earliest_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PublisherState:
    """A publisher, as one log knows it.

    Attributes:
        sequence: that of its last event in this log; 0 where it has none there.
        gateway: the gateway that may store for it.
    """

    sequence: int
    gateway: str


@dataclass(frozen=True, slots=True)
class StateRecord:
    """The body of a state message.

    Attributes:
        topic: the log behind the batch.
        batch_id: the batch that wrote it.
        publisher: the publisher's state, in a message on a publisher's subject.
    """

    topic: TopicState
    batch_id: str
    publisher: PublisherState | None = None

    def encode(self) -> bytes:
        """As JSON, for those who look at the stream with other tools."""
        topic = self.topic
        body: dict[str, object] = {
            "next": topic.next,
            "next_bytes": topic.next_bytes,
            "append_time_ns": topic.append_time_ns,
            "earliest": topic.earliest,
            "earliest_bytes": topic.earliest_bytes,
            "batch": self.batch_id,
        }
        if self.publisher is not None:
            body |= {"sequence": self.publisher.sequence, "gateway": self.publisher.gateway}
        return json.dumps(body, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, subject: str, data: bytes) -> StateRecord:
        """Read a state. Raises :class:`LogDamagedError` where it is none."""
        try:
            body = json.loads(data)
            topic = TopicState(*(_count(body[name]) for name in _TOPIC_FIELDS))
            publisher = PublisherState(_count(body["sequence"]), _text(body["gateway"])) if "gateway" in body else None
            return cls(topic, _text(body["batch"]), publisher)
        except (KeyError, TypeError, ValueError) as error:
            raise LogDamagedError(f"the state on {subject} was not written by a bus") from error


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def split(events: EncodedEvents, skip: int, max_bytes: int) -> list[Part]:
    """Cut the events but the first ``skip`` into messages of at most ``max_bytes``.

    Consecutive events of one run share messages under that run's subject. Where a frame has many such stretches, all
    of it goes under no run's.
    """
    run_ids = events.run_ids[skip:] if skip else events.run_ids
    stretches = _stretches(run_ids)
    if len(stretches) > _MAX_STRETCHES:
        stretches = [(None, len(run_ids))]
    parts: list[Part] = []
    start = skip
    for run_id, count in stretches:
        data = join_batch(events.events[start : start + count])
        parts += [Part(run_id, data[at : at + max_bytes]) for at in range(0, len(data), max_bytes)]
        start += count
    return parts


def _stretches(run_ids: Sequence[str]) -> list[tuple[str | None, int]]:
    return [(run_id, sum(1 for _ in group)) for run_id, group in groupby(run_ids)]


class Joiner:
    """Puts messages, read in the order of their sequences, together to frames.

    Attributes:
        frames: the frames that are whole.
        next_sequence: that of the message after the last whole frame; 0 before there is one.
    """

    def __init__(self, stream: str) -> None:
        self.frames: list[StoredFrame] = []
        self.next_sequence = 0
        self._stream = stream
        self._pieces: list[bytes] = []
        self._frame: FramePart | None = None

    def add(self, message: Stored) -> None:
        """Take a message. Raises :class:`LogDamagedError` where it is not what was written."""
        part = FramePart.of(message)
        if zlib.crc32(message.data) != part.crc32:
            raise self._damaged(part)
        if part.part == 0:
            self._pieces = []
            self._frame = part
        elif self._frame is None:
            return  # The reading began within a frame.
        elif part.first_offset != self._frame.first_offset or part.part != len(self._pieces):
            raise self._damaged(part)
        self._pieces.append(message.data)
        if len(self._pieces) == part.parts:
            batch = b"".join(self._pieces) if part.parts > 1 else message.data
            self.frames.append(StoredFrame(part.first_offset, part.count, part.append_time_ns, batch))
            self.next_sequence = message.sequence + 1
            self._frame = None

    def _damaged(self, part: FramePart) -> LogDamagedError:
        return LogDamagedError(f"stream {self._stream}: the frame at offset {part.first_offset} is damaged")
