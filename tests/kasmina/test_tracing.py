"""Trace contexts: that of the process goes with what it reports, that of a command with what came of it."""

from __future__ import annotations

from esperml import kasmina
from esperml.v1 import event_pb2, graph_pb2

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def run(here, bench, steps, **options):
    with kasmina.connect(
        bench.link, here.model, here.optimizer, run="r", mode="act", report_every=2, **options
    ) as session:
        for _ in range(steps):
            here.step(session)


def traceparents(bench, name):
    return {event.traceparent for _, event in bench.events if event.WhichOneof("payload") == name}


def test_what_came_of_a_command_carries_its_trace_context(case, bench, germination):
    here = case("mlp")
    bench.other.append(event_pb2.Event(run_id="r", traceparent=TRACE, command=germination("0", "2")))
    run(here, bench, 20, evaluate=here.evaluate, limits=graph_pb2.RunLimits(hold_steps=4))
    for name in ("applied", "structure_changed", "effect"):
        assert traceparents(bench, name) == {TRACE}, name
    assert traceparents(bench, "health_report") == {""}


def test_what_a_process_reports_carries_the_trace_context_of_its_environment(case, bench, germination, monkeypatch):
    monkeypatch.setenv("TRACEPARENT", "mine")
    here = case("mlp")
    bench.waiting.append(germination("0", "2"))
    run(here, bench, 6)
    assert {event.traceparent for _, event in bench.events} == {"mine"}
