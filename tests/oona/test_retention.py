"""What a log has beyond its limits leaves, oldest first, and nothing else does."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.client import BehindFloorError, OonaClient
from esperml.oona.log import EncodedEvents, LogUnavailableError, TopicBounds
from esperml.oona.retention import FrameExtent, Retention, first_to_keep, retention
from esperml.oona.sqlite.log import SqliteLog
from esperml.settings import RetentionLimits, RetentionSettings
from esperml.v1 import event_pb2, oona_pb2

TELEMETRY, EVENTS = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS
NOW_NS = 10**18
FOR_EVER = dict.fromkeys(("telemetry", "events"), RetentionLimits())


@pytest.fixture
async def log(tmp_path):
    log = SqliteLog(tmp_path / "log.sqlite")
    yield log
    await log.close()


@pytest.fixture
def fill(log, make_event):
    """Stores frames of some events each."""

    async def fill(kind: int, frames: int, count: int = 1, mark: str = "") -> None:
        sequence = await log.next_sequence("p")
        events = EncodedEvents.of([make_event(mark=mark) for _ in range(count)])
        appended = [log.append(kind, "p", sequence + frame * count, events) for frame in range(frames)]
        await asyncio.gather(*appended)

    return fill


def settings(**limits: RetentionLimits) -> RetentionSettings:
    return RetentionSettings(**{**FOR_EVER, **limits})


async def until_earliest(log: SqliteLog, earliest: int) -> None:
    changed = asyncio.Event()
    log.listen(lambda kind: changed.set())
    async with asyncio.timeout(10):
        while log.bounds(EVENTS).earliest < earliest:
            changed.clear()
            await changed.wait()


@st.composite
def logs(draw) -> tuple[list[FrameExtent], TopicBounds]:
    """A log's frames, some time ago or just now, and its extent."""
    offset = first = draw(st.integers(0, 100))
    time_ns = NOW_NS - draw(st.integers(0, 100)) * 10**9
    frames = []
    for count, size, pause_s in draw(
        st.lists(st.tuples(st.integers(1, 10), st.integers(1, 100), st.integers(0, 10)), max_size=20)
    ):
        frames.append(FrameExtent(offset, count, time_ns, size))
        offset += count
        time_ns = min(time_ns + pause_s * 10**9, NOW_NS)
    return frames, TopicBounds(first, offset, sum(frame.bytes for frame in frames))


@given(logs(), st.integers(0, 60), st.integers(0, 500), st.integers(0, 60))
def test_as_few_of_the_oldest_frames_leave_as_the_limits_allow(log_and_bounds, age_s, size, records):
    frames, bounds = log_and_bounds
    limits = RetentionLimits(age_s=age_s, bytes=size, records=records)

    def is_within(kept: list[FrameExtent]) -> bool:
        young = not age_s or all(frame.append_time_ns >= NOW_NS - age_s * 10**9 for frame in kept)
        small = len(kept) <= 1 or (
            (not size or sum(frame.bytes for frame in kept) <= size)
            and (not records or sum(frame.count for frame in kept) <= records)
        )
        return young and small

    fewest = next(index for index in range(len(frames) + 1) if is_within(frames[index:]))
    expected = frames[fewest].first_offset if fewest < len(frames) else bounds.next
    assert first_to_keep(frames, bounds, limits, NOW_NS) == expected
    # Told of the oldest frames only, it says as much as they tell.
    if first := frames[:3]:
        told = first_to_keep(first, bounds, limits, NOW_NS)
        assert told == min(expected, first[-1].first_offset + first[-1].count)


async def test_each_kind_has_limits_of_its_own(log, fill):
    await fill(TELEMETRY, 2000)
    await fill(EVENTS, 20, count=10)
    await Retention(log, settings(telemetry=RetentionLimits(records=7), events=RetentionLimits(records=35))).enforce()
    assert (log.bounds(TELEMETRY).earliest, log.bounds(TELEMETRY).next) == (1993, 2000)
    assert (log.bounds(EVENTS).earliest, log.bounds(EVENTS).next) == (170, 200)
    assert [frame.first_offset for frame in await log.read(EVENTS, 0, 10**6)] == [170, 180, 190]


async def test_without_limits_everything_stays(log, fill):
    await fill(EVENTS, 50)
    await Retention(log, settings()).enforce()
    assert log.bounds(EVENTS).earliest == 0


async def test_bytes_are_limited_and_the_last_frame_stays(log, fill):
    await fill(EVENTS, 100, mark="x" * 1000)
    size = log.bounds(EVENTS).bytes
    await Retention(log, settings(events=RetentionLimits(bytes=size // 2))).enforce()
    assert log.bounds(EVENTS).earliest == 50
    await Retention(log, settings(events=RetentionLimits(bytes=1))).enforce()
    assert log.bounds(EVENTS).earliest == 99


async def test_old_records_leave_while_the_bus_runs(log, fill):
    await fill(EVENTS, 1500)
    kept = settings(events=RetentionLimits(age_s=0.2))
    async with Retention(log, kept, interval_s=0.01).running():
        await until_earliest(log, 1500)
        await fill(EVENTS, 1)
        stored_s = time.monotonic()
        await until_earliest(log, 1501)
        assert time.monotonic() - stored_s > 0.15


async def test_space_that_records_leave_is_used_again(log, fill, tmp_path):
    keep = Retention(log, settings(events=RetentionLimits(records=100)))
    sizes = []
    for _ in range(8):
        await fill(EVENTS, 500, mark="x" * 1000)
        await keep.enforce()
        sizes.append((tmp_path / "log.sqlite").stat().st_size)
    assert sizes[-1] <= sizes[3]


async def test_a_reader_behind_the_floor_is_told_where_the_log_begins(bus, make_event):
    async with OonaClient(bus.target, client_id="p") as oona:
        await oona.publish(EVENTS, [make_event()])
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
        async with (
            oona.subscribe(EVENTS, start=start, credit=10) as reader,
            oona.subscribe(EVENTS, start=start, credit=10, group="g") as member,
        ):
            for subscription in (reader, member):
                async for _ in subscription:
                    break
            # Neither grants so much that it would get all of these before they leave.
            await asyncio.gather(*(oona.publish(EVENTS, [make_event()]) for _ in range(600)))
            await Retention(bus.log, settings(events=RetentionLimits(records=1))).enforce()
            assert bus.log.bounds(EVENTS).earliest == 600
            for subscription in (reader, member):
                with pytest.raises(BehindFloorError) as caught:
                    async for _ in subscription:
                        pass
                # Where the log began when it fell behind.
                assert 1 < caught.value.earliest_offset <= 600


async def test_topics_tell_their_limits(bus):
    await bus.stop()
    limits = RetentionLimits(age_s=1.5, bytes=1000)
    await bus.start(retention=settings(telemetry=limits, events=RetentionLimits(records=3)))
    async with OonaClient(bus.target, client_id="p") as oona:
        topics = {topic.kind: topic.retention for topic in await oona.topics()}
        assert (topics[TELEMETRY].age.ToMilliseconds(), topics[TELEMETRY].bytes) == (1500, 1000)
        assert not topics[TELEMETRY].HasField("records")
        assert topics[EVENTS] == oona_pb2.Retention(records=3)
        described = (await oona.describe(event_pb2.KIND_DECISIONS)).topic.retention
        assert described == oona_pb2.Retention() == retention(RetentionLimits())


async def test_a_log_that_cannot_delete_now_is_asked_again(log, fill, monkeypatch):
    await fill(EVENTS, 10)
    purge, refused = log.purge, asyncio.Event()

    async def purge_on_a_full_disk(kind: int, before: int) -> int:
        if refused.is_set():
            return await purge(kind, before)
        refused.set()
        raise LogUnavailableError("log.sqlite: cannot store: the disk is full")

    monkeypatch.setattr(log, "purge", purge_on_a_full_disk)
    async with Retention(log, settings(events=RetentionLimits(records=1)), interval_s=0.01).running():
        await until_earliest(log, 9)
    assert refused.is_set()
