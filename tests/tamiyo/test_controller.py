import math

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from esperml.contract import InvalidFieldError
from esperml.tamiyo.controller import MAX_HELD_EVENTS, NotPendingError, UnknownRunError
from esperml.tamiyo.experience import was_carried_out
from esperml.tamiyo.validate import check_state
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, health_pb2, run_pb2, runs_pb2

NOW = Timestamp(seconds=5)
TELEMETRY, EVENTS, OUTCOMES = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES


def run_until_command(tools, host, steps=range(100, 5000, 100)):
    """Report until a command is sent; returns the step and what was told."""
    for step in steps:
        told = tools.told(host.report(step))
        if told.commands:
            return step, told
    raise AssertionError("no command was sent")


@pytest.fixture
def host(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path))
    host.start()
    return host


def test_decisions_come_after_warm_up_and_at_intervals(tools, host):
    decided = [step for step in range(20, 700, 20) if tools.told(host.report(step)).decisions]
    assert decided == [100, 200, 300, 400, 500, 600]


def test_every_decision_but_the_last_becomes_an_experience_when_the_next_is_taken(tools, host):
    told = [tools.told(host.report(step)) for step in (100, 200, 300)]
    assert [len(one.experience) for one in told] == [0, 1, 1]
    first = told[1].experience[0]
    assert first.decision == told[0].decisions[0]
    assert first.index == 0
    assert first.elapsed_steps == 100
    assert first.state.step == 100
    assert first.next_state.step == 200
    assert first.state.HasField("mask")
    assert not first.done
    assert not first.HasField("reward")
    last = tools.told(host.end(350)).experience[0]
    assert last.done
    assert last.index == 2
    assert last.elapsed_steps == 50
    check_state(last.next_state)


def test_a_command_says_what_the_decision_says(tools, host):
    step, told = run_until_command(tools, host)
    decision, command = told.decisions[0], told.commands[0]
    assert decision.disposition == decision_pb2.DISPOSITION_SENT
    assert (command.decision_id, command.action, command.target) == (
        decision.decision_id,
        decision.action,
        decision.target,
    )
    assert command.decided_at_step == step
    assert command.expires_after_step == step + 1000


def test_what_was_applied_is_remembered_by_layer_and_by_experience(tools, host):
    step, told = run_until_command(tools, host)
    host.answer(told.commands[0], step=step + 1, added=123)
    effect = decision_pb2.Effect(decision_id=told.commands[0].decision_id, loss_reduction=0.25)
    host.send(OUTCOMES, host.event(effect=effect))
    after = tools.told(host.report(step + 100))
    experience = after.experience[0]
    assert was_carried_out(experience)
    record = experience.next_state.adaptations[0]
    assert record.parameters_added == 123
    assert record.effect == pytest.approx(0.25)
    target = [layer.name for layer in host.graph.layers].index(told.commands[0].target.target_layer)
    assert experience.next_state.layers.adaptation_count.values[target] == 1
    assert experience.next_state.layers.steps_since_adaptation.values[target] == 99
    assert host.controller.run("run").applied == 1


def test_a_place_is_not_used_twice_while_a_command_is_under_way(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, max_live_seeds=100))
    host.start()
    places = []
    for step in range(100, 3000, 100):
        for command in tools.told(host.report(step)).commands:
            places.append((command.target.source_layer, command.target.target_layer))
            if step < 1000:
                assert len(set(places)) == len(places)
    assert len(places) > 3


def test_a_report_from_before_the_planting_does_not_free_the_place(tools, host):
    step, told = run_until_command(tools, host)
    host.answer(told.commands[0], step=step + 150)
    names = told.commands[0].target
    for _ in range(1):
        mask = tools.told(host.report(step + 100)).experience[0].next_state.mask
        place = [
            (host.graph.layers[s].name, host.graph.layers[t].name)
            for s, t in zip(host.graph.places.sources, host.graph.places.targets, strict=True)
        ].index((names.source_layer, names.target_layer))
        assert mask.blueprints[place] == 0


def test_a_refusal_puts_the_place_under_an_embargo(tools, host):
    step, told = run_until_command(tools, host)
    host.answer(told.commands[0], status=decision_pb2.COMMAND_STATUS_REFUSED, step=step)
    after = tools.told(host.report(step + 100))
    assert "embargo" in [finding.rule for finding in after.decisions[0].rules]
    assert not was_carried_out(after.experience[0])
    assert after.experience[0].applied.status == decision_pb2.COMMAND_STATUS_REFUSED
    assert host.controller.run("run").refused == 1


def test_an_expired_command_releases_its_place(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, command_ttl_steps=150, max_live_seeds=1))
    host.start()
    step, _ = run_until_command(tools, host)
    assert "live_seeds" in [rule.rule for rule in tools.told(host.report(step + 100)).decisions[0].rules]
    assert "live_seeds" not in [rule.rule for rule in tools.told(host.report(step + 200)).decisions[0].rules]


def test_outcomes_of_decisions_that_were_never_taken_change_nothing(tools, host):
    stray = decision_pb2.Applied(decision_id="stray", status=decision_pb2.COMMAND_STATUS_APPLIED)
    host.send(OUTCOMES, host.event(applied=stray))
    host.send(OUTCOMES, host.event(effect=decision_pb2.Effect(decision_id="stray")))
    assert host.controller.run("run").applied == 0


# Trust.


@pytest.mark.parametrize(
    ("mode", "disposition"),
    [
        (decision_pb2.MODE_OBSERVE, decision_pb2.DISPOSITION_SHADOWED),
        (decision_pb2.MODE_UNSPECIFIED, decision_pb2.DISPOSITION_SHADOWED),
        (decision_pb2.MODE_ADVISE, decision_pb2.DISPOSITION_PENDING),
    ],
)
def test_without_trust_nothing_is_sent(tools, tmp_path, mode, disposition):
    host = tools.Host(tools.controller(tmp_path), mode=mode)
    host.start()
    told = [tools.told(host.report(step)) for step in range(100, 1500, 100)]
    taken = [one.decisions[0].disposition for one in told if one.decisions[0].HasField("target")]
    assert set(taken) == {disposition}
    assert not any(one.commands for one in told)


@pytest.fixture
def advised(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path), mode=decision_pb2.MODE_ADVISE)
    host.start()
    step = 100
    while not host.controller.pending("run"):
        host.report(step)
        step += 100
    return host


def test_an_approved_decision_is_sent_once(tools, advised):
    decision_id = advised.controller.pending("run")[0].decision_id
    told = tools.told(advised.controller.approve("run", decision_id, NOW))
    assert told.decisions[0].disposition == decision_pb2.DISPOSITION_SENT
    assert told.commands[0].decision_id == decision_id
    with pytest.raises(NotPendingError, match="it is sent"):
        advised.controller.approve("run", decision_id, NOW)


def test_a_vetoed_decision_is_not_sent_and_keeps_the_reason(tools, advised):
    decision_id = advised.controller.pending("run")[0].decision_id
    told = tools.told(advised.controller.veto("run", decision_id, "not today", NOW))
    assert told.decisions[0].disposition == decision_pb2.DISPOSITION_VETOED
    assert "not today" in told.decisions[0].reason
    assert not told.commands
    assert not advised.controller.pending("run")


def test_a_decision_that_expired_is_not_pending(advised):
    decision_id = advised.controller.pending("run")[0].decision_id
    advised.report(advised.controller.run("run").step + 5000)
    with pytest.raises(NotPendingError, match="expired"):
        advised.controller.approve("run", decision_id, NOW)
    with pytest.raises(NotPendingError, match="no such decision"):
        advised.controller.approve("run", "other", NOW)


def test_a_paused_run_takes_no_decisions_until_it_is_resumed(tools, host):
    assert host.controller.pause("run").status == runs_pb2.RUN_STATUS_PAUSED
    assert host.report(100) == []
    assert host.controller.resume("run").status == runs_pb2.RUN_STATUS_RUNNING
    assert tools.told(host.report(200)).decisions


def test_limits_change_field_by_field(tools, host):
    before = host.controller.set_limits("run", graph_pb2.RunLimits())
    after = host.controller.set_limits("run", graph_pb2.RunLimits(warmup_steps=900))
    assert after.warmup_steps == 900
    assert after.max_live_seeds == before.max_live_seeds
    assert host.report(800) == []
    assert host.report(900)


def test_an_unknown_run_is_said_to_be_unknown(host):
    for ask in (host.controller.run, host.controller.state, host.controller.pending, host.controller.pause):
        with pytest.raises(UnknownRunError, match="'other'"):
            ask("other")
    with pytest.raises(UnknownRunError):
        host.controller.approve("other", "d", NOW)
    assert host.controller.state("run") is None


# Seeds.


def seed(tools, host, **values):
    return health_pb2.SeedSignal(
        **{
            "seed_id": "s1",
            "place": 5,
            "stage": health_pb2.SEED_STAGE_HOLDING,
            "steps_in_stage": 500,
            "blueprint": "mlp",
            "parameters": 50,
            **values,
        }
    )


def test_a_seed_is_settled_by_rule_once_and_not_as_experience_of_the_policy(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, policy="nothing"))
    host.start()
    told = tools.told(host.report(100, [seed(tools, host, ablation_contribution=-0.1)], held_out_loss=0.5))
    culled = next(decision for decision in told.decisions if decision.policy == "lifecycle")
    assert culled.action.WhichOneof("kind") == "cull"
    assert culled.target.seed_id == "s1"
    assert told.commands[0].decision_id == culled.decision_id
    again = tools.told(host.report(150, [seed(tools, host, ablation_contribution=-0.1)]))
    assert not again.decisions
    host.answer(told.commands[0], step=160, added=-50)
    after = tools.told(host.report(200))
    assert [experience.decision.policy for experience in after.experience] == ["nothing"]
    assert after.experience[0].next_state.adaptations[0].action == "cull"
    assert after.experience[0].next_state.adaptations[0].blueprint == "mlp"
    assert "embargo" in [rule.rule for rule in after.decisions[0].rules]


def test_a_settlement_that_was_lost_is_asked_for_again(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, policy="nothing"))
    host.start()
    kinds = [
        [d.action.WhichOneof("kind") for d in tools.told(host.report(step, [seed(tools, host)])).decisions]
        for step in (10, 60, 110)
    ]
    assert kinds == [["fossilise"], [], ["fossilise", "none"]]


# Rewards.


def test_the_reward_compares_with_the_twin_that_ran_before(tools, tmp_path):
    controller = tools.controller(tmp_path, max_runs=1)
    twin = tools.Host(controller, "twin", policy="nothing")
    twin.start()
    for step, loss in ((100, 1.0), (200, 0.9), (300, 0.8)):
        twin.report(step, held_out_loss=loss)
    twin.end(300)
    host = tools.Host(controller, "run", paired_run="twin", parameters=1000)
    host.start()
    assert [run.run_id for run in controller.runs()] == ["run"]
    host.report(100, held_out_loss=1.0)
    told = tools.told(host.report(200, held_out_loss=0.45))
    assert told.experience[0].reward.total == pytest.approx(math.log(2), abs=1e-5)
    ended = tools.told(host.end(300, held_out_loss=0.4))
    assert ended.experience[0].reward.total == pytest.approx(0, abs=1e-5)
    assert ended.experience[0].done


def test_the_parameters_that_were_added_are_paid_for(tools, tmp_path):
    controller = tools.controller(tmp_path)
    twin = tools.Host(controller, "twin")
    twin.start()
    host = tools.Host(controller, "run", paired_run="twin", parameters=1000)
    host.start()
    for step in range(100, 5000, 100):
        twin.report(step, held_out_loss=1.0)
    step, told = run_until_command(tools, host)
    host.answer(told.commands[0], step=step + 1, added=500)
    reward = tools.told(host.report(step + 100, held_out_loss=1.0)).experience[0].reward
    assert reward.total == pytest.approx(-0.02 * 0.5)


# Disorder.


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
    assert [decision.step for decision in tools.told(host.start()).decisions] == [100, 200]


def test_only_so_many_events_are_held(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, decision_interval_steps=1, warmup_steps=0))
    for step in range(1, MAX_HELD_EVENTS + 51):
        host.report(step)
    decided = tools.told(host.start()).decisions
    assert [decided[0].step, decided[-1].step, len(decided)] == [51, MAX_HELD_EVENTS + 50, MAX_HELD_EVENTS]


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
    hosts = [tools.Host(controller, name) for name in ("a", "b", "c", "d")]
    for host in hosts[:2]:
        host.start()
    hosts[1].end(10)
    hosts[2].start()
    assert [run.run_id for run in controller.runs()] == ["c", "a"]
    hosts[3].start()
    assert [run.run_id for run in controller.runs()] == ["d", "c"]


# Sameness.


def play(tools, path, **settings):
    host = tools.Host(tools.controller(path, **settings))
    outgoing = list(host.start())
    for step in range(100, 1500, 100):
        answers = host.report(step, held_out_loss=1.0)
        outgoing += answers
        for command in tools.told(answers).commands:
            outgoing += host.answer(command, step=step + 1)
    outgoing += host.end(1500)
    return host, [event.SerializeToString(deterministic=True) for _, event in outgoing]


def test_the_same_events_give_the_same_answers(tools, tmp_path):
    assert play(tools, tmp_path)[1] == play(tools, tmp_path)[1]
    assert play(tools, tmp_path)[1] != play(tools, tmp_path, random_seed=8)[1]


@settings(max_examples=12, deadline=None)
@given(crash=st.integers(1, 12))
def test_a_controller_rebuilt_from_the_record_goes_on_as_if_nothing_had_been(tools, tmp_path_factory, crash):
    path = tmp_path_factory.mktemp("policies")
    host = tools.Host(tools.controller(path))
    record, after = [], []
    host.start()
    for step in range(100, 1300, 100):
        answers = host.report(step)
        if step > 100 * crash:
            after += answers
        else:
            record += [item for item in answers if item[0] == event_pb2.KIND_DECISIONS]
        for command in tools.told(answers).commands:
            host.answer(command, step=step + 1)
    split = next(
        (
            index
            for index, (_, event) in enumerate(host.said)
            if event.HasField("health_report") and event.health_report.step > 100 * crash
        ),
        len(host.said),
    )
    rebuilt = tools.controller(path)
    rebuilt.rebuild(host.said[:split] + record)
    again = [item for kind, event in host.said[split:] for item in rebuilt.handle(kind, event)]
    assert again == after


def test_rebuilding_decides_nothing_that_was_not_decided_then(tools, host, tmp_path):
    host.report(100)
    host.report(200)
    rebuilt = tools.controller(tmp_path)
    rebuilt.rebuild(host.said)
    assert rebuilt.run("run").decisions == 0
    assert rebuilt.run("run").step == 200


def test_a_report_that_comes_again_after_rebuilding_is_not_decided_on_anew(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, random_seed=None))
    host.start()
    first = host.report(100)
    rebuilt = tools.controller(tmp_path, random_seed=None)
    rebuilt.rebuild([host.said[0], first[0]])
    assert rebuilt.handle(*host.said[1]) == first


def test_rebuilding_leaves_out_what_is_malformed(tools, host, tmp_path):
    bad = host.event(run_ended=run_pb2.RunEnded(run=health_pb2.RunMeasures(train_loss=math.nan)))
    rebuilt = tools.controller(tmp_path)
    rebuilt.rebuild([*host.said, (EVENTS, bad)])
    assert rebuilt.run("run").status == runs_pb2.RUN_STATUS_RUNNING


# The analyzer's part in it.


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
        report.seeds.append(seed(tools, host, stage=health_pb2.SEED_STAGE_BLENDING))
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
