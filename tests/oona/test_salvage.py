"""What is left of a damaged log is found, told, and saved."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from esperml.cli.root import main
from esperml.client import OonaClient
from esperml.oona.log import DeadLetter, EncodedEvents, GroupProgress, LogDamagedError, LogInUseError
from esperml.oona.ranges import RangeSet
from esperml.oona.sqlite.log import SqliteLog
from esperml.oona.sqlite.salvage import examine, salvage
from esperml.v1 import event_pb2, oona_pb2

TELEMETRY, EVENTS = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
PAGE = 4096
FRAMES, COUNT = 60, 10
PROGRESS = GroupProgress(5, RangeSet([(7, 8), (12, 12)]), ((5, 6, 2, 1),))
EVERYTHING = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 3 * PAGE), st.booleans())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "damaged.sqlite"


@pytest.fixture
def new(tmp_path):
    return tmp_path / "new.sqlite"


@pytest.fixture
def fill(path, make_event):
    """Fills a log: numbered events on two kinds, a group, a dead letter. With ``close=False`` it is left open."""

    async def fill(*, frames: int = FRAMES, purge: int = 0, close: bool = True, mark_bytes: int = 500) -> SqliteLog:
        log = SqliteLog(path)
        for number in range(frames):
            marks = range(number * COUNT, (number + 1) * COUNT)
            events = EncodedEvents.of([make_event("run", f"{mark}".ljust(mark_bytes)) for mark in marks])
            await log.append(EVENTS, "p", number * COUNT + 1, events)
        await log.append(TELEMETRY, "q", 1, EncodedEvents.of([make_event()]))
        letter = DeadLetter(6, 123, b"an event", 5, 456, oona_pb2.DEAD_LETTER_REASON_NACKED)
        await log.save_group(EVENTS, "g", PROGRESS, {6: letter})
        if purge:
            await log.purge(EVENTS, purge)
        if close:
            await log.close()
        return log

    return fill


def numbers(frames) -> list[int]:
    return [
        int(event.run_ended.error)
        for frame in frames
        for event in event_pb2.EventBatch.FromString(frame.batch).events
        if event.run_id
    ]


async def contents(path) -> tuple[list[int], int, int, dict, list]:
    """What a log holds, by way of the engine."""
    log = SqliteLog(path)
    try:
        return (
            numbers(await log.read(EVENTS, 0, 2**40)),
            log.bounds(EVENTS).next,
            await log.next_sequence("p"),
            dict(log.groups()),
            await log.dead_letters(EVENTS, "g", 0, 10),
        )
    finally:
        await log.close()


def overwrite(path, position: int, garbage: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(garbage)


def place_of(path, needle: bytes) -> int:
    return path.read_bytes().index(needle)


async def test_a_whole_log_is_found_whole_and_copied_as_it_is(path, new, fill):
    await fill(purge=100)
    found = examine(path)
    assert found.is_whole
    assert (found.topics[EVENTS].earliest, found.topics[EVENTS].next) == (100, 600)
    assert salvage(path, new).is_whole
    assert await contents(new) == await contents(path)
    assert sqlite3.connect(new).execute("SELECT kind, earliest, next_offset, bytes FROM topics").fetchall() == (
        sqlite3.connect(path).execute("SELECT kind, earliest, next_offset, bytes FROM topics").fetchall()
    )


async def test_a_log_that_was_killed_is_read_with_its_write_ahead_log(path, new, fill, tmp_path):
    log = await fill(close=False)
    killed = tmp_path / "killed.sqlite"
    for suffix in ("", "-wal"):
        (tmp_path / f"killed.sqlite{suffix}").write_bytes((tmp_path / f"damaged.sqlite{suffix}").read_bytes())
    await log.close()
    assert salvage(killed, new).is_whole
    assert (await contents(new))[0] == list(range(600))


async def test_a_damaged_frame_is_lost_alone_and_readers_pass_it_by(path, new, fill):
    await fill()
    overwrite(path, place_of(path, b"305 "), b"garbage")
    log = SqliteLog(path)
    with pytest.raises(LogDamagedError, match="esper log salvage"):
        await log.read(EVENTS, 0, 2**40)
    await log.close()
    found = salvage(path, new)
    assert list(found.topics[EVENTS].lost) == [(300, 309)]
    stored, end, sequence, groups, letters = await contents(new)
    assert stored == [*range(300), *range(310, 600)]
    assert (end, sequence) == (600, 601)
    assert groups[EVENTS, "g"] == PROGRESS
    assert letters[0].event == b"an event"


async def test_clients_go_on_with_what_was_saved(bus, path, fill, make_event):
    await fill()
    overwrite(path, place_of(path, b"305 "), b"garbage")
    await bus.stop()
    for file in bus.path.parent.glob("oona.sqlite*"):
        file.unlink()
    salvage(path, bus.path)
    await bus.start()
    async with OonaClient(bus.target, client_id="p") as oona:
        published = await oona.publish(EVENTS, [make_event(mark="600")])
        assert published.first_offset == 600
        expected = [*range(300), *range(310, 601)]
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=601) as reader:
            assert [int(record.event.run_ended.error) async for record in reader] == expected
        got = []
        async with asyncio.timeout(10), oona.subscribe(EVENTS, group="fresh", start=EARLIEST) as member:
            async for batch in member.batches():
                got += [int(record.event.run_ended.error) for record in batch]
                if await member.ack(*batch) == 601:
                    break
        assert got == expected


async def test_a_log_without_its_header_and_schema_is_saved(path, new, fill):
    await fill()
    overwrite(path, 0, b"\xa5" * PAGE)
    with pytest.raises(LogDamagedError, match="esper log salvage"):
        SqliteLog(path)
    found = salvage(path, new)
    assert "the file's header is damaged" in found.problems
    stored, end, sequence, groups, letters = await contents(new)
    assert stored == list(range(600))
    assert (end, sequence, groups[EVENTS, "g"]) == (600, 601, PROGRESS)
    assert letters[0].offset == 6


async def test_a_log_cut_off_gives_back_what_was_before_the_cut(path, new, fill):
    await fill()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])
    found = salvage(path, new)
    assert any("cut off" in problem for problem in found.problems)
    stored, end, sequence, *_ = await contents(new)
    assert 150 < len(stored) < 400
    assert stored == sorted(set(stored))
    # Offsets are not given out again, and the publisher goes on where it was.
    assert (end, sequence) == (600, 601)


async def test_a_missing_write_ahead_log_is_noticed(path, new, fill, tmp_path):
    log = await fill(close=False)
    for name in ("damaged.sqlite", "damaged.sqlite.lock"):
        (tmp_path / name.replace("damaged", "alone")).write_bytes((tmp_path / name).read_bytes())
    await log.close()
    for _ in range(2):  # Looking at it changes nothing.
        with pytest.raises(LogDamagedError, match=r"alone\.sqlite-wal, which holds what was stored last, is missing"):
            SqliteLog(tmp_path / "alone.sqlite")
        examine(tmp_path / "alone.sqlite")
    found = salvage(tmp_path / "alone.sqlite", new)
    assert any("is missing" in problem for problem in found.problems)


async def test_the_new_log_takes_the_place_of_one_that_was_killed(path, new, fill, tmp_path):
    log = await fill(close=False)
    killed = tmp_path / "killed.sqlite"
    for suffix in ("", "-wal", ".lock"):
        (tmp_path / f"killed.sqlite{suffix}").write_bytes((tmp_path / f"damaged.sqlite{suffix}").read_bytes())
    await log.close()
    run = CliRunner().invoke(main, ["log", "salvage", str(killed), str(new)])
    assert run.exit_code == 0
    assert "-wal, -shm and .lock" in run.output
    for file in tmp_path.glob("killed.sqlite*"):
        file.unlink()
    new.rename(killed)
    assert (await contents(killed))[0] == list(range(600))


async def test_a_write_ahead_log_that_is_damaged_counts_up_to_there(path, new, fill, tmp_path):
    log = await fill(close=False, mark_bytes=4000)
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(path.read_bytes())
    wal = (tmp_path / "damaged.sqlite-wal").read_bytes()
    await log.close()
    (tmp_path / "copy.sqlite-wal").write_bytes(wal[:100_000] + b"garbage" + wal[100_007:])
    found = salvage(copy, new)
    assert any("copy.sqlite-wal: is damaged at byte" in problem for problem in found.problems)
    stored, *_ = await contents(new)
    assert stored == list(range(len(stored)))


async def test_what_was_purged_does_not_come_back(path, new, fill):
    await fill(purge=300)
    overwrite(path, place_of(path, b"405 "), b"garbage")
    salvage(path, new)
    assert (await contents(new))[0] == [*range(300, 400), *range(410, 600)]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(EVERYTHING, min_size=1, max_size=4))
@example(damages=[(0.0, PAGE, True)])
async def test_whatever_is_overwritten_all_that_is_saved_is_right(path, new, fill, damages):
    for leftover in path.parent.iterdir():
        leftover.unlink()
    await fill(frames=30)
    size = path.stat().st_size
    for position, length, is_zero in damages:
        overwrite(path, int(position * size), (bytes(1) if is_zero else b"\xa5") * length)
    found = salvage(path, new)
    stored, end, *_ = await contents(new)
    assert stored == sorted(set(stored))
    assert set(stored) <= set(range(300))
    topic = found.topics.get(EVENTS)
    assert (topic.records if topic else 0) == len(stored)
    if found.is_whole:
        assert stored == list(range(300))
        assert end == 300


async def test_nothing_is_saved_over_what_is_there_nor_while_a_server_runs(path, new, fill):
    log = await fill(close=False)
    with pytest.raises(LogInUseError):
        salvage(path, new)
    await log.close()
    new.write_bytes(b"something")
    with pytest.raises(FileExistsError, match=r"new\.sqlite: is there already"):
        salvage(path, new)


async def test_the_command_says_what_was_lost_and_fails_then(path, new, fill):
    await fill()
    run = CliRunner().invoke(main, ["log", "check", str(path)])
    assert run.exit_code == 0
    assert "events: 600 records whole, offsets 0 to 599; none lost" in run.output
    overwrite(path, place_of(path, b"305 "), b"garbage")
    run = CliRunner().invoke(main, ["log", "check", str(path)])
    assert run.exit_code == 1
    assert "events: 590 records whole, offsets 0 to 599; lost: 300 to 309" in run.output
    run = CliRunner().invoke(main, ["log", "salvage", str(path), str(new)])
    assert run.exit_code == 1
    assert f"saved to {new}" in run.output
    run = CliRunner().invoke(main, ["log", "salvage", str(path), str(new)])
    assert run.exit_code == 1
    assert "is there already" in run.output
    # What was lost stays lost, and is told of the new log as well.
    run = CliRunner().invoke(main, ["log", "check", str(new)])
    assert "events: 590 records whole, offsets 0 to 599; lost: 300 to 309" in run.output


def test_what_is_no_log_gives_nothing(path, new):
    path.write_bytes(b"certainly no log" * 1000)
    found = salvage(path, new)
    assert not found.is_whole
    assert not found.topics
    path.with_name("empty").write_bytes(b"")
    assert not examine(path.with_name("empty")).is_whole
