"""``esper record`` and ``esper replay`` on a real bus, and what lies behind them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esperml.cli import main
from esperml.client import (
    AmbiguousRunError,
    NotARecordingError,
    OonaClient,
    Recorder,
    TruncatedRecordingError,
    describe,
    new_event,
    read,
)
from esperml.client.recording import record
from esperml.client.replaying import Replayed, Selection, replay, survey
from esperml.v1 import decision_pb2, event_pb2, experience_pb2, graph_pb2, health_pb2, oona_pb2, run_pb2

EVENTS, TELEMETRY = event_pb2.KIND_EVENTS, event_pb2.KIND_TELEMETRY
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
MS = 1_000_000


@pytest.fixture
def esper(bus):
    """Runs a command beside the server's loop; gives back its exit code and output."""

    async def run(*arguments: object) -> Result:
        command = [*map(str, arguments), "--server", bus.target]
        result = await asyncio.to_thread(CliRunner().invoke, main, command)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.mcap"


@pytest.fixture
def write(path, make_event):
    """Writes a recording of events and telemetry of two runs, alternating, a millisecond apart."""

    def write(count: int = 40) -> list[str]:
        with Recorder(path) as recorder:
            for number in range(count):
                run = "ab"[number % 2]
                if number % 4 < 2:
                    recorder.write(EVENTS, make_event(run, str(number)), log_time_ns=number * MS)
                else:
                    report = new_event(run, health_report=health_pb2.HealthReport(step=number))
                    recorder.write(TELEMETRY, report, log_time_ns=number * MS)
        return [str(number) for number in range(count) if number % 4 < 2]

    return write


async def stored(bus, kind: event_pb2.Kind.ValueType) -> list[event_pb2.Event]:
    async with OonaClient(bus.target, client_id="look") as oona:
        end = (await oona.describe(kind)).topic.next_offset
        async with oona.subscribe(kind, start=EARLIEST, end_offset=end) as subscription:
            return [record.event async for record in subscription]


def marks(events) -> list[str]:
    return [event.run_ended.error for event in events]


# Recording.


async def test_what_is_stored_is_recorded_and_summed_up(bus, esper, path, make_event):
    async with OonaClient(bus.target, client_id="p") as oona:
        await oona.publish(EVENTS, [make_event("a", "1"), make_event("b", "2")])
        await oona.publish(TELEMETRY, [new_event("a", health_report=health_pb2.HealthReport())])
    result = await esper("record", path, "--from", "earliest", "--for", "0s", "--json")
    assert json.loads(result.stdout) == {
        "file": str(path),
        "events": 3,
        "kinds": {"telemetry": 1, "events": 2},
        "runs": {"a": 2, "b": 1},
    }
    result = await esper("record", path, "--overwrite", "--kind", "events", "--run", "b", "--from", "1h", "--for", "0s")
    assert result.stdout == f"{path}: 1 events (1 events) of 1 run\n"
    assert marks(recorded.event for recorded in read(path)) == ["2"]


async def test_recording_ends_when_nothing_has_come_for_a_while(bus, esper, path, make_event):
    recording = asyncio.create_task(esper("record", path, "--until-idle", "600ms", "--kind", "events"))
    async with OonaClient(bus.target, client_id="p") as oona:
        number = 0
        while not recording.done() and number < 40:
            await oona.publish(EVENTS, [make_event("a", str(number))])
            number += 1
            await asyncio.sleep(0.05)
    assert (await recording).exit_code == 0
    found = [int(mark) for mark in marks(recorded.event for recorded in read(path))]
    assert len(found) > 1
    assert found == list(range(found[0], 40))


async def until_written(path, count: int) -> None:
    """Wait until so many events can be read in a recording that goes on."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(FileNotFoundError, NotARecordingError):
                if describe(path).counts.total() >= count:
                    return
            await asyncio.sleep(0.02)


def start_recording(bus, path) -> subprocess.Popen[str]:
    command = ["record", str(path), "--kind", "events", "--from", "earliest", "--server", bus.target]
    return subprocess.Popen(
        [sys.executable, "-m", "esperml.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


async def test_a_recording_of_a_quiet_run_is_whole_though_what_it_passed_over_was_purged(bus, path, make_event):
    until, began = asyncio.Event(), asyncio.Event()
    async with OonaClient(bus.target, client_id="a") as oona, asyncio.timeout(30):
        recording = asyncio.create_task(
            record(oona, path, kinds=[EVENTS], run_ids=["quiet"], until=until, on_event=lambda *_: began.set())
        )
        while not began.is_set():
            await oona.publish(EVENTS, [make_event("quiet")])
        others = await oona.publish(EVENTS, [make_event("other")])
        end = others.first_offset + 1
        [subscription] = oona._subscriptions.values()
        assert await oona.purge(EVENTS, end) == end
        while subscription.next_offset < end:  # noqa: ASYNC110 - it is told in the background
            await asyncio.sleep(0)
        until.set()
        info = await recording
    assert info.counts[EVENTS] >= 1
    assert set(info.runs) == {"quiet"}


async def test_ctrl_c_ends_a_recording_well(bus, path, make_event):
    process = start_recording(bus, path)
    async with OonaClient(bus.target, client_id="p") as oona:
        await oona.publish(EVENTS, [make_event("a", str(number)) for number in range(100)])
        await until_written(path, 100)
        await oona.publish(EVENTS, [make_event("a", "last")])
    process.send_signal(signal.SIGINT)
    output, errors = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 0, errors
    assert output == f"{path}: 101 events (101 events) of 1 run\n"
    assert not describe(path).truncated


async def test_a_recorder_that_is_killed_leaves_what_it_had_written_out(bus, path, make_event):
    process = start_recording(bus, path)
    async with OonaClient(bus.target, client_id="p") as oona:
        await oona.publish(EVENTS, [make_event("a", str(number)) for number in range(7)])
    await until_written(path, 7)
    process.kill()
    await asyncio.to_thread(process.communicate)
    info = describe(path)
    assert (info.counts[EVENTS], info.truncated) == (7, True)


async def test_a_file_that_is_there_is_not_written_over_by_accident(bus, esper, path):
    path.write_text("mine")
    result = await esper("record", path, "--for", "0s")
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert path.read_text() == "mine"


async def test_recording_what_cannot_be_read_says_why_and_leaves_no_file(bus, esper, path):
    result = await esper("record", path, "--kind", "events", "--from", "7", "--for", "0s")
    assert result.exit_code == 1
    assert "7 is beyond the end of the log" in result.stderr
    assert not path.exists()
    result = await esper("record", path, "--from", "7")
    assert result.exit_code == 2
    assert "single --kind" in result.stderr
    await bus.stop()
    assert (await esper("record", path)).exit_code == 1
    assert not path.exists()


# Replaying.


async def test_a_replay_puts_every_event_back_in_order(bus, esper, path, write):
    expected = write()
    result = await esper("replay", path, "--speed", "max")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("40 events of a, b in ")
    assert marks(await stored(bus, EVENTS)) == expected
    assert [event.health_report.step for event in await stored(bus, TELEMETRY)] == [n for n in range(40) if n % 4 > 1]


async def test_the_same_replay_stores_nothing_twice_and_another_does(bus, esper, path, write):
    write()
    for speed, before in (("max", 0), ("max", 40), ("1000", 40)):
        done = json.loads((await esper("replay", path, "--speed", speed, "--json")).stdout)
        assert (done["events"], done["stored_before"], done["runs"]) == (40, before, {"a": 20, "b": 20})
    # All runs by name are all runs.
    done = json.loads((await esper("replay", path, "--speed", "max", "--run", "b", "--run", "a", "--json")).stdout)
    assert done["stored_before"] == 40
    assert len(await stored(bus, EVENTS)) == 20
    again = await esper("replay", path, "--speed", "max", "--run-prefix", "again-")
    assert "were there already" not in again.stdout, again.output
    assert [event.run_id for event in await stored(bus, EVENTS)][20:] == ["again-a", "again-b"] * 10


async def test_a_replay_that_was_cut_off_goes_on_where_it_was(bus, path, write):
    expected = write(4000)
    halfway = asyncio.Event()
    counted = 0

    def count(number: int) -> None:
        nonlocal counted
        counted += number
        if counted > 1000:
            halfway.set()

    replaying = asyncio.create_task(replay(bus.target, path, speed=None, on_stored=count))
    await halfway.wait()
    replaying.cancel()
    await asyncio.wait([replaying])
    done = await replay(bus.target, path, speed=None)
    assert 1000 < done.stored_before < 4000
    assert marks(await stored(bus, EVENTS)) == expected
    assert len({event.event_id for event in await stored(bus, TELEMETRY)}) == 2000


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.sets(st.sampled_from([EVENTS, TELEMETRY]), min_size=1), run=st.sampled_from(["a", "b"]))
def test_what_says_the_same_is_the_same_replay_and_nothing_else_is(path, write, kinds, run):
    write()
    everything = survey(path, Selection())
    chosen = survey(path, Selection(frozenset(kinds), frozenset({run})))
    renamed = survey(path, Selection(frozenset(kinds), frozenset({run}), as_run="c"))
    assert chosen == survey(path, Selection(frozenset(kinds), frozenset({run, "not there"})))
    ids = [client_id for found in (everything, chosen, renamed) for client_id in found.client_ids.values()]
    assert len(set(ids)) == len(ids)
    assert all(len(client_id) <= 128 for client_id in ids)


async def test_a_replay_keeps_the_pace_of_the_recording(bus, path, make_event):
    with Recorder(path) as recorder:
        for number in range(5):
            recorder.write(EVENTS, make_event(mark=str(number)), log_time_ns=1_000_000 * MS + number * 100 * MS)
    began = time.monotonic()
    await replay(bus.target, path, speed=2)
    assert time.monotonic() - began >= 0.2
    async with (
        OonaClient(bus.target, client_id="look") as oona,
        oona.subscribe(EVENTS, start=EARLIEST, end_offset=5) as subscription,
    ):
        times = [record.append_time.ToNanoseconds() async for record in subscription]
    assert times[-1] - times[0] >= 150 * MS


async def test_kinds_that_lie_one_behind_the_other_are_replayed_by_time(bus, path, make_event):
    """As in a recording from the earliest, which reads one log faster than another."""
    with Recorder(path) as recorder:
        for number in range(1, 3000):
            report = new_event("a", health_report=health_pb2.HealthReport(step=number))
            recorder.write(TELEMETRY, report, log_time_ns=number)
        recorder.write(EVENTS, make_event("a", "first"), log_time_ns=0)
    seen: list[tuple[int, int]] = []

    async def watch(oona: OonaClient) -> None:
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=1) as subscription:
            await anext(subscription)
            seen.append((await oona.describe(TELEMETRY)).topic.next_offset)

    async with OonaClient(bus.target, client_id="look") as oona:
        watching = asyncio.create_task(watch(oona))
        await replay(bus.target, path, speed=None)
        await watching
    assert seen[0] < 2999


async def test_a_run_is_replayed_under_another_id_wherever_it_is_named(bus, path):
    decision = decision_pb2.AdaptationDecision(run_id="a")
    state = graph_pb2.ModelGraphState(run_id="a")
    experience = experience_pb2.TrainingExperience(episode_id="a", state=state, next_state=state, decision=decision)
    with Recorder(path) as recorder:
        recorder.write(EVENTS, new_event("a", run_started=run_pb2.RunStarted(paired_run="b")))
        recorder.write(event_pb2.KIND_DECISIONS, new_event("a", decision=decision))
        recorder.write(event_pb2.KIND_EXPERIENCE, new_event("a", experience=experience))
        recorder.write(EVENTS, new_event("b", run_started=run_pb2.RunStarted()))
    done = await replay(bus.target, path, Selection(run_prefix="x-"), speed=None)
    assert done == Replayed(4, 0, {"x-a": 3, "x-b": 1}, truncated=False)
    first, second = await stored(bus, EVENTS)
    assert (first.run_id, first.run_started.paired_run, second.run_id) == ("x-a", "x-b", "x-b")
    [told] = await stored(bus, event_pb2.KIND_DECISIONS)
    assert told.decision.run_id == "x-a"
    [lived] = await stored(bus, event_pb2.KIND_EXPERIENCE)
    assert {
        lived.run_id,
        lived.experience.episode_id,
        lived.experience.state.run_id,
        lived.experience.next_state.run_id,
        lived.experience.decision.run_id,
    } == {"x-a"}
    # A twin that is not replayed keeps its name.
    await replay(bus.target, path, Selection(run_ids=frozenset({"a"}), as_run="c"), speed=None)
    alone = (await stored(bus, EVENTS))[-1]
    assert (alone.run_id, alone.run_started.paired_run) == ("c", "b")


async def test_a_truncated_recording_is_replayed_up_to_its_end_and_says_so(bus, esper, path, write):
    expected = write(4000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = await esper("replay", path, "--speed", "max")
    assert result.exit_code == 0
    assert f"{path} is cut off" in result.stderr
    found = marks(await stored(bus, EVENTS))
    assert 0 < len(found) < 2000
    assert found == expected[: len(found)]


async def test_what_cannot_be_replayed_is_refused_before_anything_is_published(bus, esper, path, write, make_event):
    write()
    whole = path.read_bytes()
    for arguments, message in (
        (["--as-run", "c"], "holds 2 runs (a, b), which cannot be replayed as one"),
        (["--run-prefix", "x" * 128], "must have 1 to 128 characters"),
        (["--speed", "0"], "neither a number above 0 nor max"),
        (["--speed", "fast"], "neither a number above 0 nor max"),
    ):
        result = await esper("replay", path, *arguments)
        assert result.exit_code != 0
        assert message in result.stderr
    with pytest.raises(AmbiguousRunError) as caught:
        survey(path, Selection(as_run="c"))
    assert caught.value.run_ids == ["a", "b"]
    path.write_bytes(whole[:500])
    with pytest.raises(TruncatedRecordingError, match="before its first whole event"):
        survey(path, Selection())
    with Recorder(path) as recorder:
        recorder.write(TELEMETRY, make_event())
    with pytest.raises(NotARecordingError, match=r"event 0 of telemetry\.payload: is run_ended"):
        survey(path, Selection())
    path.write_bytes(whole)
    await bus.stop()
    assert (await esper("replay", path)).exit_code == 1
    await bus.start()
    assert await stored(bus, EVENTS) == []


async def test_nothing_chosen_is_replayed_as_nothing(esper, path, write):
    write()
    result = await esper("replay", path, "--run", "not there")
    assert result.stdout.startswith("0 events of no run in ")
