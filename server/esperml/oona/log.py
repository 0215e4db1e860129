"""What the broker asks of a log engine. Engines differ in what they survive; each declares it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from esperml.oona.wire import join_batch

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence

    from esperml.oona.ranges import RangeSet
    from esperml.v1 import event_pb2, oona_pb2


class LogError(Exception):
    """Base of the errors of log engines."""


class LogUnavailableError(LogError):
    """The log cannot store now; nothing of the request was stored. Trying again later may work."""


class LogMovedError(LogUnavailableError):
    """Another server of the same bus has taken what the request concerns, or will: whoever comes again finds it."""


class LogFullError(LogUnavailableError):
    """The log has reached the limit that it was given; nothing of the request was stored.

    Attributes:
        retry_after_s: when there may be room again, in s.
    """

    def __init__(self, problem: str, retry_after_s: float) -> None:
        super().__init__(problem)
        self.retry_after_s = retry_after_s


class LogDamagedError(LogError):
    """The stored log is not what was written: its file is damaged, or is none of ours."""


class LogInUseError(LogError):
    """Another process has the log open."""


class SequenceGapError(LogError):
    """A frame's sequence does not follow the last one that is stored.

    Attributes:
        expected: the sequence that would have followed.
    """

    def __init__(self, expected: int, given: int) -> None:
        super().__init__(f"must be at most {expected}, the next one of this client, not {given}")
        self.expected = expected


@dataclass(frozen=True, slots=True)
class EncodedEvents:
    """Events that one request publishes, checked and in the form in which they are stored and delivered.

    Attributes:
        run_ids: the run of each event.
        events: each event, a serialized ``esperml.v1.Event``.
        size: bytes of all events together.
    """

    run_ids: Sequence[str]
    events: Sequence[bytes]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(map(len, self.events)))

    @classmethod
    def of(cls, events: Sequence[event_pb2.Event]) -> EncodedEvents:
        """The encoded form of events, which are not checked."""
        return cls([event.run_id for event in events], [event.SerializeToString() for event in events])

    def __len__(self) -> int:
        return len(self.events)

    def without(self, skip: int) -> EncodedEvents:
        """The events but the first ``skip``."""
        return EncodedEvents(self.run_ids[skip:], self.events[skip:]) if skip else self

    def batch(self, skip: int = 0) -> bytes:
        """The events but the first ``skip`` as a serialized ``esperml.v1.EventBatch``, the form of a stored frame."""
        return join_batch(self.events[skip:] if skip else self.events)


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of a frame: it is stored as durably as the engine declares.

    Attributes:
        first_offset: offset of the first event stored. Meaningless where ``count`` is 0.
        count: events stored.
        duplicates: events at the front of the frame that were stored before.
        append_time_ns: when, in ns since 1970. Never decreases along a log.
    """

    first_offset: int
    count: int
    duplicates: int
    append_time_ns: int


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """One row of a log: the events that one request stored.

    Attributes:
        first_offset: offset of the first event.
        count: events in the frame, at least 1.
        append_time_ns: when it was stored, in ns since 1970.
        batch: the events, a serialized ``esperml.v1.EventBatch``.
    """

    first_offset: int
    count: int
    append_time_ns: int
    batch: bytes


@dataclass(frozen=True, slots=True)
class TopicBounds:
    """The extent of one log.

    Attributes:
        earliest: first offset that is still there; ``next`` where the log is empty.
        next: offset of the next record to be stored.
        bytes: bytes of the stored batches.
    """

    earliest: int = 0
    next: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class GroupProgress:
    """What a group has done, as it must outlive the process.

    Attributes:
        committed: everything below is done with.
        done: what is done with at or above ``committed``.
        attempts: what was delivered and came back, as (first offset, last offset, deliveries, failures): ascending
            and disjoint, at or above ``committed``. Failures are those of its deliveries that came back for the
            record's own sake, not for that of an earlier one of its run.
    """

    committed: int
    done: RangeSet
    attempts: Sequence[tuple[int, int, int, int]] = ()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that a group gave up on. It is kept beside the log, and outlives the log's own record.

    Attributes:
        offset: offset of the record.
        append_time_ns: when the record was stored, in ns since 1970.
        event: its event, a serialized ``esperml.v1.Event``.
        attempts: how often it was delivered.
        time_ns: when the group gave it up, in ns since 1970.
        reason: why.
        replaying: whether it was given back to the group, which has not acknowledged it yet.
    """

    offset: int
    append_time_ns: int
    event: bytes
    attempts: int
    time_ns: int
    reason: oona_pb2.DeadLetterReason.ValueType
    replaying: bool = False


NO_LETTERS: Final[Mapping[int, DeadLetter | None]] = {}
"""No change of dead letters."""


class Log(Protocol):
    """One append-only log per kind, publishers' sequences, and groups' progress.

    Methods are called on one event loop and never block it. A future or coroutine that finishes means: as durable as
    ``durability`` says. Calls take effect in the order in which they were made.
    """

    @property
    def durability(self) -> str:
        """What is survived once a call has finished. ``fsync``: loss of power; ``page_cache``: the process's end."""
        ...

    def bounds(self, kind: int) -> TopicBounds:
        """The extent of the log of ``kind``, as far as this process knows it to be durable."""
        ...

    def listen(self, changed: Callable[[int], None]) -> None:
        """Have ``changed(kind)`` called on the event loop whenever ``bounds(kind)`` has changed, whoever changed it.

        That is: after an append or a purge through this object, after records that the engine itself let go as too old
        or too many, and after what other processes stored or deleted where they share the log. An append or purge
        through this object resolves its future before the call. There is one listener, the broker, which asks to be
        called once, before anything else; one call may stand for several changes.
        """
        ...

    def groups(self) -> Mapping[tuple[int, str], GroupProgress]:
        """Progress of each (kind, group) as it was when the log was opened."""
        ...

    def letters(self) -> Mapping[tuple[int, str], Mapping[int, bool]]:
        """Dead letters of each (kind, group) that has some, as they were when the log was opened.

        They are given by their offsets; the value says whether the letter was being replayed.
        """
        ...

    async def next_sequence(self, client_id: str) -> int:
        """The sequence that the next event of the publisher must have; 1 for a new one.

        Raises:
            LogUnavailableError: the log cannot be asked now.
        """
        ...

    def append(self, kind: int, client_id: str, first_sequence: int, events: EncodedEvents) -> asyncio.Future[Appended]:
        """Store events, at least one, as one frame, and the publisher's sequence with them.

        Events at the front whose sequences are stored already are left out.

        Raises (from the future):
            SequenceGapError: the sequence leaves a gap.
            LogFullError: the log is over its limit; nothing was stored.
            LogUnavailableError: nothing was stored.
        """
        ...

    async def read(self, kind: int, offset: int, max_bytes: int) -> list[StoredFrame]:
        """Frames from the one that holds ``offset``, or the next that is there, in order.

        At least one where there is any, and not many more than ``max_bytes`` of them.

        Raises:
            LogDamagedError: what is stored cannot be read.
        """
        ...

    async def offset_at(self, kind: int, time_ns: int) -> int:
        """Offset of the first record stored at or after a time (ns since 1970), or of the next to be stored."""
        ...

    def save_group(
        self, kind: int, group: str, progress: GroupProgress, letters: Mapping[int, DeadLetter | None] = NO_LETTERS
    ) -> asyncio.Future[None]:
        """Store a group's progress and what became of dead letters of it, both or neither.

        ``letters`` names dead letters by their offsets: each is stored in the place of the one that was there, if any,
        or deleted where the value is None.

        Raises (from the future):
            LogUnavailableError: nothing was stored.
        """
        ...

    async def dead_letters(self, kind: int, group: str, first: int, limit: int) -> list[DeadLetter]:
        """Dead letters of a group from offset ``first`` on, at most ``limit``, ascending; all that was stored before.

        Raises:
            LogDamagedError: what is stored cannot be read.
            LogUnavailableError: the log cannot be asked now.
        """
        ...

    async def purge(self, kind: int, before: int) -> int:
        """Delete the frames that lie below offset ``before`` as a whole. Returns the earliest offset then.

        It may go in steps, between which others are served.

        Raises:
            LogUnavailableError: not all of them were deleted.
        """
        ...

    async def close(self) -> None:
        """Finish what was asked for, and let go of the files."""
        ...
