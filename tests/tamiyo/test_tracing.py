"""The trace context of a report goes with the decision made on it, its command, the outcome, and what the log says."""

from __future__ import annotations

import pytest
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from structlog.testing import LogCapture

from esperml.client import OonaClient
from esperml.tamiyo.loop import TamiyoLoop
from esperml.v1 import decision_pb2, event_pb2, oona_pb2

EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def report(host, step, traceparent):
    """Report under a trace context; what came of it."""
    graph_report = host.event
    host.event = lambda **payload: traced(graph_report(**payload), traceparent)
    try:
        return host.report(step)
    finally:
        host.event = graph_report


def traced(event, traceparent):
    event.traceparent = traceparent
    return event


@pytest.mark.parametrize("traceparent", [TRACE, "no trace context at all", ""])
def test_what_came_of_a_report_carries_its_trace_context_as_it_is(tools, tmp_path, traceparent):
    host = tools.Host(tools.controller(tmp_path))
    host.start()
    outgoing = []
    for step in range(100, 1100, 100):
        outgoing += report(host, step, traceparent)
    payloads = {event.WhichOneof("payload") for _, event in outgoing}
    assert {"decision", "command", "experience"} <= payloads
    assert {event.traceparent for _, event in outgoing} == {traceparent}


def test_a_decision_that_is_approved_later_keeps_the_context_of_its_report(tools, tmp_path):
    host = tools.Host(controller := tools.controller(tmp_path), mode=decision_pb2.MODE_ADVISE)
    host.start()
    step = 0
    while not controller.pending("run"):
        step += 100
        report(host, step, TRACE)
    [pending] = controller.pending("run")
    report(host, step + 10, "another")
    outgoing = controller.approve("run", pending.decision_id, Timestamp(seconds=5000))
    assert [event.WhichOneof("payload") for _, event in outgoing] == ["decision", "command"]
    assert {event.traceparent for _, event in outgoing} == {TRACE}


async def test_the_log_speaks_of_decisions_and_outcomes_under_their_trace_context(tools, tmp_path, bus):
    heard, processors = LogCapture(), structlog.get_config()["processors"]
    before = list(processors)
    processors[:] = [structlog.contextvars.merge_contextvars, heard]
    try:
        async with (
            OonaClient(bus.target, client_id="session") as client,
            TamiyoLoop(tools.controller(tmp_path)).running(bus.target),
        ):
            await speak(client, tools)
    finally:
        processors[:] = before
    of = {
        name: [entry for entry in heard.entries if entry["event"] == name]
        for name in ("decided", "command_sent", "outcome", "effect_measured", "event_refused")
    }
    assert {entry["traceparent"] for entry in of["decided"] + of["command_sent"]} == {TRACE}
    [command] = of["command_sent"]
    assert any(entry["decision_id"] == command["decision_id"] for entry in of["decided"])
    [outcome] = of["outcome"]
    assert (outcome["decision_id"], outcome["status"], outcome["traceparent"]) == (
        command["decision_id"],
        "refused",
        TRACE,
    )
    [effect] = of["effect_measured"]
    assert "traceparent" not in effect
    [refused] = of["event_refused"]
    assert refused["traceparent"] == "x" * 128


async def speak(client, tools):
    """Be a host that reports until it is sent a command, refuses that, and says something wrong."""

    class Silent:
        def handle(self, kind, event):
            return []

    host = tools.Host(Silent())
    host.start()
    await client.publish(*one(host.said[-1]))
    async with (
        client.subscribe(event_pb2.KIND_COMMANDS, start=EARLIEST) as commands,
        client.subscribe(event_pb2.KIND_DECISIONS, start=EARLIEST) as decisions,
    ):
        step = 0
        while True:
            step += 100
            report(host, step, TRACE)
            await client.publish(*one(host.said[-1]))
            decided = (await anext(decisions)).event
            if decided.decision.disposition == decision_pb2.DISPOSITION_SENT:
                break
        sent = (await anext(commands)).event
        assert sent.traceparent == decided.traceparent == TRACE
        decision_id = sent.command.decision_id
        refused = decision_pb2.Applied(
            decision_id=decision_id, step=step, status=decision_pb2.COMMAND_STATUS_REFUSED, reason="no"
        )
        outcomes = [
            traced(host.event(applied=refused), sent.traceparent),
            host.event(effect=decision_pb2.Effect(decision_id=decision_id, step=step, loss_reduction=0.1)),
            traced(host.event(effect=decision_pb2.Effect(loss_reduction=float("nan"))), "x" * 10_000),
        ]
        await client.publish(event_pb2.KIND_OUTCOMES, outcomes)
        # Decided behind the outcomes, or with them: all are handled when the group has done with them.
        while True:
            [group] = (await client.describe(event_pb2.KIND_OUTCOMES)).groups
            if not group.lag:
                return


def one(said):
    kind, event = said
    return kind, [event]
