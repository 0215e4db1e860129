"""Names and records of the engine on JetStream: what goes in comes out, and what is damaged is told."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nats")

from esperml.oona.jetstream.connecting import without_passwords
from esperml.oona.jetstream.groups import decode_letter, encode_letter
from esperml.oona.jetstream.link import Stored
from esperml.oona.jetstream.names import TopicNames, from_token, to_token
from esperml.oona.jetstream.records import (
    FRAME_HEADER,
    FramePart,
    Joiner,
    PublisherState,
    StateRecord,
    TopicState,
    split,
)
from esperml.oona.jetstream.topic import decode_notice
from esperml.oona.log import DeadLetter, EncodedEvents, LogDamagedError
from esperml.oona.wire import join_batch
from esperml.v1 import event_pb2, oona_pb2

NAMES = TopicNames.of("oona", event_pb2.KIND_EVENTS)


@given(st.text())
def test_any_id_is_one_token_and_comes_back(text):
    token = to_token(text)
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", token)
    assert from_token(token) == text
    assert NAMES.publisher_of(NAMES.publisher(text)) == text


def test_no_run_shares_the_subject_of_frames_of_many():
    assert NAMES.run(None) == "oona.events.run.=mixed"
    assert NAMES.run("=mixed") != NAMES.run(None)
    assert NAMES.publisher_of(NAMES.floor) is None


def stored(parts, first_offset: int, count: int) -> list[Stored]:
    import zlib

    return [
        Stored(
            number + 1,
            NAMES.run(run_id),
            data,
            {FRAME_HEADER: FramePart(first_offset, count, 7, 0, zlib.crc32(data), number, len(parts)).header()},
        )
        for number, (run_id, data) in enumerate(parts)
    ]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=60)), min_size=1, max_size=60),
    st.integers(1, 200),
    st.data(),
)
def test_a_frame_is_cut_into_messages_and_put_together_again(events, most, data):
    skip = data.draw(st.integers(0, len(events) - 1))
    encoded = EncodedEvents([run for run, _ in events], [event for _, event in events])
    parts = split(encoded, skip, most)
    assert all(len(part.data) <= most for part in parts)
    joiner = Joiner(NAMES.stream)
    for message in stored(parts, 5, len(events) - skip):
        joiner.add(message)
    [frame] = joiner.frames
    assert (frame.first_offset, frame.count) == (5, len(events) - skip)
    assert frame.batch == join_batch([event for _, event in events[skip:]])
    assert joiner.next_sequence == len(parts) + 1


def test_a_frame_of_many_short_stretches_goes_under_no_run():
    encoded = EncodedEvents(["a", "b"] * 40, [b"x"] * 80)
    assert {part.run_id for part in split(encoded, 0, 1000)} == {None}


def test_reading_that_begins_within_a_frame_begins_with_the_next():
    parts = split(EncodedEvents(["a"], [bytes(100)]), 0, 40)
    joiner = Joiner(NAMES.stream)
    for message in stored(parts, 5, 1)[1:]:
        joiner.add(message)
    assert joiner.frames == []


def test_damage_is_told():
    parts = split(EncodedEvents(["a"], [bytes(100)]), 0, 40)
    first, _, third = stored(parts, 5, 1)
    with pytest.raises(LogDamagedError, match="offset 5"):
        Joiner(NAMES.stream).add(Stored(1, first.subject, b"other", first.headers))
    joiner = Joiner(NAMES.stream)
    joiner.add(first)
    with pytest.raises(LogDamagedError, match="offset 5"):
        joiner.add(third)
    with pytest.raises(LogDamagedError, match="message 1"):
        Joiner(NAMES.stream).add(Stored(1, "x", b"", {}))
    with pytest.raises(LogDamagedError):
        StateRecord.decode("x", b"{}")
    with pytest.raises(LogDamagedError):
        decode_letter("x", b"[]")
    with pytest.raises(ValueError):
        decode_notice(b"{}")


def test_states_and_dead_letters_come_back():
    topic = TopicState(10, 900, 5, 2, 100)
    for record in (StateRecord(topic, "b"), StateRecord(topic, "b", PublisherState(3, "g"))):
        assert StateRecord.decode("x", record.encode()) == record
    letter = DeadLetter(3, 4, b"\x00\xff", 2, 5, oona_pb2.DEAD_LETTER_REASON_NACKED, replaying=True)
    assert decode_letter("x", encode_letter(letter)) == letter


def test_errors_show_addresses_without_passwords():
    servers = ["nats://ann:secret@one:4222", "tls://two:4222", "token@three"]
    assert without_passwords(servers) == "nats://one:4222, tls://two:4222, three"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
STATE = json.loads(StateRecord(TopicState(10, 900, 5, 2, 100), "b", PublisherState(3, "g")).encode())
LETTER = json.loads(encode_letter(DeadLetter(3, 4, b"\x00\xff", 2, 5, oona_pb2.DEAD_LETTER_REASON_NACKED)))
NOTICE = {"base": 1, "last": 2, "states": [["x", "{}"]]}


@given(JSON, st.sampled_from(sorted(STATE)), JSON)
def test_whatever_json_a_stranger_writes_is_taken_for_what_it_is_or_refused(body, field, value):
    def refused_or(decode, body, error):
        with contextlib.suppress(error):
            return decode(json.dumps(body).encode())
        return None

    for state in (body, STATE | {field: value}):
        record = refused_or(lambda data: StateRecord.decode("x", data), state, LogDamagedError)
        if record is not None:
            assert StateRecord.decode("x", record.encode()) == record
    for letter in (body, LETTER | {sorted(LETTER)[len(field) % len(LETTER)]: value}):
        found = refused_or(lambda data: decode_letter("x", data), letter, LogDamagedError)
        if found is not None:
            assert isinstance(found.offset, int)
    for notice in (body, NOTICE | {"states": value}, NOTICE | {"base": value}):
        told = refused_or(decode_notice, notice, ValueError)
        if told is not None:
            assert isinstance(told[0], int)
