from __future__ import annotations

import sqlite3

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from esperml.oona.frames import decode
from esperml.oona.log import (
    EncodedEvents,
    GroupProgress,
    LogDamagedError,
    LogInUseError,
    LogUnavailableError,
    StoredFrame,
)
from esperml.oona.ranges import RangeSet
from esperml.oona.sqlite.log import SqliteLog
from esperml.v1 import event_pb2

EVENTS = event_pb2.KIND_EVENTS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.sqlite"


async def fill(path, make_event, frames=20) -> None:
    log = SqliteLog(path)
    for frame in range(frames):
        await log.append(EVENTS, "p", frame * 10 + 1, EncodedEvents.of([make_event(mark="x" * 100) for _ in range(10)]))
    await log.close()


async def test_one_row_is_stored_for_each_frame(path, make_event):
    await fill(path, make_event, frames=3)
    rows = sqlite3.connect(path).execute("SELECT first_offset, count FROM frames").fetchall()
    assert rows == [(0, 10), (10, 10), (20, 10)]


@pytest.mark.parametrize(("durability", "synchronous"), [("fsync", 2), ("page_cache", 1)])
async def test_commits_are_synced_where_that_is_declared(path, durability, synchronous):
    log = SqliteLog(path, durability=durability)
    assert log._connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
    assert log._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await log.close()


async def test_two_processes_cannot_have_the_log_open(path):
    log = SqliteLog(path)
    with pytest.raises(LogInUseError, match=r"log\.sqlite: another process"):
        SqliteLog(path)
    await log.close()
    await SqliteLog(path).close()


def test_what_is_no_database_is_refused_by_name(path):
    path.write_bytes(b"certainly not a database" * 100)
    with pytest.raises(LogDamagedError, match=r"log\.sqlite: is damaged or no log"):
        SqliteLog(path)


def test_a_database_of_another_program_is_refused(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.commit()
    connection.close()
    with pytest.raises(LogDamagedError, match="another program"):
        SqliteLog(path)


async def test_a_log_of_a_later_version_is_refused(path):
    await SqliteLog(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(LogDamagedError, match="version 3; this program reads version 2"):
        SqliteLog(path)


async def test_a_log_that_lost_rows_is_refused(path, make_event):
    await fill(path, make_event)
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM frames WHERE first_offset >= 190")
    connection.commit()
    connection.close()
    with pytest.raises(LogDamagedError, match="ends at offset 190, not at 200"):
        SqliteLog(path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LogUnavailableError, match=r"missing/log\.sqlite"):
        SqliteLog(tmp_path / "missing" / "log.sqlite")


def test_a_folder_in_the_place_of_the_file_is_named(path):
    path.mkdir()
    with pytest.raises(LogUnavailableError, match="cannot be opened"):
        SqliteLog(path)
    path.rmdir()


async def test_a_file_cut_off_is_refused(path, make_event):
    await fill(path, make_event, frames=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LogDamagedError, match=r"log\.sqlite"):
        SqliteLog(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), garbage=st.binary(min_size=16, max_size=64))
@example(position=0.0005, garbage=bytes(11) + b"\x05" + bytes(4))  # SQLite: "unsupported file format".
@example(position=0.0625, garbage=b"\x80" + bytes(15))  # SQLite's message about it is no UTF-8.
async def test_a_damaged_file_is_read_right_or_refused(path, make_event, position, garbage):
    for leftover in path.parent.iterdir():
        leftover.unlink()
    await fill(path, make_event, frames=20)
    data = bytearray(path.read_bytes())
    start = int(position * (len(data) - len(garbage)))
    data[start : start + len(garbage)] = garbage
    path.write_bytes(data)
    try:
        log = SqliteLog(path)
    except LogDamagedError:
        return
    try:
        frames = [decode(EVENTS, stored) for stored in await log.read(EVENTS, 0, 10**9)]
        events = [event_pb2.Event.FromString(event) for frame in frames for event in frame.events(frame.first_offset)]
        assert [event.run_ended.error for event in events] == ["x" * 100] * 200
    except LogDamagedError:
        pass
    finally:
        await log.close()


async def test_a_groups_progress_that_is_no_json_is_refused(path, make_event):
    await fill(path, make_event, frames=1)
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO groups (kind, name, committed, done) VALUES (2, 'g', 0, '[[')")
    connection.commit()
    connection.close()
    with pytest.raises(LogDamagedError, match="is damaged"):
        SqliteLog(path)


async def test_a_full_disk_refuses_and_recovers_after_a_purge(path, make_event):
    log = SqliteLog(path, max_bytes=200_000)
    sequence = 1
    events = EncodedEvents.of([make_event(mark="x" * 1000) for _ in range(10)])
    with pytest.raises(LogUnavailableError, match="full"):  # noqa: PT012
        while True:
            await log.append(EVENTS, "p", sequence, events)
            sequence += 10
    end = log.bounds(EVENTS).next
    assert end == sequence - 1
    with pytest.raises(LogUnavailableError):
        await log.append(EVENTS, "p", sequence, events)
    await log.purge(EVENTS, end // 2)
    assert (await log.append(EVENTS, "p", sequence, events)).first_offset == end
    await log.close()


def test_a_frame_that_is_not_what_was_written_is_named():
    with pytest.raises(LogDamagedError, match="log 2: the frame at offset 7 cannot be decoded"):
        decode(EVENTS, StoredFrame(7, 1, 0, b"\xff\xff"))
    with pytest.raises(LogDamagedError, match="holds 0 events, not 1"):
        decode(EVENTS, StoredFrame(7, 1, 0, b""))


async def test_a_log_of_the_first_version_is_brought_up_to_date_with_all_that_it_holds(path, make_event):
    await fill(path, make_event, frames=2)
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO groups (kind, name, committed, done) VALUES (2, 'g', 3, '[[5, 6]]')")
    connection.execute("DROP TABLE dead_letters")
    connection.execute("ALTER TABLE groups DROP COLUMN attempts")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    log = SqliteLog(path)
    assert log.groups() == {(EVENTS, "g"): GroupProgress(3, RangeSet([(5, 6)]))}
    assert log.bounds(EVENTS).next == 20
    await log.save_group(EVENTS, "g", GroupProgress(3, RangeSet(), ((3, 3, 1, 1),)))
    await log.close()
    log = SqliteLog(path)
    assert log.groups()[EVENTS, "g"].attempts == ((3, 3, 1, 1),)
    await log.close()
