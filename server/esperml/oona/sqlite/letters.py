"""Dead letters in the embedded log: a copy of each record that a group gave up on, beside the log's own."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from esperml.oona.log import DeadLetter, LogDamagedError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

LETTERS_SCHEMA: Final = (
    # crc32 is that of the event, which SQLite itself does not check.
    'CREATE TABLE dead_letters (kind INTEGER NOT NULL, "group" TEXT NOT NULL, offset INTEGER NOT NULL, '
    "append_time_ns INTEGER NOT NULL, attempts INTEGER NOT NULL, time_ns INTEGER NOT NULL, reason INTEGER NOT NULL, "
    "replaying INTEGER NOT NULL, crc32 INTEGER NOT NULL, event BLOB NOT NULL) STRICT",
    # Answers where they are, and which are replayed, without touching the events.
    'CREATE UNIQUE INDEX dead_letters_by_offset ON dead_letters (kind, "group", offset, replaying)',
)


def store_letters(
    connection: sqlite3.Connection, letters: Mapping[tuple[int, str], Mapping[int, DeadLetter | None]]
) -> None:
    """Put dead letters of groups (kind, name) in the place of those that were there, or delete them where None."""
    for (kind, group), changes in letters.items():
        connection.executemany(
            'DELETE FROM dead_letters WHERE kind = ? AND "group" = ? AND offset = ?',
            [(kind, group, offset) for offset in changes],
        )
        connection.executemany(
            'INSERT INTO dead_letters (kind, "group", offset, append_time_ns, attempts, time_ns, reason, replaying, '
            "crc32, event) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    *(kind, group, letter.offset, letter.append_time_ns, letter.attempts, letter.time_ns),
                    *(letter.reason, letter.replaying, zlib.crc32(letter.event), letter.event),
                )
                for letter in changes.values()
                if letter is not None
            ],
        )


def letter_offsets(connection: sqlite3.Connection) -> dict[tuple[int, str], dict[int, bool]]:
    """Offsets of all dead letters by (kind, group), and whether each is being replayed."""
    offsets: dict[tuple[int, str], dict[int, bool]] = {}
    for kind, group, offset, replaying in connection.execute(
        'SELECT kind, "group", offset, replaying FROM dead_letters ORDER BY kind, "group", offset'
    ):
        offsets.setdefault((kind, group), {})[offset] = bool(replaying)
    return offsets


def read_letters(connection: sqlite3.Connection, kind: int, group: str, first: int, limit: int) -> list[DeadLetter]:
    """Dead letters of a group from an offset on, ascending. Raises :class:`LogDamagedError` for what was not stored."""
    letters = []
    for offset, append_time_ns, attempts, time_ns, reason, replaying, crc32, event in connection.execute(
        "SELECT offset, append_time_ns, attempts, time_ns, reason, replaying, crc32, event FROM dead_letters "
        'WHERE kind = ? AND "group" = ? AND offset >= ? ORDER BY offset LIMIT ?',
        (kind, group, first, limit),
    ):
        if zlib.crc32(event) != crc32:
            raise LogDamagedError(f"log {kind}: the dead letter of group {group!r} at offset {offset} is damaged")
        letters.append(DeadLetter(offset, append_time_ns, event, attempts, time_ns, reason, bool(replaying)))
    return letters
