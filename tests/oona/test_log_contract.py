"""What every log engine must do. A new engine joins ``ENGINES`` in ``conftest.py`` and nothing else."""

from __future__ import annotations

import asyncio
import time

import pytest

from esperml.oona.log import (
    DeadLetter,
    EncodedEvents,
    GroupProgress,
    LogUnavailableError,
    SequenceGapError,
    TopicBounds,
)
from esperml.oona.ranges import RangeSet
from esperml.v1 import event_pb2, oona_pb2

TELEMETRY, EVENTS = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS


@pytest.fixture
def events(make_event):
    return lambda count, mark="": EncodedEvents.of([make_event(mark=f"{mark}{index}") for index in range(count)])


def marks(frames) -> list[str]:
    return [event.run_ended.error for frame in frames for event in event_pb2.EventBatch.FromString(frame.batch).events]


async def test_offsets_count_per_kind_from_zero_without_gaps(log, events):
    assert log.bounds(EVENTS) == TopicBounds(0, 0, 0)
    first = await log.append(EVENTS, "p", 1, events(3))
    second = await log.append(EVENTS, "p", 4, events(2))
    other = await log.append(TELEMETRY, "p", 6, events(1))
    assert (first.first_offset, second.first_offset, other.first_offset) == (0, 3, 0)
    assert (log.bounds(EVENTS).earliest, log.bounds(EVENTS).next) == (0, 5)


async def test_what_was_stored_is_stored_once(log, events):
    await log.append(EVENTS, "p", 1, events(3, "x"))
    again = await log.append(EVENTS, "p", 1, events(3, "x"))
    overlap = await log.append(EVENTS, "p", 2, events(4, "y"))
    assert (again.count, again.duplicates) == (0, 3)
    assert (overlap.first_offset, overlap.count, overlap.duplicates) == (3, 2, 2)
    assert marks(await log.read(EVENTS, 0, 10**6)) == ["x0", "x1", "x2", "y2", "y3"]


async def test_a_gap_is_refused_and_harms_nobody_else(log, events):
    good = log.append(EVENTS, "p", 1, events(1))
    gap = log.append(EVENTS, "p", 3, events(1))
    other = log.append(EVENTS, "q", 1, events(1))
    with pytest.raises(SequenceGapError) as caught:
        await gap
    assert caught.value.expected == 2
    assert ((await good).first_offset, (await other).first_offset) == (0, 1)


async def test_sequences_count_per_publisher_over_all_kinds_and_survive(open_log, events):
    log = await open_log()
    await log.append(EVENTS, "p", 1, events(2))
    await log.append(TELEMETRY, "p", 3, events(2))
    assert await log.next_sequence("p") == 5
    await log.close()
    log = await open_log()
    assert await log.next_sequence("p") == 5
    assert await log.next_sequence("q") == 1
    assert (await log.append(EVENTS, "p", 1, events(2))).duplicates == 2
    await log.close()


async def test_the_next_sequence_counts_what_is_still_being_stored(log, events):
    stored = log.append(EVENTS, "p", 1, events(2))
    assert await log.next_sequence("p") == 3
    assert (await stored).count == 2


async def test_reading_starts_with_the_frame_that_holds_the_offset(log, events):
    await log.append(EVENTS, "p", 1, events(3))
    await log.append(EVENTS, "p", 4, events(3))
    assert [frame.first_offset for frame in await log.read(EVENTS, 2, 10**6)] == [0, 3]
    assert [frame.first_offset for frame in await log.read(EVENTS, 3, 10**6)] == [3]
    assert [frame.first_offset for frame in await log.read(EVENTS, 0, 1)] == [0]
    assert await log.read(EVENTS, 6, 10**6) == []


async def test_append_times_never_decrease_and_lead_to_offsets(log, events):
    before_ns = time.time_ns()
    appended = [await log.append(EVENTS, "p", sequence, events(1)) for sequence in (1, 2, 3)]
    times = [item.append_time_ns for item in appended]
    assert times == sorted(times)
    assert await log.offset_at(EVENTS, before_ns) == 0
    assert await log.offset_at(EVENTS, times[1]) == times.index(times[1])
    assert await log.offset_at(EVENTS, times[2] + 1) == 3


async def test_purging_deletes_whole_frames_and_gives_no_offset_out_again(open_log, events):
    log = await open_log()
    await log.append(EVENTS, "p", 1, events(3))
    await log.append(EVENTS, "p", 4, events(3))
    size = log.bounds(EVENTS).bytes
    assert await log.purge(EVENTS, 5) == 3
    assert 0 < log.bounds(EVENTS).bytes < size
    assert [frame.first_offset for frame in await log.read(EVENTS, 0, 10**6)] == [3]
    assert await log.purge(EVENTS, 6) == 6
    assert log.bounds(EVENTS) == TopicBounds(6, 6, 0)
    await log.close()
    log = await open_log()
    assert log.bounds(EVENTS) == TopicBounds(6, 6, 0)
    assert (await log.append(EVENTS, "p", 7, events(1))).first_offset == 6
    await log.close()


async def test_progress_of_groups_survives(open_log):
    log = await open_log()
    assert log.groups() == {}
    await log.save_group(EVENTS, "g", GroupProgress(1, RangeSet()))
    await log.save_group(EVENTS, "g", GroupProgress(3, RangeSet([(5, 7), (9, 9)])))
    await log.save_group(TELEMETRY, "g", GroupProgress(0, RangeSet()))
    await log.close()
    log = await open_log()
    assert log.groups() == {
        (EVENTS, "g"): GroupProgress(3, RangeSet([(5, 7), (9, 9)])),
        (TELEMETRY, "g"): GroupProgress(0, RangeSet()),
    }
    await log.close()


async def test_attempts_of_a_group_survive(open_log):
    log = await open_log()
    progress = GroupProgress(1, RangeSet([(5, 7)]), ((1, 3, 2, 1), (9, 9, 1, 0)))
    await log.save_group(EVENTS, "g", progress)
    await log.close()
    log = await open_log()
    assert log.groups() == {(EVENTS, "g"): progress}
    await log.close()


def letter(offset: int, **fields) -> DeadLetter:
    reason = oona_pb2.DEAD_LETTER_REASON_NACKED
    values = {"append_time_ns": 7, "event": b"event", "attempts": 3, "time_ns": 9, "reason": reason}
    return DeadLetter(offset=offset, **(values | fields))


async def test_dead_letters_are_stored_with_progress_replaced_deleted_and_listed_by_offset(open_log):
    log = await open_log()
    assert log.letters() == {}
    assert await log.dead_letters(EVENTS, "g", 0, 10) == []
    progress = GroupProgress(8, RangeSet())
    await log.save_group(EVENTS, "g", progress, {offset: letter(offset) for offset in (7, 3, 5)})
    await log.save_group(EVENTS, "h", progress, {3: letter(3, event=b"other")})
    await log.save_group(EVENTS, "g", progress, {3: None, 5: letter(5, replaying=True), 6: None})
    await log.save_group(EVENTS, "g", progress)
    assert await log.dead_letters(EVENTS, "g", 0, 10) == [letter(5, replaying=True), letter(7)]
    assert await log.dead_letters(EVENTS, "g", 6, 10) == [letter(7)]
    assert await log.dead_letters(EVENTS, "g", 0, 1) == [letter(5, replaying=True)]
    await log.close()
    log = await open_log()
    assert log.letters() == {(EVENTS, "g"): {5: True, 7: False}, (EVENTS, "h"): {3: False}}
    assert await log.dead_letters(EVENTS, "h", 0, 10) == [letter(3, event=b"other")]
    await log.close()


async def test_dead_letters_outlive_their_records(log, events):
    await log.append(EVENTS, "p", 1, events(2))
    await log.save_group(EVENTS, "g", GroupProgress(2, RangeSet()), {1: letter(1)})
    await log.purge(EVENTS, 2)
    assert await log.dead_letters(EVENTS, "g", 0, 10) == [letter(1)]


async def test_the_listener_is_told_of_changed_bounds_after_the_futures(log, events):
    heard: list[tuple[int, TopicBounds]] = []
    told = asyncio.Event()

    def changed(kind: int) -> None:
        assert stored is None or stored.done()
        heard.append((kind, log.bounds(kind)))
        told.set()

    stored = None
    log.listen(changed)
    await log.save_group(EVENTS, "g", GroupProgress(0, RangeSet()))
    stored = log.append(EVENTS, "p", 1, events(2))
    await told.wait()
    assert [(kind, bounds.next) for kind, bounds in heard] == [(EVENTS, 2)]
    told.clear()
    assert await log.purge(EVENTS, 2) == 2
    await told.wait()
    assert heard[-1] == (EVENTS, TopicBounds(2, 2, 0))


async def test_requests_made_together_take_effect_in_their_order(log, events):
    futures = [log.append(EVENTS, "p", sequence, events(1, f"{sequence}-")) for sequence in range(1, 201)]
    appended = [await future for future in futures]
    assert [item.first_offset for item in appended] == list(range(200))


async def test_a_closed_log_refuses(open_log, events):
    log = await open_log()
    pending = log.append(EVENTS, "p", 1, events(1))
    await log.close()
    await log.close()
    assert (await pending).count == 1
    with pytest.raises(LogUnavailableError, match="closed"):
        await log.append(EVENTS, "p", 2, events(1))


async def test_durability_is_declared(log, engine):
    assert log.durability == engine.durability
