from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner

from esperml.cli.topics import topics
from esperml.v1 import event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS


@pytest.fixture
def esper_topics(bus):
    """Runs the command beside the server's loop, and gives back its exit code and output."""

    async def run(*arguments: str):
        result = await asyncio.to_thread(CliRunner().invoke, topics, ["--server", bus.target, *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
async def filled(bus, make_event):
    """Four events of two runs in two frames."""
    for first in (1, 3):
        events = [make_event("a", str(first)), make_event("b", str(first + 1))]
        await bus.broker.publish("p", oona_pb2.Publish(kind=EVENTS, first_sequence=first, events=events))


async def test_list_shows_every_topic(esper_topics, filled):
    lines = (await esper_topics("list")).output.splitlines()
    assert lines[0].split() == ["topic", "earliest", "next", "bytes"]
    assert [line.split()[:3] for line in lines[1:3]] == [["telemetry", "0", "0"], ["events", "0", "4"]]
    objects = [json.loads(line) for line in (await esper_topics("list", "--json")).output.splitlines()]
    assert [item["next_offset"] for item in objects if item["topic"] == "events"] == [4]


async def test_info_shows_groups_and_their_lag(bus, esper_topics, filled):
    async def emit(_response) -> None:
        return

    request = oona_pb2.Subscribe(subscription_id=1, kind=EVENTS, group="readers")
    subscription = await bus.broker.subscribe(request, emit)
    described = json.loads((await esper_topics("info", "events", "--json")).output)
    text = (await esper_topics("info", "events")).output
    subscription.close()
    assert described["groups"] == [{"name": "readers", "committed_offset": 0, "lag": 4, "members": 1}]
    assert text.splitlines()[-1].split() == ["readers", "0", "4", "1"]
    assert "group" not in (await esper_topics("info", "telemetry")).output


async def test_tail_writes_records_as_json_lines(esper_topics, filled):
    output = (await esper_topics("tail", "events", "--from", "earliest", "--until", "4", "--run", "b")).output
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [record["event"]["run_ended"]["error"] for record in records] == ["2", "4"]
    output = (await esper_topics("tail", "events", "--from", "3", "--until", "4")).output
    assert [json.loads(line)["offset"] for line in output.splitlines() if line.startswith("{")] == ["3"]
    assert (await esper_topics("tail", "events", "--until", "0")).exit_code == 0


async def test_purge_deletes_only_when_told_twice(esper_topics, filled):
    assert (await esper_topics("purge", "events", "--before", "3")).exit_code == 1
    result = await esper_topics("purge", "events", "--before", "3", "--yes")
    assert result.output == "the first record that is still there has offset 2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nothing"], "unknown kind 'nothing'; kinds are telemetry, events"),
        (["tail", "events", "--from", "yesterday"], "'yesterday' is neither earliest, latest nor an offset"),
        (["tail", "events", "--from", "17"], "subscribe.start.offset: 17 is beyond the end of the log, 0"),
        (["tail", "events", "--from", str(2**64)], "is neither earliest, latest nor an offset"),
        (["tail", "events", "--until", str(2**64)], "is not in the range"),
        (["purge", "events", "--yes", "--before", str(2**64)], "is not in the range"),
    ],
)
async def test_what_cannot_be_done_is_said_in_a_line(esper_topics, arguments, message):
    result = await esper_topics(*arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


async def test_a_server_that_is_not_there_is_said_at_once(bus, esper_topics):
    await bus.stop()
    for arguments in (["list"], ["tail", "events"]):
        result = await esper_topics(*arguments)
        assert result.exit_code == 1
        assert "Error" in result.output
