"""The tables of the embedded log, and the checks that a file really holds them."""

from __future__ import annotations

import zlib
from typing import IO, TYPE_CHECKING, Final

from esperml.oona.log import LogDamagedError
from esperml.oona.sqlite.letters import LETTERS_SCHEMA
from esperml.oona.sqlite.lock import was_left_open

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

# "Oona" in ASCII: tells our files from those of other programs.
_APPLICATION_ID: Final = 0x4F6F6E61
_VERSION: Final = 2
# Walking every page of a larger file would hold up the start for seconds.
_FULL_CHECK_BYTES: Final = 256 * 2**20
SALVAGE: Final = "stop the server and see what `esper log salvage` can save"
"""What to do about a damaged log."""

# Frames at the end of each log that are checked however large the file is.
_LAST_FRAMES: Final = 8

_SCHEMA: Final = (
    # One row a published frame; crc32 is that of the batch, which SQLite itself does not check.
    # The index answers by offset and, without touching the batches, by time.
    "CREATE TABLE frames (kind INTEGER NOT NULL, first_offset INTEGER NOT NULL, count INTEGER NOT NULL, "
    "append_time_ns INTEGER NOT NULL, crc32 INTEGER NOT NULL, batch BLOB NOT NULL) STRICT",
    "CREATE UNIQUE INDEX frames_by_offset ON frames (kind, first_offset, append_time_ns)",
    "CREATE TABLE topics (kind INTEGER PRIMARY KEY, earliest INTEGER NOT NULL, next_offset INTEGER NOT NULL, "
    "bytes INTEGER NOT NULL) STRICT",
    "CREATE TABLE publishers (client_id TEXT PRIMARY KEY, last_sequence INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    # done: ranges [first, last] at or above committed, as JSON; attempts: [first, last, deliveries, failures] likewise.
    "CREATE TABLE groups (kind INTEGER NOT NULL, name TEXT NOT NULL, committed INTEGER NOT NULL, done TEXT NOT NULL, "
    "attempts TEXT NOT NULL DEFAULT '[]', PRIMARY KEY (kind, name)) STRICT, WITHOUT ROWID",
    *LETTERS_SCHEMA,
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)

# What makes a log of each earlier version one of the next.
_MIGRATIONS: Final = {1: ("ALTER TABLE groups ADD COLUMN attempts TEXT NOT NULL DEFAULT '[]'", *LETTERS_SCHEMA)}


def check_files(path: Path, lock: IO[bytes]) -> None:
    """Check that no file of a log is missing. Raises :class:`LogDamagedError` where one is."""
    wal = path.with_name(path.name + "-wal")
    if was_left_open(lock) and path.exists() and not wal.exists():
        raise LogDamagedError(
            f"{path}: was not closed, and {wal.name}, which holds what was stored last, is missing; {SALVAGE}"
        )


def create_or_check_schema(path: Path, connection: sqlite3.Connection) -> None:
    """Make the tables in an empty file, or check that the file is a log of ours and whole.

    A log of an earlier version becomes one of the present.

    Raises:
        LogDamagedError: it is not.
        sqlite3.DatabaseError: SQLite cannot make sense of it.
    """
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("COMMIT")
        return
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise LogDamagedError(f"{path}: is a database of another program")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if not min(_MIGRATIONS) <= version <= _VERSION:
        raise LogDamagedError(f"{path}: is a log of version {version}; this program reads version {_VERSION}")
    if path.stat().st_size <= _FULL_CHECK_BYTES:
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise LogDamagedError(f"{path}: is damaged: {problem}; {SALVAGE}")
    for kind, next_offset in connection.execute("SELECT kind, next_offset FROM topics").fetchall():
        last = connection.execute(
            "SELECT first_offset + count FROM frames WHERE kind = ? ORDER BY first_offset DESC LIMIT 1", (kind,)
        ).fetchone()
        if last is not None and last[0] != next_offset:
            raise LogDamagedError(
                f"{path}: is damaged: log {kind} ends at offset {last[0]}, not at {next_offset}; {SALVAGE}"
            )
        # What a crash can have spoilt is what was written last.
        for first_offset, crc32, batch in connection.execute(
            "SELECT first_offset, crc32, batch FROM frames WHERE kind = ? ORDER BY first_offset DESC LIMIT ?",
            (kind, _LAST_FRAMES),
        ):
            if zlib.crc32(batch) != crc32:
                raise LogDamagedError(f"{path}: is damaged: log {kind}: the frame at offset {first_offset}; {SALVAGE}")
    if version < _VERSION:
        connection.execute("BEGIN IMMEDIATE")
        for earlier in range(version, _VERSION):
            for statement in _MIGRATIONS[earlier]:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("COMMIT")
