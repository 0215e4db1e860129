"""The link to a real server that comes and goes."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from structlog.testing import capture_logs

from esperml import kasmina
from esperml.client import OonaClient, new_event
from esperml.kasmina import grpc_link
from esperml.v1 import event_pb2, health_pb2, oona_pb2, run_pb2

EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
DEADLINE_S = 30


def wait_until(condition) -> None:
    """Block until ``condition`` holds; only for threads beside the event loop."""
    end = time.monotonic() + DEADLINE_S
    gate = threading.Event()
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        gate.wait(0.002)


async def stored(bus, kind) -> list[event_pb2.Event]:
    async with OonaClient(bus.target, client_id="reader") as oona:
        end = (await oona.describe(kind)).topic.next_offset
        if end == 0:
            return []
        async with oona.subscribe(kind, start=EARLIEST, end_offset=end) as subscription:
            return [record.event async for record in subscription]


def run_session(case, target, *, steps=20, during=None, **kwargs):
    """Train a host in this thread; returns host, session and losses."""
    torch.set_num_threads(1)
    here = case("mlp")
    losses = []
    kwargs = {"run": "r", "mode": "act", "report_every": 5, "overhead_ceiling": None, **kwargs}
    with kasmina.connect(target, here.model, here.optimizer, **kwargs) as session:
        for step in range(steps):
            losses.append(here.step(session))
            if during is not None:
                during(step, session)
    return here, session, losses


async def test_what_a_session_says_is_stored_in_order(case, bus):
    await asyncio.to_thread(run_session, case, bus.target)
    events = await stored(bus, event_pb2.KIND_EVENTS)
    assert [event.WhichOneof("payload") for event in events] == ["run_started", "run_ended"]
    reports = [event.health_report for event in await stored(bus, event_pb2.KIND_TELEMETRY)]
    assert [report.step for report in reports] == [5, 10, 15, 20]


async def test_a_command_over_the_wire_is_carried_out(case, bus, germination):
    reached = threading.Event()

    def during(step, session):
        if step == 10:
            assert reached.wait(DEADLINE_S)
            wait_until(lambda: session._link._received or session.decisions_applied)

    async def controller():
        async with (
            OonaClient(bus.target, client_id="controller") as oona,
            oona.subscribe(event_pb2.KIND_EVENTS, start=EARLIEST) as events,
        ):
            await anext(events)
            await oona.publish(event_pb2.KIND_COMMANDS, [new_event("other", command=germination("0", "2"))])
            await oona.publish(event_pb2.KIND_COMMANDS, [new_event("r", command=germination("2", "2"))])
            reached.set()

    task = asyncio.create_task(controller())
    here, session, _ = await asyncio.to_thread(run_session, case, bus.target, during=during)
    await task
    assert session.decisions_applied == 1
    applied = [event.applied for event in await stored(bus, event_pb2.KIND_OUTCOMES)]
    assert [a.decision_id for a in applied] == ["d-1"]
    assert applied[0].step <= 12
    assert len(kasmina.host_of(here.model).seeds) == 1
    assert session.summary().connected
    assert "cannot be reached" not in str(session.summary())


async def test_a_run_without_a_server_has_the_same_weights_as_one_with(case, bus, unused_port):
    with_server, _, losses = await asyncio.to_thread(run_session, case, bus.target)
    without, session, alone = await asyncio.to_thread(run_session, case, f"127.0.0.1:{unused_port}", during=None)
    assert losses == alone
    for a, b in zip(with_server.model.state_dict().values(), without.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert session.failure == ""
    assert "the server cannot be reached" in str(session.summary())


async def test_training_outlives_the_server(case, bus):
    loop = asyncio.get_running_loop()

    def during(step, session):
        if step == 6:
            wait_until(lambda: session._link.statistics().connected)
            asyncio.run_coroutine_threadsafe(bus.stop(), loop).result(DEADLINE_S)

    _, session, losses = await asyncio.to_thread(run_session, case, bus.target, during=during)
    assert len(losses) == 20
    assert session.failure == ""


async def test_what_was_said_while_the_server_was_away_is_sent_when_it_is_back(case, bus):
    loop = asyncio.get_running_loop()

    def call(coroutine):
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(DEADLINE_S)

    def during(step, session):
        if step == 6:
            wait_until(lambda: session._link.statistics().connected)
            call(bus.stop())
        if step == 12:
            call(bus.start())
            wait_until(lambda: session._link.statistics().connected)

    await asyncio.to_thread(run_session, case, bus.target, during=during)
    reports = [event.health_report.step for event in await stored(bus, event_pb2.KIND_TELEMETRY)]
    assert reports == [5, 10, 15, 20]


async def test_memory_is_bounded_and_the_oldest_reports_go_first(unused_port, monkeypatch):
    monkeypatch.setattr(grpc_link, "MAX_REPORTS", 3)
    monkeypatch.setattr(grpc_link, "MAX_OTHERS", 2)
    link = kasmina.GrpcLink(f"127.0.0.1:{unused_port}", "r")
    for step in range(10):
        link.publish(event_pb2.KIND_TELEMETRY, new_event("r", health_report=health_pb2.HealthReport(step=step)))
        link.publish(event_pb2.KIND_EVENTS, new_event("r", run_ended=run_pb2.RunEnded(step=step)))
    statistics = link.statistics()
    assert (statistics.reports_dropped, statistics.others_dropped) == (7, 8)
    assert [entry.event.health_report.step for entry in link._outbox._reports] == [7, 8, 9]
    await asyncio.to_thread(link.close, 0.05)
    assert not link._thread.is_alive()


async def test_the_cost_of_the_sender_is_counted(case, bus):
    seen = []

    def during(step, session):
        if step == 10:
            wait_until(lambda: session._link.statistics().sender_seconds > 0)
        seen.append(session._link.statistics().sender_seconds)

    await asyncio.to_thread(run_session, case, bus.target, during=during)
    assert seen == sorted(seen)
    assert seen[-1] > 0


async def test_an_event_that_the_server_refuses_does_not_stop_those_after_it(bus):
    def publish():
        link = kasmina.GrpcLink(bus.target, "r")
        link.publish(event_pb2.KIND_TELEMETRY, new_event("r", run_ended=run_pb2.RunEnded()))
        link.publish(event_pb2.KIND_EVENTS, new_event("r", run_ended=run_pb2.RunEnded()))
        link.close(DEADLINE_S)

    await asyncio.to_thread(publish)
    assert len(await stored(bus, event_pb2.KIND_EVENTS)) == 1
    assert await stored(bus, event_pb2.KIND_TELEMETRY) == []


def test_a_thread_that_hangs_does_not_keep_the_training_loop(unused_port, monkeypatch):
    monkeypatch.setattr(grpc_link, "_BREAK_OFF_TIMEOUT_S", 0.05)
    link = kasmina.GrpcLink(f"127.0.0.1:{unused_port}", "r")
    gate, hangs = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        assert gate.wait(DEADLINE_S)

    try:
        link._loop.call_soon_threadsafe(hang)
        assert hangs.wait(DEADLINE_S)
        link.publish(event_pb2.KIND_EVENTS, new_event("r", run_ended=run_pb2.RunEnded()))
        with capture_logs() as logs:
            link.close(0.05)
        assert link._thread.is_alive()
        assert {"link_left_behind", "events_not_sent"} <= {entry["event"] for entry in logs}
        assert not link.statistics().connected
    finally:
        gate.set()
        link._thread.join(DEADLINE_S)
    assert not link._thread.is_alive()


async def test_a_link_is_a_link_and_closes_twice(bus):
    link = kasmina.GrpcLink(bus.target, "r")
    assert isinstance(link, kasmina.Link)
    await asyncio.to_thread(link.close, DEADLINE_S)
    await asyncio.to_thread(link.close, DEADLINE_S)
    link.publish(event_pb2.KIND_EVENTS, new_event("r", run_ended=run_pb2.RunEnded()))


@pytest.mark.parametrize("target", ["nonsense address", "127.0.0.1:1"])
async def test_a_target_that_makes_no_sense_harms_nothing(case, target):
    _, session, losses = await asyncio.to_thread(run_session, case, target, steps=6)
    assert len(losses) == 6
    assert session.failure == ""
