"""What a session left on the disk is sent by a later one, each event once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from esperml import kasmina
from esperml.client import OonaClient, Recorder, new_event
from esperml.client.credentials import NO_CREDENTIALS
from esperml.client.recording import describe
from esperml.kasmina import grpc_link
from esperml.kasmina.leftovers import send_leftovers
from esperml.kasmina.spool import SpoolFile, SpoolOptions
from esperml.v1 import health_pb2

sys.path.insert(0, str(Path(__file__).parent))
from spooled import EVENTS, OUTCOMES, TELEMETRY, begun, ended, entries, entry, steps_in, stored, stored_steps

DEADLINE_S = 30


def wait_until(condition) -> None:
    """Block until ``condition`` holds; only for threads beside the event loop."""
    end = time.monotonic() + DEADLINE_S
    gate = threading.Event()
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        gate.wait(0.002)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def options(folder) -> SpoolOptions:
    return SpoolOptions(folder)


@pytest.mark.parametrize("confirmed", [False, True], ids=["lost on the way", "stored"])
@pytest.mark.parametrize(("under_way", "rest", "rest_stored"), [(2, 0, 0), (2, 3, 0), (1, 70, 64), (0, 3, 1)])
async def test_each_event_is_stored_once_wherever_its_session_ended(
    bus, folder, options, confirmed, under_way, rest, rest_stored
):
    events = entries(*range(under_way + rest))
    file = SpoolFile(folder, begun(bus.target, first=2, under_way=under_way), events, max_bytes=10**6)
    async with OonaClient(bus.target, client_id="session-1") as oona:
        await oona.publish(EVENTS, [ended(1000)])
        if confirmed and under_way:
            await oona.publish(EVENTS, [entry.event for entry in events[:under_way]])
    if rest_stored and (confirmed or not under_way):
        async with OonaClient(bus.target, client_id=file.client_id) as oona:
            await oona.publish(EVENTS, [entry.event for entry in events[under_way : under_way + rest_stored]])
    file.close()
    await send_leftovers(options, bus.target, NO_CREDENTIALS)
    assert await stored_steps(bus) == [1000, *range(under_way + rest)]
    assert list(folder.iterdir()) == []


async def test_what_belongs_to_others_is_left_alone(bus, folder, options):
    living = SpoolFile(folder, begun(bus.target), entries(0), max_bytes=10**6)
    SpoolFile(folder, begun("elsewhere:1"), entries(1), max_bytes=10**6).close()
    (folder / "garbage.mcap").write_bytes(b"garbage, and more of it")
    (folder / "notes.txt").write_text("not ours")
    with Recorder(folder / "recording.mcap") as recorder:
        recorder.write(EVENTS, ended(2))
    (folder / "begun.part").write_bytes(b"")
    before = {path.name for path in folder.iterdir()}
    with capture_logs() as logs:
        await send_leftovers(options, bus.target, NO_CREDENTIALS)
    assert await stored_steps(bus) == []
    assert before - {path.name for path in folder.iterdir()} == {"begun.part"}
    stays = [entry for entry in logs if entry["event"] == "leftover_stays"]
    assert [Path(entry["path"]).name for entry in stays] == ["garbage.mcap"]
    living.close()


async def test_an_event_that_the_server_refuses_does_not_hold_up_the_rest(bus, folder, options):
    wrong = entry(OUTCOMES, ended(0))  # An event of a payload that outcomes do not carry.
    SpoolFile(folder, begun(bus.target), [wrong, *entries(1)], max_bytes=10**6).close()
    with capture_logs() as logs:
        await send_leftovers(options, bus.target, NO_CREDENTIALS)
    assert await stored_steps(bus) == [1]
    assert "events_refused" in {entry["event"] for entry in logs}
    assert list(folder.iterdir()) == []


async def test_no_folder_is_nothing_left(bus, options):
    await send_leftovers(options, bus.target, NO_CREDENTIALS)
    assert await stored_steps(bus) == []


# Links.


async def test_what_a_session_could_not_send_comes_before_what_the_next_one_says(bus, options, folder):
    await bus.stop()

    def speak(*steps: int, timeout_s: float) -> kasmina.LinkStatistics:
        link = kasmina.GrpcLink(bus.target, "r", spool=options)
        for step in steps:
            link.publish(EVENTS, ended(step))
        link.close(timeout_s)
        return link.statistics()

    alone = await asyncio.to_thread(speak, 0, 1, timeout_s=0.05)
    assert not alone.connected
    assert alone.spooled == 2
    assert [describe(path).counts.total() for path in folder.iterdir()] == [2]
    await bus.start()
    assert (await asyncio.to_thread(speak, 2, timeout_s=DEADLINE_S)).connected
    assert await stored_steps(bus) == [0, 1, 2]
    assert list(folder.iterdir()) == []


async def test_a_long_outage_loses_no_event_and_keeps_the_order_of_all_kinds(bus, options, folder, monkeypatch):
    monkeypatch.setattr(grpc_link, "MAX_OTHERS", 8)
    monkeypatch.setattr(grpc_link, "_KEEP_AFTER_S", 0.02)
    loop = asyncio.get_running_loop()

    def call(coroutine):
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(DEADLINE_S)

    def speak():
        link = kasmina.GrpcLink(bus.target, "r", spool=options)
        link.publish(EVENTS, ended(0))
        wait_until(lambda: link._backlog.unsent == 0)
        call(bus.stop())
        for step in range(1, 41):
            link.publish(EVENTS, ended(step))
            if step % 8 == 0:
                link.publish(TELEMETRY, new_event("r", health_report=health_pb2.HealthReport(step=step)))
                wait_until(lambda step=step: link.statistics().spooled >= step)
        assert link.statistics().others_dropped == 0
        assert len(list(folder.iterdir())) == 1
        call(bus.start())
        wait_until(lambda: list(folder.iterdir()) == [])
        link.publish(EVENTS, ended(41))
        link.close(DEADLINE_S)
        assert link.statistics().connected

    await asyncio.to_thread(speak)
    assert await stored_steps(bus) == list(range(42))
    reports = await stored(bus, TELEMETRY)
    assert [event.health_report.step for event in reports] == [8, 16, 24, 32, 40]
    everything = sorted([*reports, *await stored(bus)], key=lambda event: event.created_at.ToNanoseconds())
    assert len({event.event_id for event in everything}) == 47


async def test_a_session_that_is_killed_leaves_what_it_had_synced(bus, folder):
    await bus.stop()
    script = Path(__file__).with_name("speak_until_killed.py")
    command = [sys.executable, str(script), bus.target]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "ESPER_SPOOL": str(folder)}
    )
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        while not (line := await process.stdout.readline()).startswith(b"spooled"):
            assert line, "the session ended by itself"
    synced = int(line.split()[1])
    process.kill()
    await process.wait()
    [path] = folder.iterdir()
    assert len(steps_in(path)) >= synced > 0
    await bus.start()

    def reconnect():
        link = kasmina.GrpcLink(bus.target, "r", spool=SpoolOptions(folder))
        link.publish(EVENTS, ended(0))
        link.close(DEADLINE_S)

    await asyncio.to_thread(reconnect)
    *left, last = await stored_steps(bus)
    assert left == list(range(len(left)))
    assert len(left) >= synced
    assert last == 0
    assert list(folder.iterdir()) == []


async def test_a_folder_that_takes_nothing_harms_no_training(unused_port, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with capture_logs() as logs:
        link = kasmina.GrpcLink(f"127.0.0.1:{unused_port}", "r", spool=SpoolOptions(tmp_path / "file" / "spool"))
        link.publish(EVENTS, ended(0))
        await asyncio.to_thread(link.close, 0.05)
    names = [entry["event"] for entry in logs]
    assert names.count("spool_unusable") == 1
    assert names.count("events_not_sent") == 1
    assert not link.statistics().connected
