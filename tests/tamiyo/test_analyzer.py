import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.tamiyo.validate import check_state
from esperml.v1 import event_pb2, graph_pb2, health_pb2, run_pb2

NOW = Timestamp(seconds=5)
TELEMETRY, EVENTS, OUTCOMES = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES


def test_what_was_not_measured_again_stays_as_it_was(tools, host):
    host.report(100)
    partial = health_pb2.HealthReport(step=200, structure_version=1)
    partial.layers.add(layer="layer1", dead_fraction=0.9)
    host.send(TELEMETRY, host.event(health_report=partial))
    state = host.controller.state("run")
    assert list(state.layers.dead_fraction.values) == pytest.approx([0, 0.9, 0.2, 0.3])
    assert len(state.history) == 1
    assert state.layers.gradient_norm.values[1] == pytest.approx(0.5)


def test_history_is_short_and_trends_need_three_reports(tools, host):
    for step in range(10, 310, 10):
        if step == 30:
            assert not host.controller.state("run").layers.health_trend.values
        host.report(step)
    state = host.controller.state("run")
    assert [point.step for point in state.history] == list(range(140, 300, 10))
    assert len(state.layers.health_trend.values) == 4
    check_state(state)


def test_a_new_structure_keeps_what_still_applies(tools, host):
    for step in (100, 200, 300):
        report = tools.report(host.graph, step)
        report.places.add(place=5, growth_gradient=0.5)
        report.seeds.append(tools.seed(stage=health_pb2.SEED_STAGE_BLENDING))
        report.epoch = 3
        host.send(TELEMETRY, host.event(health_report=report))
    grown = graph_pb2.HostGraph()
    grown.CopyFrom(host.graph)
    grown.structure_version = 2
    for name in ("sources", "targets", "blueprints"):
        values = getattr(grown.places, name)
        values[:] = [*list(values)[5:], *list(values)[:3]]
    host.send(EVENTS, host.event(structure_changed=run_pb2.StructureChanged(graph=grown)))
    state = host.controller.state("run")
    assert state.epoch == 3
    assert state.places.growth_gradient.values[0] == 0.5
    assert state.seeds[0].place == 0
    assert state.layers.health_trend.values
    check_state(state)
    old = tools.report(host.graph, 400)
    old.places.add(place=0, growth_gradient=0.9)
    host.send(TELEMETRY, host.event(health_report=old))
    assert host.controller.state("run").places.growth_gradient.values[0] == 0.5
