"""A training run whose token is refused, or allows less than it needs: it trains on, and says once what to do."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from esperml.client import Credentials, OonaClient, new_event
from esperml.kasmina import GrpcLink, grpc_link
from esperml.server import watch
from esperml.server.tokens import revoke
from esperml.v1 import decision_pb2, event_pb2, health_pb2, oona_pb2, run_pb2

EVENTS, COMMANDS, TELEMETRY = event_pb2.KIND_EVENTS, event_pb2.KIND_COMMANDS, event_pb2.KIND_TELEMETRY
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


@pytest.fixture(autouse=True)
def _look_often(monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL_S", 0.05)
    monkeypatch.setattr(grpc_link, "_REFUSED_RETRY_S", 0.05)


def ended(run: str) -> event_pb2.Event:
    return new_event(run, run_ended=run_pb2.RunEnded())


async def until(condition) -> None:
    await asyncio.to_thread(_until, condition)


def _until(condition) -> None:
    end, gate = time.monotonic() + 30, threading.Event()
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        gate.wait(0.005)


async def test_a_link_with_the_token_of_its_run_sends_and_gets_its_commands(serve, make_token):
    host, controller = make_token("host", "mine"), make_token("controller")
    async with serve() as guarded, OonaClient(guarded.target, client_id="c", credentials=controller) as oona:
        link = GrpcLink(guarded.target, "mine", credentials=host)
        await until(lambda: link.statistics().connected)
        async with oona.subscribe(EVENTS, start=EARLIEST) as events:
            link.publish(EVENTS, ended("mine"))
            await anext(events)
        await oona.publish(COMMANDS, [new_event("mine", command=decision_pb2.Command(decision_id="d"))])
        await until(link.received)
        await asyncio.to_thread(link.close, 5.0)
        assert link.statistics().connected


async def test_a_token_that_is_revoked_is_said_once_and_its_successor_is_taken(serve, make_token, tmp_path, capsys):
    host, viewer = make_token("host", "mine", name="ann"), make_token("viewer")
    file = tmp_path / "host.token"
    file.write_text(host.token)
    async with serve() as guarded, OonaClient(guarded.target, client_id="v", credentials=viewer) as oona:
        link = GrpcLink(guarded.target, "mine", credentials=Credentials(token_file=file))
        await until(lambda: link.statistics().connected)
        revoke(guarded.tokens, "ann")
        await until(lambda: not link.statistics().connected)
        link.publish(EVENTS, ended("mine"))
        file.write_text(guarded.token("host", "mine").token)
        async with oona.subscribe(EVENTS, start=EARLIEST) as events:
            assert (await anext(events)).event.run_id == "mine"
        await until(lambda: link.statistics().connected)
        await asyncio.to_thread(link.close, 5.0)
    said = "".join(capsys.readouterr())
    assert said.count("token_refused") == 1
    assert "`esper token new` makes another" in said


async def test_a_token_for_another_run_is_said_once_for_each_thing_and_ends_nothing(serve, make_token, capsys):
    host = make_token("host", "other")
    async with serve() as guarded:
        link = GrpcLink(guarded.target, "mine", credentials=host)
        for step in range(5):
            link.publish(TELEMETRY, new_event("mine", health_report=health_pb2.HealthReport(step=step)))
            link.publish(EVENTS, ended("mine"))
        await until(lambda: link.statistics().reports_dropped == 5 and link.statistics().others_dropped == 5)
        assert link._thread.is_alive()
        await asyncio.to_thread(link.close, 5.0)
    said = "".join(capsys.readouterr())
    for event in ("commands_forbidden", "telemetry_forbidden", "events_forbidden"):
        assert said.count(event) == 1
    assert "run 'mine' is not one of those of token" in said


async def test_a_link_whose_token_is_no_token_waits_for_one_and_can_be_closed(serve, tmp_path, capsys):
    file = tmp_path / "host.token"
    async with serve() as guarded:
        link = GrpcLink(guarded.target, "mine", credentials=Credentials(token_file=file))
        link.publish(EVENTS, ended("mine"))
        await until(lambda: "credentials_unusable" in link._told)
        file.write_text("nonsense")
        await until(lambda: "token_refused" in link._told)
        await asyncio.to_thread(link.close, 0.2)
        assert not link._thread.is_alive()
        assert not link.statistics().connected
    assert "events_not_sent" in "".join(capsys.readouterr())
