"""What the broker asks of a log engine. Engines differ in what they survive; each declares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence

    from esperml.oona.ranges import RangeSet
    from esperml.v1 import event_pb2


class LogError(Exception):
    """Base of the errors of log engines."""


class LogUnavailableError(LogError):
    """The log cannot store now; nothing of the request was stored. Trying again later may work."""


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
    """

    committed: int
    done: RangeSet


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
        """The extent of the log of ``kind``, as far as it is durable."""
        ...

    def groups(self) -> Mapping[tuple[int, str], GroupProgress]:
        """Progress of each (kind, group) as it was when the log was opened."""
        ...

    async def next_sequence(self, client_id: str) -> int:
        """The sequence that the next event of the publisher must have; 1 for a new one.

        Raises:
            LogUnavailableError: the log cannot be asked now.
        """
        ...

    def append(
        self, kind: int, client_id: str, first_sequence: int, events: Sequence[event_pb2.Event], size: int
    ) -> asyncio.Future[Appended]:
        """Store events, about ``size`` bytes, and the publisher's sequence with them. They must not change afterwards.

        Raises (from the future):
            SequenceGapError: the sequence leaves a gap.
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

    def save_group(self, kind: int, group: str, progress: GroupProgress) -> asyncio.Future[None]:
        """Store a group's progress.

        Raises (from the future):
            LogUnavailableError: it was not stored.
        """
        ...

    async def purge(self, kind: int, before: int) -> int:
        """Delete the frames that lie below offset ``before`` as a whole. Returns the earliest offset then.

        Raises:
            LogUnavailableError: nothing was deleted.
        """
        ...

    async def close(self) -> None:
        """Finish what was asked for, and let go of the files."""
        ...
