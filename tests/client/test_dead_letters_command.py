"""``esper topics dead-letters`` and the client's calls behind it, on a real bus."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner

from esperml.cli import main
from esperml.client import CallFailedError, OonaClient
from esperml.v1 import event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture
def dead_letters(bus):
    """Runs the command beside the server's loop, and gives back its exit code and output."""

    async def run(*arguments: str):
        command = ["topics", "dead-letters", *arguments, "--server", bus.target]
        result = await asyncio.to_thread(CliRunner().invoke, main, command)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


async def give_up_on(oona: OonaClient, count: int) -> None:
    """Let group ``g`` give back every record as often as it takes."""
    redelivery = oona_pb2.Redelivery(max_attempts=2)
    redelivery.min_delay.FromMilliseconds(1)
    redelivery.max_delay.FromMilliseconds(1)
    async with oona.subscribe(EVENTS, group="g", start=EARLIEST, redelivery=redelivery) as records:
        for _ in range(2 * count):
            await records.nack(await anext(records))
    async with asyncio.timeout(10):
        while sum(group.dead_letters for group in (await oona.describe(EVENTS)).groups) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def oona(bus, make_event):
    """A client of a bus on which group ``g`` has given up on three records of runs a, b and c."""
    async with OonaClient(bus.target, client_id="test") as oona:
        await oona.publish(EVENTS, [make_event(run, run) for run in "abc"])
        await give_up_on(oona, 3)
        yield oona


async def test_what_a_group_gave_up_on_is_listed_and_shown(oona, dead_letters):
    lines = (await dead_letters("list", "events", "g")).output.splitlines()
    assert lines[0].split() == ["offset", "attempts", "given", "up", "because", "run", "payload"]
    rows = [line.split() for line in lines[1:]]
    assert [(row[0], row[1], row[4], row[5], row[6]) for row in rows] == [
        (str(offset), "2", "nacked", run, "run_ended") for offset, run in enumerate("abc")
    ]
    shown = json.loads((await dead_letters("show", "events", "g", "1")).output)
    assert shown["record"]["event"]["run_ended"]["error"] == "b"
    assert shown["reason"] == "DEAD_LETTER_REASON_NACKED"
    result = await dead_letters("list", "events", "g", "--from", "1", "--count", "1", "--json")
    assert [json.loads(line)["record"]["offset"] for line in result.stdout.splitlines()] == ["1"]
    assert (
        "there are more: --from 2" in (await dead_letters("list", "events", "g", "--from", "1", "--count", "1")).stderr
    )


async def test_a_group_without_dead_letters_is_said_to_have_none(bus, dead_letters, make_event):
    async with OonaClient(bus.target, client_id="test") as oona:
        await oona.publish(EVENTS, [make_event()])
        async with oona.subscribe(EVENTS, group="well", start=EARLIEST) as records:
            await records.ack(await anext(records))
    assert (await dead_letters("list", "events", "well")).output == "group 'well' has no dead letters here\n"
    result = await dead_letters("show", "events", "well", "7")
    assert result.exit_code == 1
    assert "has no dead letter at offset 7" in result.output


async def test_replayed_ones_come_again_and_are_gone_when_acknowledged(oona, dead_letters):
    assert (await dead_letters("replay", "events", "g", "1")).output == "1 given back to group 'g'\n"
    async with oona.subscribe(EVENTS, group="g") as records:
        record = await anext(records)
        assert (record.offset, record.delivery_attempt) == (1, 1)
        assert [letter.replaying async for letter in oona.dead_letters(EVENTS, "g")] == [False, True, False]
        await records.ack(record)
    assert [letter.record.offset async for letter in oona.dead_letters(EVENTS, "g")] == [0, 2]
    assert (await dead_letters("replay", "events", "g", "--all")).output == "2 given back to group 'g'\n"


async def test_purging_asks_first(oona, dead_letters):
    assert (await dead_letters("purge", "events", "g", "--all")).exit_code == 1
    assert (await dead_letters("purge", "events", "g", "0", "--yes")).output == "1 deleted\n"
    assert (await dead_letters("purge", "events", "g", "--all", "--yes")).output == "2 deleted\n"
    assert [letter async for letter in oona.dead_letters(EVENTS, "g")] == []


async def test_many_are_read_page_by_page(bus, make_event):
    async with OonaClient(bus.target, client_id="test") as oona:
        await oona.publish(EVENTS, [make_event(f"run-{number}") for number in range(250)])
        await give_up_on(oona, 250)
        found = [letter.record.offset async for letter in oona.dead_letters(EVENTS, "g", from_offset=10)]
    assert found == list(range(10, 250))


async def test_what_cannot_be_done_is_said(bus, dead_letters):
    for arguments in (["replay", "events", "g"], ["purge", "events", "g", "1", "--all"]):
        result = await dead_letters(*arguments)
        assert result.exit_code == 2
        assert "Give either OFFSETS or --all." in result.output
    oona = OonaClient(bus.target, client_id="test")
    for call in (oona.replay_dead_letters, oona.purge_dead_letters):
        with pytest.raises(CallFailedError):
            await call(EVENTS, "")
