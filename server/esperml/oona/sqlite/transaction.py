"""What one transaction of the embedded log does, and the state of the log that it would leave."""

from __future__ import annotations

import json
import time
import zlib
from typing import TYPE_CHECKING, Final

from esperml.oona.log import Appended, DeadLetter, EncodedEvents, GroupProgress, SequenceGapError, TopicBounds
from esperml.oona.retention import FrameExtent
from esperml.oona.sqlite.letters import store_letters

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

# What one transaction deletes: two ms of work or so.
_PURGE_FRAMES: Final = 256
_PURGE_BYTES: Final = 2**19


class Transaction:
    """State of the log as one open transaction sees it; becomes the log's state when the transaction commits.

    Args:
        connection: in a transaction.
        bounds: the extent of each log before it.
        last_time_ns: when the last frame was stored, in ns since 1970.

    Attributes:
        bounds: the extent of each log after it.
        append_time_ns: when its frames are stored, in ns since 1970: not before the last ones, whatever the clock says.
    """

    def __init__(self, connection: sqlite3.Connection, bounds: Mapping[int, TopicBounds], last_time_ns: int) -> None:
        self.connection = connection
        self.bounds = dict(bounds)
        self.append_time_ns = max(time.time_ns(), last_time_ns)
        self.sequences: dict[str, int] = {}
        self.groups: dict[tuple[int, str], GroupProgress] = {}
        self.letters: dict[tuple[int, str], dict[int, DeadLetter | None]] = {}

    def last_sequence(self, client_id: str) -> int:
        """Sequence of the last event of a publisher that is stored; 0 where there is none."""
        if client_id not in self.sequences:
            row = self.connection.execute(
                "SELECT last_sequence FROM publishers WHERE client_id = ?", (client_id,)
            ).fetchone()
            self.sequences[client_id] = row[0] if row else 0
        return self.sequences[client_id]

    def append(self, kind: int, client_id: str, first_sequence: int, events: EncodedEvents) -> Appended:
        """Store a frame. Raises :class:`SequenceGapError`, with nothing done, where the sequence leaves a gap."""
        last = self.last_sequence(client_id)
        if first_sequence > last + 1:
            raise SequenceGapError(last + 1, first_sequence)
        bounds = self.bounds.get(kind, TopicBounds())
        duplicates = min(last + 1 - first_sequence, len(events))
        count = len(events) - duplicates
        if count:
            batch = events.batch(skip=duplicates)
            self.connection.execute(
                "INSERT INTO frames (kind, first_offset, count, append_time_ns, crc32, batch) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (kind, bounds.next, count, self.append_time_ns, zlib.crc32(batch), batch),
            )
            self.sequences[client_id] = last + count
            self.bounds[kind] = TopicBounds(bounds.earliest, bounds.next + count, bounds.bytes + len(batch))
        return Appended(bounds.next, count, duplicates, self.append_time_ns)

    def purge(self, kind: int, before: int) -> tuple[int, bool]:
        """Delete some of the frames below an offset. Returns the earliest offset then, and whether that is all."""
        bounds = self.bounds.get(kind, TopicBounds())
        earliest, freed = bounds.earliest, 0
        frames = oldest_frames(self.connection, kind, _PURGE_FRAMES)
        for frame in frames:
            end = frame.first_offset + frame.count
            if end > before or freed >= _PURGE_BYTES:
                break
            earliest = end
            freed += frame.bytes
        if earliest == bounds.earliest:
            return earliest, True
        self.connection.execute("DELETE FROM frames WHERE kind = ? AND first_offset < ?", (kind, earliest))
        self.bounds[kind] = TopicBounds(earliest, bounds.next, bounds.bytes - freed)
        return earliest, earliest >= before

    def save_group(
        self, kind: int, group: str, progress: GroupProgress, letters: Mapping[int, DeadLetter | None]
    ) -> None:
        """Store a group's progress, and what became of its dead letters (None: deleted)."""
        self.groups[kind, group] = progress
        if letters:
            self.letters.setdefault((kind, group), {}).update(letters)

    def write_summary(self, before: Mapping[int, TopicBounds]) -> None:
        """Write what changed beside the frames: each row once, however many requests changed it."""
        self.connection.executemany(
            "INSERT INTO topics (kind, earliest, next_offset, bytes) VALUES (?, ?, ?, ?) ON CONFLICT (kind) DO UPDATE "
            "SET earliest = excluded.earliest, next_offset = excluded.next_offset, bytes = excluded.bytes",
            [(kind, b.earliest, b.next, b.bytes) for kind, b in self.bounds.items() if before.get(kind) != b],
        )
        self.connection.executemany(
            "INSERT INTO publishers (client_id, last_sequence) VALUES (?, ?) ON CONFLICT (client_id) DO UPDATE "
            "SET last_sequence = excluded.last_sequence WHERE last_sequence < excluded.last_sequence",
            [item for item in self.sequences.items() if item[1]],
        )
        self.connection.executemany(
            "INSERT INTO groups (kind, name, committed, done, attempts) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (kind, name) DO UPDATE "
            "SET committed = excluded.committed, done = excluded.done, attempts = excluded.attempts",
            [
                (kind, name, p.committed, p.done.to_json(), json.dumps(list(p.attempts)))
                for (kind, name), p in self.groups.items()
            ],
        )
        store_letters(self.connection, self.letters)


def oldest_frames(connection: sqlite3.Connection, kind: int, count: int) -> list[FrameExtent]:
    """The first frames of a log, at most ``count``, in order. Reads no batch."""
    rows = connection.execute(
        "SELECT first_offset, count, append_time_ns, length(batch) FROM frames WHERE kind = ? ORDER BY first_offset "
        "LIMIT ?",
        (kind, count),
    )
    return [FrameExtent(*row) for row in rows]
