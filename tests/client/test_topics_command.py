from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
from datetime import timedelta

import pytest
from click.testing import CliRunner

from esperml.cli import main
from esperml.cli.topics import _kept_in_words, _topic, topics
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
    assert lines[0].split() == ["topic", "earliest", "next", "records", "bytes", "keeps"]
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
    assert described["groups"] == [
        {"name": "readers", "committed_offset": 0, "lag": 4, "members": 1, "dead_letters": 0}
    ]
    assert text.splitlines()[-1].split() == ["readers", "0", "4", "1", "0"]
    assert "group" not in (await esper_topics("info", "telemetry")).output


def test_what_a_topic_keeps_is_said_in_words():
    assert _kept_in_words(oona_pb2.Retention()) == "everything"
    retention = oona_pb2.Retention(bytes=10_000, records=5)
    retention.age.FromTimedelta(timedelta(hours=36))
    assert _kept_in_words(retention) == "1 day, 12:00:00, 10,000 bytes, 5 records"
    assert _topic(oona_pb2.Topic(kind=EVENTS, retention=retention))["retention"] == {
        "age_s": 129_600,
        "bytes": 10_000,
        "records": 5,
    }


@pytest.mark.parametrize(
    "command",
    [
        ["topics", "--server", "TARGET", "list"],
        ["topics", "list", "--server", "TARGET"],
        ["topics", "--server", "nowhere:1", "list", "--server", "TARGET"],
        ["topics", "--server", "TARGET", "dead-letters", "list", "events", "g"],
        ["topics", "dead-letters", "--server", "TARGET", "list", "events", "g"],
        ["topics", "dead-letters", "list", "events", "g", "--server", "TARGET"],
    ],
)
def test_the_server_is_named_before_or_behind_a_command_and_goes_before_the_environment(command, monkeypatch):
    asked = []
    monkeypatch.setattr("esperml.client.calls.open_channel", lambda target, *_: asked.append(target) or open_nothing())
    result = CliRunner(env={"ESPER_TARGET": "elsewhere:1"}).invoke(main, command)
    assert asked == ["TARGET"]
    assert result.exit_code == 1


def open_nothing():
    raise OSError("not in this test")


async def test_tail_writes_records_as_json_lines(esper_topics, filled):
    output = (await esper_topics("tail", "events", "--from", "earliest", "--until", "4", "--run", "b")).output
    records = [json.loads(line) for line in output.splitlines()]
    assert [record["event"]["run_ended"]["error"] for record in records] == ["2", "4"]
    output = (await esper_topics("tail", "events", "--from", "3", "--until", "4")).output
    assert [json.loads(line)["offset"] for line in output.splitlines()] == ["3"]
    assert (await esper_topics("tail", "events", "--until", "0")).exit_code == 0
    output = (await esper_topics("tail", "events", "--from", "1h", "--count", "2")).output
    assert [json.loads(line).get("offset", "0") for line in output.splitlines()] == ["0", "1"]
    output = (await esper_topics("tail", "events", "--from", "earliest", "--no-follow")).output
    assert len(output.splitlines()) == 4


async def test_tail_ends_well_on_ctrl_c(bus, filled):
    command = ["topics", "--server", bus.target, "tail", "events", "--from", "earliest"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "esperml.cli", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(4):
        await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, errors = await process.communicate()
    assert (process.returncode, output, errors) == (0, b"", b"")


async def test_tail_ends_quietly_when_nobody_reads_any_more(bus, filled):
    command = [sys.executable, "-m", "esperml.cli", "topics", "--server", bus.target, "tail", "events"]
    script = f"{shlex.join(command)} --from earliest --no-follow | head -1"
    process = await asyncio.create_subprocess_shell(
        script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert json.loads(output)["event"]["run_id"] == "a"
    assert errors == b""


async def test_purge_deletes_only_when_told_twice(esper_topics, filled):
    assert (await esper_topics("purge", "events", "--before", "3")).exit_code == 1
    result = await esper_topics("purge", "events", "--before", "3", "--yes")
    assert result.output == "the first record that is still there has offset 2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nothing"], "unknown kind 'nothing'; kinds are telemetry, events"),
        (["tail", "events", "--from", "yesterday"], "'yesterday' is neither earliest, latest, an offset"),
        (["tail", "events", "--from", "17"], "subscribe.start.offset: 17 is beyond the end of the log, 0"),
        (["tail", "events", "--from", str(2**64)], "is neither earliest, latest, an offset"),
        (["tail", "events", "--from", "2026-13-01"], "nor 10m for that long ago"),
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
        assert f"no server answers at {bus.target}: start one with `esper serve`" in result.output
