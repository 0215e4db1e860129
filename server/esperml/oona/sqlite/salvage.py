"""Says what a damaged log still holds, and saves it into a new one.

Every frame whose CRC is right is saved under its own offset, wherever in the file it is found. Offsets that are lost
become records without a run, which the bus delivers to nobody: offsets stay what they were, and groups and readers go
on where they had been.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Final, TypeGuard

from esperml.contract import KINDS, kind_name
from esperml.oona.log import LogDamagedError
from esperml.oona.ranges import RangeSet
from esperml.oona.sqlite.lock import lock_log
from esperml.oona.sqlite.pages import Pages, Place
from esperml.oona.sqlite.schema import check_files, create_or_check_schema
from esperml.oona.wire import join_batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from esperml.contract import KindValue
    from esperml.oona.sqlite.pages import Value

# What one transaction of the new log takes in.
_TRANSACTION_BYTES: Final = 64 * 2**20
# Lost records that one frame stands for.
_LOST_FRAME: Final = 1024
_LETTER_COLUMNS: Final = 10
_TABLES: Final = {
    "topics": "SELECT kind, earliest, next_offset FROM topics",
    "publishers": "SELECT client_id, last_sequence FROM publishers",
    "groups": "SELECT * FROM groups",
    "dead_letters": "SELECT * FROM dead_letters",
}


@dataclass(frozen=True, slots=True)
class SavedFrame:
    """A frame that is whole.

    Attributes:
        first_offset: offset of its first event.
        count: its events.
        append_time_ns: when it was stored, in ns since 1970.
        place: where it is in the damaged file.
    """

    first_offset: int
    count: int
    append_time_ns: int
    place: Place

    @property
    def end(self) -> int:
        """Offset after its last event."""
        return self.first_offset + self.count


@dataclass(slots=True)
class SavedTopic:
    """What is left of the log of a kind.

    Attributes:
        earliest: first offset that it should hold.
        next: offset of the next record to be stored.
        frames: the frames that are whole, in order.
    """

    earliest: int
    next: int
    frames: list[SavedFrame] = field(default_factory=list)

    @property
    def lost(self) -> RangeSet:
        """Offsets that should be there and are not."""
        ends = [self.earliest, *(frame.end for frame in self.frames)]
        starts = [*(frame.first_offset for frame in self.frames), self.next]
        return RangeSet((end, start - 1) for end, start in zip(ends, starts, strict=True) if start > end)

    @property
    def records(self) -> int:
        """Records that are whole."""
        return sum(frame.count for frame in self.frames)


@dataclass(slots=True)
class Findings:
    """What a damaged log still holds.

    Attributes:
        topics: what is left of each kind's log.
        publishers: the last stored sequence of each.
        groups: (committed, done, attempts) of each (kind, name); the last two as JSON.
        letters: the columns of each dead letter, by (kind, group, offset).
        problems: what is wrong with it beside lost records, in words.
    """

    topics: dict[int, SavedTopic] = field(default_factory=dict)
    publishers: dict[str, int] = field(default_factory=dict)
    groups: dict[tuple[int, str], tuple[int, str, str]] = field(default_factory=dict)
    letters: dict[tuple[int, str, int], tuple[Value, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not any(topic.lost for topic in self.topics.values())

    def lines(self) -> Iterator[str]:
        """All of it in words, a line each."""
        for kind, topic in sorted(self.topics.items()):
            lost = [f"{first} to {last}" if last > first else f"{first}" for first, last in topic.lost]
            yield (
                f"{kind_name(kind) if is_kind(kind) else kind}: {topic.records} records whole, offsets "
                f"{topic.earliest} to {topic.next - 1}; " + (f"lost: {', '.join(lost)}" if lost else "none lost")
            )
        yield (
            f"{len(self.publishers)} publishers' sequences, progress of {len(self.groups)} groups, "
            f"{len(self.letters)} dead letters"
        )
        yield from self.problems


def examine(path: Path) -> Findings:
    """Read a log, damaged or not, and change nothing.

    Raises:
        LogInUseError: a server has it open.
        LogUnavailableError: its lock cannot be had.
        OSError: it cannot be read.
    """
    with contextlib.closing(lock_log(path)) as lock, Pages(path) as pages:
        return _find(path, lock, pages)


def salvage(damaged: Path, new: Path) -> Findings:
    """Save what a damaged log still holds into a new one. The damaged one is not changed.

    Raises:
        FileExistsError: there is something at ``new``.
        LogInUseError: a server has one of them open.
        LogUnavailableError: their locks cannot be had.
        OSError: the damaged log cannot be read.
        sqlite3.OperationalError: the new one cannot be written.
    """
    if new.exists():
        raise FileExistsError(f"{new}: is there already")
    with (
        contextlib.closing(lock_log(damaged)) as lock,
        contextlib.closing(lock_log(new)),
        Pages(damaged) as pages,
        contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection,
    ):
        findings = _find(damaged, lock, pages)
        connection.execute("PRAGMA journal_mode = WAL")
        create_or_check_schema(new, connection)
        for kind, topic in findings.topics.items():
            _write_topic(connection, kind, topic, pages)
        _write_rest(connection, findings)
    return findings


def is_kind(value: int) -> TypeGuard[KindValue]:
    """Whether a value names a kind of this version of the contract."""
    return value in KINDS


def _find(path: Path, lock: IO[bytes], pages: Pages) -> Findings:
    findings = Findings(problems=list(pages.problems))
    try:
        check_files(path, lock)
    except LogDamagedError as error:
        findings.problems.append(str(error).partition(";")[0])
    tables = _read_tables(path, findings.problems)
    frames: dict[int, dict[int, SavedFrame]] = {}
    raw_topics: list[tuple[Value, ...]] = []
    raw_letters: list[tuple[Value, ...]] = []
    for row in pages.table_rows():
        match row.values:
            case (int(kind), int(first), int(count), int(time_ns), int(crc32), bytes(batch)):
                if is_kind(kind) and count > 0 and zlib.crc32(batch) == crc32 and batch != _lost(count):
                    frames.setdefault(kind, {})[first] = SavedFrame(first, count, time_ns, row.place)
            case (None, int(), int(), int()):
                raw_topics.append((row.rowid, *row.values[1:3]))
            case values if len(values) == _LETTER_COLUMNS:
                raw_letters.append(values)
            case _:
                pass
    raw = [row.values for row in pages.keyed_rows()] if {"publishers", "groups"} - tables.keys() else []
    known = _known_bounds(tables.get("topics", raw_topics))
    for kind in sorted(frames.keys() | known.keys()):
        ordered = sorted(frames.get(kind, {}).values(), key=lambda frame: frame.first_offset)
        findings.topics[kind] = _topic(ordered, known.get(kind))
    _note_publishers(findings, tables.get("publishers", raw))
    _note_groups(findings, tables.get("groups", raw))
    _note_letters(findings, tables.get("dead_letters", raw_letters))
    return findings


def _known_bounds(rows: Iterable[tuple[Value, ...]]) -> dict[int, tuple[int, int]]:
    """Earliest and next offset of each kind. Of a stale row and the valid one, the later counts."""
    known: dict[int, tuple[int, int]] = {}
    for row in rows:
        match row:
            case (int(kind), int(earliest), int(end)) if is_kind(kind) and 0 <= earliest <= end:
                known[kind] = max(known.get(kind, (0, 0)), (earliest, end))
            case _:
                pass
    return known


def _note_publishers(findings: Findings, rows: Iterable[tuple[Value, ...]]) -> None:
    for row in rows:
        match row:
            case (str(name), int(sequence)):
                findings.publishers[name] = max(findings.publishers.get(name, 0), sequence)
            case _:
                pass


def _note_groups(findings: Findings, rows: Iterable[tuple[Value, ...]]) -> None:
    """Of several rows of a group, the one counts by which records come again rather than never."""
    for row in rows:
        match row:
            case (int(kind), str(name), int(committed), str(done), *rest) if is_kind(kind):
                attempts = rest[0] if rest else "[]"
                if isinstance(attempts, str) and _is_json(done) and _is_json(attempts):
                    found = (committed, done, attempts)
                    findings.groups[kind, name] = min(findings.groups.get((kind, name), found), found)
                else:
                    findings.problems.append(f"the progress of group {name!r} on {kind_name(kind)} is damaged: lost")
            case _:
                pass


def _note_letters(findings: Findings, rows: Iterable[tuple[Value, ...]]) -> None:
    for row in rows:
        match row:
            case (int(kind), str(group), int(offset), int(), int(), int(), int(), int(), int(crc32), bytes(event)):
                if zlib.crc32(event) == crc32:
                    findings.letters[kind, group, offset] = row
                else:
                    findings.problems.append(f"the dead letter of group {group!r} at offset {offset} is damaged: lost")
            case _:
                pass


def _topic(frames: Sequence[SavedFrame], known: tuple[int, int] | None) -> SavedTopic:
    """The log of a kind from what was found. Pages no longer used may still hold frames that were purged."""
    end = max(known[1] if known else 0, frames[-1].end if frames else 0)
    earliest = known[0] if known else (frames[0].first_offset if frames else end)
    topic = SavedTopic(earliest, end)
    for frame in frames:
        if frame.first_offset >= (topic.frames[-1].end if topic.frames else earliest):
            topic.frames.append(frame)
    return topic


def _read_tables(path: Path, problems: list[str]) -> dict[str, list[tuple[Value, ...]]]:
    """The tables that SQLite can read to their ends."""
    tables: dict[str, list[tuple[Value, ...]]] = {}
    # Without a write-ahead log SQLite would make one, which would hide that it is missing.
    how = "mode=ro" if path.with_name(path.name + "-wal").exists() else "immutable=1"
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        problems.append(f"SQLite cannot read the file: {error}")
        return tables
    with contextlib.closing(connection):
        for name, query in _TABLES.items():
            if name == "dead_letters" and version == 1:
                tables[name] = []  # There were none then.
                continue
            try:
                tables[name] = connection.execute(query).fetchall()
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                problems.append(f"table {name} is damaged, and some of it may be lost: {error}")
        try:
            if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                problems.append(f"SQLite finds damage: {found}")
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            problems.append(f"SQLite finds damage: {error}")
    return tables


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except json.JSONDecodeError:
        return False


def _write_topic(connection: sqlite3.Connection, kind: int, topic: SavedTopic, pages: Pages) -> None:
    """Write a log: its frames, and in place of lost records those that are nobody's."""
    size = uncommitted = 0
    # Nothing stands in front of the first frame: there the log begins later.
    earliest = topic.frames[0].first_offset if topic.frames else topic.next
    connection.execute("BEGIN IMMEDIATE")
    for first_offset, count, time_ns, batch in _frames(topic, pages):
        connection.execute(
            "INSERT INTO frames (kind, first_offset, count, append_time_ns, crc32, batch) VALUES (?, ?, ?, ?, ?, ?)",
            (kind, first_offset, count, time_ns, zlib.crc32(batch), batch),
        )
        size += len(batch)
        uncommitted += len(batch)
        if uncommitted >= _TRANSACTION_BYTES:
            connection.execute("COMMIT")
            connection.execute("BEGIN IMMEDIATE")
            uncommitted = 0
    connection.execute("INSERT INTO topics VALUES (?, ?, ?, ?)", (kind, earliest, topic.next, size))
    connection.execute("COMMIT")


def _frames(topic: SavedTopic, pages: Pages) -> Iterator[tuple[int, int, int, bytes]]:
    """The frames of the new log, as (first offset, count, append time in ns, batch)."""
    for frame, following in pairwise([*topic.frames, None]):
        if frame is None:
            return
        row = pages.row(frame.place)
        if row is not None and isinstance(batch := row.values[-1], bytes):
            yield frame.first_offset, frame.count, frame.append_time_ns, batch
        lost_to = topic.next if following is None else following.first_offset
        for first in range(frame.end, lost_to, _LOST_FRAME):
            count = min(_LOST_FRAME, lost_to - first)
            yield first, count, frame.append_time_ns, _lost(count)


def _lost(count: int) -> bytes:
    """The batch that stands for lost records: events without anything in them."""
    return join_batch([b""] * count)


def _write_rest(connection: sqlite3.Connection, findings: Findings) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO publishers VALUES (?, ?)", findings.publishers.items())
    connection.executemany(
        "INSERT INTO groups (kind, name, committed, done, attempts) VALUES (?, ?, ?, ?, ?)",
        [(*key, *progress) for key, progress in findings.groups.items()],
    )
    connection.executemany("INSERT INTO dead_letters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", findings.letters.values())
    connection.execute("COMMIT")
