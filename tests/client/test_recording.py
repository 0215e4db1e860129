from __future__ import annotations

import asyncio
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.writer import Writer
from mcap_protobuf.decoder import DecoderFactory

from esperml.client import (
    NotARecordingError,
    OonaClient,
    Recorder,
    StreamEndedError,
    TruncatedRecordingError,
    describe,
    new_event,
    read,
    record,
)
from esperml.v1 import event_pb2, health_pb2, oona_pb2

EVENTS, TELEMETRY = event_pb2.KIND_EVENTS, event_pb2.KIND_TELEMETRY
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.mcap"


@pytest.fixture
def long_recording(path, make_event):
    """A recording of several chunks; its path and the marks of its events."""
    marks = [f"{index} " + "".join(chr(97 + (index * step) % 26) for step in range(3000)) for index in range(600)]
    with Recorder(path) as recorder:
        for index, mark in enumerate(marks):
            recorder.write(EVENTS, make_event(mark=mark), log_time_ns=index)
    return path, marks


def read_all(path) -> tuple[list[str], Exception | None]:
    """Marks of what is given back, and how it ended."""
    marks = []
    try:
        for recorded in read(path):
            marks.append(recorded.event.run_ended.error)  # noqa: PERF401 - what came before an error counts
    except (TruncatedRecordingError, NotARecordingError) as error:
        return marks, error
    return marks, None


def test_what_was_written_is_read_back_in_order(path, make_event):
    telemetry = new_event("run-2", health_report=health_pb2.HealthReport(step=3))
    event = make_event("run-1", "x")
    with Recorder(path) as recorder:
        recorder.write(EVENTS, event, log_time_ns=5)
        recorder.write(TELEMETRY, telemetry, log_time_ns=7)
        recorder.write(EVENTS, event)
    first, second, third = read(path)
    assert (first.kind, first.event, first.log_time_ns) == (EVENTS, event, 5)
    assert (second.kind, second.event, second.log_time_ns) == (TELEMETRY, telemetry, 7)
    assert third.log_time_ns > 7
    info = describe(path)
    assert info.counts == {EVENTS: 2, TELEMETRY: 1}
    assert info.runs == {"run-1": 2, "run-2": 1}
    assert (info.first_ns, info.last_ns, info.truncated) == (5, third.log_time_ns, False)


def test_any_mcap_reader_can_decode_it(path, make_event):
    with Recorder(path) as recorder:
        recorder.write(EVENTS, make_event("run-1", "x"), log_time_ns=5)
    with path.open("rb") as file:
        [(schema, channel, message, decoded)] = make_reader(
            file, decoder_factories=[DecoderFactory()]
        ).iter_decoded_messages()
    assert schema is not None
    assert (schema.name, schema.encoding) == ("esperml.v1.Event", "protobuf")
    assert (channel.topic, channel.message_encoding) == ("/esperml/events", "protobuf")
    assert message.log_time == 5
    assert decoded.run_ended.error == "x"


def test_an_empty_recording_is_a_recording(path):
    with Recorder(path) as recorder:
        pass
    recorder.close()
    assert list(read(path)) == []
    assert describe(path).first_ns is None


def test_a_truncated_recording_gives_back_what_is_whole(long_recording):
    path, marks = long_recording
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found, error = read_all(path)
    assert isinstance(error, TruncatedRecordingError)
    assert error.whole == len(found)
    assert str(path) in str(error)
    assert found == marks[: len(found)]
    assert len(found) > len(marks) / 3
    info = describe(path)
    assert info.truncated
    assert info.counts[EVENTS] == len(found)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_wherever_it_is_cut_it_says_so(long_recording, share):
    path, marks = long_recording
    cut = path.with_name("cut.mcap")
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    found, error = read_all(cut)
    assert error is not None
    assert found == marks[: len(found)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), garbage=st.binary(min_size=8, max_size=64))
def test_a_damaged_recording_gives_back_what_is_right_or_says_so(long_recording, share, garbage):
    path, marks = long_recording
    data = bytearray(path.read_bytes())
    start = int((len(data) - len(garbage)) * share)
    data[start : start + len(garbage)] = garbage
    damaged = path.with_name("damaged.mcap")
    damaged.write_bytes(data)
    found, error = read_all(damaged)
    assert found == marks[: len(found)]
    assert error is not None or found == marks


@pytest.mark.parametrize("content", [b"", b"no recording at all"])
def test_what_is_no_recording_is_refused_by_name(path, content):
    path.write_bytes(content)
    with pytest.raises(NotARecordingError, match=r"run\.mcap"):
        list(read(path))


@pytest.mark.parametrize(
    ("schema", "topic", "problem"),
    [
        ("other.Type", "/esperml/events", "holds other.Type"),
        ("esperml.v1.Event", "/esperml/other", "unknown kind 'other'"),
    ],
)
def test_a_recording_of_something_else_is_refused_by_topic(path, schema, topic, problem):
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start()
        schema_id = writer.register_schema(name=schema, encoding="protobuf", data=b"")
        channel = writer.register_channel(topic=topic, message_encoding="protobuf", schema_id=schema_id)
        writer.add_message(channel, log_time=0, data=b"", publish_time=0)
        writer.finish()
    with pytest.raises(NotARecordingError, match=problem):
        list(read(path))


def test_a_message_that_is_no_event_is_refused(path, make_event, monkeypatch):
    with Recorder(path) as recorder:
        recorder.write(EVENTS, make_event())
        [channel] = recorder._channels.values()
        recorder._writer.add_message(channel, log_time=0, data=struct.pack("<I", 0xFFFFFFFF), publish_time=0)
    found, error = read_all(path)
    assert len(found) == 1
    assert isinstance(error, NotARecordingError)
    assert "event 1 cannot be decoded" in str(error)


async def test_what_is_stored_is_recorded_from_the_bus(bus, path, make_event):
    async with OonaClient(bus.target, client_id="recording") as oona:
        await oona.publish(EVENTS, [make_event("a", "0"), make_event("b", "1")])
        await oona.publish(TELEMETRY, [new_event("a", health_report=health_pb2.HealthReport())])
        info = await record(oona, path, run_ids=["a"])
    assert info.counts == {EVENTS: 1, TELEMETRY: 1}
    assert info.runs == {"a": 2}


async def test_a_live_recording_holds_everything_up_to_the_moment_it_is_stopped(bus, path, make_event):
    async with OonaClient(bus.target, client_id="recording") as oona:
        until = asyncio.Event()
        recording = asyncio.create_task(record(oona, path, kinds=[EVENTS], start=EARLIEST, until=until))
        for number in range(50):
            await oona.publish(EVENTS, [make_event(mark=str(number))])
        until.set()
        info = await recording
    assert info.counts == {EVENTS: 50}
    assert [recorded.event.run_ended.error for recorded in read(path)] == [str(number) for number in range(50)]


async def test_a_recording_that_cannot_go_on_says_why(bus, path):
    async with OonaClient(bus.target, client_id="x" * 200) as oona:
        with pytest.raises(StreamEndedError, match=r"open\.client_id"):
            await record(oona, path, kinds=[EVENTS], until=asyncio.Event())
    assert describe(path).counts == {}


def test_a_recording_on_a_full_disk_fails_and_lets_go_of_its_file():
    recorder = Recorder("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        recorder.close()
    recorder.close()
