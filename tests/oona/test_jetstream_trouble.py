"""What a gateway says and does when its cluster is tampered with, or when a task of it fails as nobody foresaw."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
import structlog

from esperml.oona.log import EncodedEvents, GroupProgress, LogDamagedError, LogUnavailableError
from esperml.oona.ranges import RangeSet
from esperml.v1 import event_pb2

nats = pytest.importorskip("nats")

EVENTS = event_pb2.KIND_EVENTS
ONE = EncodedEvents(["a"], [b"x"])
STATE = {"next": 0, "next_bytes": 0, "append_time_ns": 0, "earliest": 0, "earliest_bytes": 0, "batch": "b"}


@pytest.fixture
async def log(jetstream_settings):
    from esperml.oona.jetstream.log import JetStreamLog

    cluster = jetstream_settings.jetstream.model_copy(update={"timeout_s": 4.0})
    log = await JetStreamLog.open(jetstream_settings.model_copy(update={"jetstream": cluster}))
    yield log
    await log.close()


@pytest.fixture
async def stranger(nats_server, jetstream_settings):
    """Another client of the cluster, which writes what it likes; it knows the names' prefix."""
    client = await nats.connect(nats_server.url)
    client.prefix = jetstream_settings.jetstream.prefix
    yield client
    await client.close()


async def until(condition, within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("state", [b"garbage", json.dumps(STATE | {"next": "many"}).encode()])
async def test_a_state_that_no_bus_wrote_is_told_of_and_publishing_goes_on(log, stranger, state):
    assert (await log.append(EVENTS, "p", 1, ONE)).first_offset == 0
    with structlog.testing.capture_logs() as logs:
        await stranger.jetstream().publish(f"{stranger.prefix}.events.state.publisher.x", state)
        assert (await log.append(EVENTS, "p", 2, ONE)).first_offset == 1
        assert (await log.append(EVENTS, "p", 3, ONE)).first_offset == 2
    told = [entry for entry in logs if "was not written by a bus" in str(entry.get("detail", entry.get("problem")))]
    assert told
    assert told[0]["log_level"] == "error"


@pytest.mark.parametrize(
    ("subject", "body"),
    [
        ("2.g.progress", b"garbage"),
        ("2.g.progress", b'{"gateway": "x", "save": "y", "committed": 0, "done": [[1]], "attempts": []}'),
        ("2.g.owners", b"[]"),
        ("2.g.letter.1", b"{}"),
        ("2.g.letter.one", b""),
        ("two.g.progress", b"{}"),
        ("2.g", b""),
    ],
)
async def test_what_no_bus_wrote_of_a_group_is_told_of_and_the_group_goes_on(log, stranger, subject, body):
    await log.save_group(EVENTS, "g", GroupProgress(1, RangeSet()))
    await stranger.jetstream().publish(f"{stranger.prefix}._group.{subject}", body)
    with contextlib.suppress(LogDamagedError):
        await log.groups_store.catch_up()
        # The look that every gateway takes once in a while was faster.
        assert "a bus" in log.problem
    await log.save_group(EVENTS, "g", GroupProgress(2, RangeSet()))
    assert log.groups()[EVENTS, "g"].committed == 2


async def test_a_stream_that_was_deleted_is_named_in_health_before_anybody_publishes(log, stranger):
    assert log.problem == ""
    await stranger.jetstream().delete_stream(f"{stranger.prefix}_events".upper())
    asked = log.append(EVENTS, "p", 1, ONE)
    await until(lambda: "_EVENTS" in log.problem)
    with pytest.raises(LogUnavailableError, match="_EVENTS: stream not found"):
        await asked


async def test_a_stream_that_was_made_anew_is_named_with_what_to_do(log, stranger):
    await log.append(EVENTS, "p", 1, ONE)
    jetstream, name = stranger.jetstream(), f"{stranger.prefix}_events".upper()
    config = (await jetstream.stream_info(name)).config
    await jetstream.delete_stream(name)
    await log.link.api(
        f"STREAM.CREATE.{name}",
        {
            "name": name,
            "subjects": config.subjects,
            "storage": "file",
            "allow_direct": True,
            "allow_atomic": True,
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
        },
    )
    with pytest.raises(LogUnavailableError, match="start this server again"):
        await log.append(EVENTS, "p", 2, ONE)
    await until(lambda: "made anew" in log.problem)


async def test_a_task_that_fails_unforeseen_is_logged_with_its_name_seen_in_health_and_begins_anew(log, monkeypatch):
    stream = log._streams[EVENTS]

    async def fail_once(*_: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(log.link, "store_batch", fail_once)
    with structlog.testing.capture_logs() as logs:
        assert (await log.append(EVENTS, "p", 1, ONE)).first_offset == 0
    [failed] = [entry for entry in logs if entry["event"] == "task_failed"]
    assert (failed["task"], failed["log_level"]) == ("oona-writer-events", "error")
    assert isinstance(failed["exc_info"], ZeroDivisionError)
    assert log.problem == "oona-writer-events failed: ZeroDivisionError()"
    assert stream.state.next == 1


async def test_a_group_whose_save_fails_unforeseen_is_told_so_and_can_be_saved_again(log, monkeypatch):
    async def fail_once(*_: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(log.link, "store", fail_once)
    with structlog.testing.capture_logs() as logs:
        with pytest.raises(LogUnavailableError, match="group 'g' was not saved"):
            await log.save_group(EVENTS, "g", GroupProgress(1, RangeSet()))
        await until(lambda: any(entry["event"] == "task_failed" for entry in logs))
    await log.save_group(EVENTS, "g", GroupProgress(1, RangeSet()))
    assert log.groups()[EVENTS, "g"].committed == 1


async def test_a_message_that_a_gateway_cannot_take_is_logged(log, stranger):
    async def fail(_: object) -> None:
        raise ZeroDivisionError

    with structlog.testing.capture_logs() as logs:
        subscription = await log.link.subscribe(f"{stranger.prefix}.broken", fail)
        await log.groups_store.catch_up()  # What answers this has been told of the subscription.
        await stranger.publish(f"{stranger.prefix}.broken", b"")
        await stranger.flush()
        await until(lambda: any(entry["event"] == "message_not_taken" for entry in logs))
    await log.link.unsubscribe(subscription)
    await stranger.publish(f"{stranger.prefix}._notice.events", b'{"base": "x", "last": 1, "states": []}')
    assert (await log.append(EVENTS, "p", 1, ONE)).first_offset == 0
