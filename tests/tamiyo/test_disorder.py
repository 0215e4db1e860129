import math

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.contract import InvalidFieldError
from esperml.tamiyo.controller import MAX_HELD_EVENTS
from esperml.v1 import decision_pb2, event_pb2, health_pb2, run_pb2, runs_pb2

NOW = Timestamp(seconds=5)
TELEMETRY, EVENTS, OUTCOMES = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES


def test_duplicates_change_nothing(tools, host):
    for step in range(100, 600, 100):
        host.report(step)
    for kind, event in host.said:
        assert host.controller.handle(kind, event) == []


def test_a_late_report_only_adds_to_the_curve(tools, tmp_path):
    controller = tools.controller(tmp_path)
    twin, host = tools.Host(controller, "twin"), tools.Host(controller, "run", paired_run="twin")
    twin.start()
    host.start()
    twin.report(300)
    assert twin.report(200, held_out_loss=1.0) == []
    assert controller.run("twin").step == 300
    host.report(100)
    assert tools.told(host.report(200, held_out_loss=0.5)).experience[0].HasField("reward")


def test_events_of_an_unknown_run_are_held_until_it_starts(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path))
    assert host.report(100) == []
    assert host.report(200) == []
    assert [decision.step for decision in tools.told(host.start()).decisions] == [200]
    assert host.controller.state("run").history[0].step == 100


def test_only_so_many_events_are_held(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, decision_interval_steps=1, warmup_steps=0))
    for step in range(1, MAX_HELD_EVENTS + 51):
        host.report(step)
    held = host.controller._held["run"]
    assert [held[0][1].health_report.step, len(held)] == [51, MAX_HELD_EVENTS]
    assert [decision.step for decision in tools.told(host.start()).decisions] == [MAX_HELD_EVENTS + 50]


def test_a_report_that_overtakes_its_structure_waits_for_it(tools, host):
    host.report(100)
    grown = tools.graph(widths=(16, 32, 4, 32, 16, 10), version=2)
    host.graph = grown
    assert host.report(200) == []
    changed = run_pb2.StructureChanged(step=150, graph=grown)
    told = tools.told(host.send(EVENTS, host.event(structure_changed=changed)))
    assert told.decisions[0].structure_version == 2
    assert len(told.experience[0].next_state.graph.layers) == 5
    assert host.send(EVENTS, host.event(structure_changed=changed)) == []


def test_of_reports_that_waited_for_their_structure_only_the_latest_is_decided_on(tools, host):
    host.graph = tools.graph(version=2)
    for step in (100, 200, 300):
        assert host.report(step) == []
    changed = run_pb2.StructureChanged(step=50, graph=host.graph)
    told = tools.told(host.send(EVENTS, host.event(structure_changed=changed)))
    assert [decision.step for decision in told.decisions] == [300]


def test_a_stale_report_is_taken_in_and_not_decided_on(tools, host):
    def report(step, *, stale):
        event = host.event(health_report=tools.report(host.graph, step))
        return tools.told(host.controller.handle(TELEMETRY, event, stale=stale)).decisions

    assert report(100, stale=True) == []
    assert host.controller.run("run").step == 100
    assert [decision.step for decision in report(150, stale=False)] == [150]
    assert report(250, stale=True) == []
    assert report(200, stale=False) == []
    assert [decision.step for decision in report(260, stale=False)] == [260]


def test_seeds_are_not_settled_on_a_stale_report(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, policy="nothing"))
    host.start()
    report = tools.report(host.graph, 10)
    report.seeds.append(tools.seed())
    assert host.controller.handle(TELEMETRY, host.event(health_report=report), stale=True) == []
    assert tools.told(host.report(20, [tools.seed()])).commands


def test_a_waiting_report_that_does_not_fit_the_structure_is_left_out(tools, host):
    stranger = tools.graph(version=2, prefix="stranger")
    host.graph = stranger
    host.report(200)
    changed = run_pb2.StructureChanged(step=150, graph=tools.graph(version=2))
    assert host.send(EVENTS, host.event(structure_changed=changed)) == []
    assert host.controller.run("run").step == 0


def test_after_the_end_only_the_curve_grows(tools, host):
    host.report(100)
    host.end(200)
    assert host.report(300) == []
    run = host.controller.run("run")
    assert run.status == runs_pb2.RUN_STATUS_COMPLETED
    assert run.step == 200


def test_a_run_that_failed_is_shown_as_failed(tools, host):
    host.end(10, run_pb2.RUN_END_FAILED)
    assert host.controller.run("run").status == runs_pb2.RUN_STATUS_FAILED


def test_a_second_start_begins_anew_and_closes_what_was_open(tools, host):
    told = tools.told(host.report(100))
    again = tools.told(host.start())
    assert again.experience[0].done
    assert again.experience[0].decision == told.decisions[0]
    assert host.controller.run("run").step == 0
    anew = tools.told(host.report(100)).decisions[0]
    assert anew.decision_id != told.decisions[0].decision_id


def test_epochs_add_to_the_curve(tools, tmp_path):
    controller = tools.controller(tmp_path)
    twin, host = tools.Host(controller, "twin"), tools.Host(controller, "run", paired_run="twin")
    for each in (twin, host):
        each.start()
        each.report(100)
        completed = run_pb2.EpochCompleted(epoch=0, step=150, run=health_pb2.RunMeasures(held_out_loss=1.0))
        each.send(EVENTS, each.event(epoch_completed=completed))
    assert tools.told(host.report(200)).experience[0].reward.total == 0


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"run_started": run_pb2.RunStarted()}, "event.run_started.graph.layers"),
        ({"structure_changed": run_pb2.StructureChanged()}, "event.structure_changed.graph.layers"),
        (
            {"run_ended": run_pb2.RunEnded(run=health_pb2.RunMeasures(held_out_loss=math.nan))},
            "event.run_ended.run.held_out_loss",
        ),
        (
            {"epoch_completed": run_pb2.EpochCompleted(run=health_pb2.RunMeasures(train_loss=math.inf))},
            "event.epoch_completed.run.train_loss",
        ),
    ],
)
def test_a_malformed_event_is_refused_by_field_and_the_run_stands(tools, host, payload, field):
    with pytest.raises(InvalidFieldError) as caught:
        host.send(EVENTS, host.event(**payload))
    assert caught.value.field == field
    with pytest.raises(InvalidFieldError):
        host.send(OUTCOMES, host.event(effect=decision_pb2.Effect(loss_reduction=math.nan)))
    with pytest.raises(InvalidFieldError, match="payload"):
        host.send(TELEMETRY, host.event(effect=decision_pb2.Effect()))
    assert host.controller.run("run").status == runs_pb2.RUN_STATUS_RUNNING
    assert tools.told(host.report(100)).decisions


def test_a_run_that_asks_for_a_policy_that_there_is_not_is_refused_and_forgotten(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path), policy="oracle")
    with pytest.raises(InvalidFieldError, match=r"run_started\.policy: there is no policy named 'oracle'"):
        host.start()
    assert host.controller.knows("run")
    assert host.report(100) == []
    assert host.controller.runs() == []


def test_ended_runs_make_room_before_those_under_way(tools, tmp_path):
    controller = tools.controller(tmp_path, max_runs=2)
    hosts = [tools.Host(controller, name) for name in ("a", "b", "c")]
    for host in hosts[:2]:
        host.start()
    hosts[1].end(10)
    hosts[2].start()
    assert [run.run_id for run in controller.runs()] == ["c", "a"]


def at(controller, kind, event, seconds):
    return controller.handle(kind, event, at_s=seconds)


def started(tools, host):
    return host.event(run_started=run_pb2.RunStarted(graph=tools.graph()))


def test_of_runs_under_way_the_one_idle_for_longest_makes_room_and_no_other(tools, tmp_path):
    controller = tools.controller(tmp_path, max_runs=2, idle_run_s=100)
    a, b, c = (tools.Host(controller, name) for name in "abc")
    at(controller, EVENTS, started(tools, a), 1_000)
    at(controller, EVENTS, started(tools, b), 1_001)
    at(controller, TELEMETRY, a.event(health_report=tools.report(a.graph, 100)), 1_050)
    start = started(tools, c)
    [(kind, told)] = at(controller, EVENTS, start, 1_101)
    assert (kind, told.run_id, told.notice.code) == (event_pb2.KIND_COMMANDS, "c", run_pb2.NOTICE_CODE_NOT_FOLLOWED)
    assert "follows 2 runs" in told.notice.text
    assert not controller.has_room
    assert [run.run_id for run in controller.runs()] == ["b", "a"]
    # What is restarted has its place already.
    assert not tools.told(at(controller, EVENTS, started(tools, a), 1_101)).notices
    assert at(controller, EVENTS, start, 1_102) == []
    assert [run.run_id for run in controller.runs()] == ["c", "a"]


def test_of_what_is_held_for_unknown_runs_the_oldest_goes_first(tools, tmp_path, monkeypatch):
    monkeypatch.setattr("esperml.tamiyo.controller.MAX_HELD", 4)
    controller = tools.controller(tmp_path)
    for name in ("a", "b", "a", "c", "c"):
        tools.Host(controller, name).report(100)
    assert {name: len(held) for name, held in controller._held.items()} == {"b": 1, "c": 2}
    assert controller._held_count == 3


def test_what_was_held_while_a_run_was_rebuilt_is_new(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path))
    host.start()
    first = host.report(100)
    controller = tools.controller(tmp_path)
    record = [*host.said, first[0]]
    host.controller = controller
    assert host.report(200) == []
    told = tools.told(controller.rebuild([*record, host.said[-1]]))
    assert [decision.step for decision in told.decisions] == [200]
    assert controller.run("run").step == 200
