import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.tamiyo.controller import NotPendingError, UnknownRunError
from esperml.tamiyo.experience import was_carried_out
from esperml.tamiyo.validate import check_state
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, run_pb2, runs_pb2

NOW = Timestamp(seconds=5)
TELEMETRY, EVENTS, OUTCOMES = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES


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
    step, told = tools.until_command(host)
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
    step, told = tools.until_command(host)
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
    step, told = tools.until_command(host)
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
    step, told = tools.until_command(host)
    host.answer(told.commands[0], status=decision_pb2.COMMAND_STATUS_REFUSED, step=step)
    after = tools.told(host.report(step + 100))
    assert "embargo" in [finding.rule for finding in after.decisions[0].rules]
    assert not was_carried_out(after.experience[0])
    assert after.experience[0].applied.status == decision_pb2.COMMAND_STATUS_REFUSED
    assert host.controller.run("run").refused == 1


def test_what_the_host_undid_is_experience_and_its_place_rests(tools, host):
    step, told = tools.until_command(host)
    host.answer(told.commands[0], step=step)
    host.answer(told.commands[0], status=decision_pb2.COMMAND_STATUS_UNDONE, step=step + 50)
    after = tools.told(host.report(step + 100))
    assert "embargo" in [finding.rule for finding in after.decisions[0].rules]
    assert was_carried_out(after.experience[0])
    assert (host.controller.run("run").applied, host.controller.run("run").refused) == (1, 0)


def test_an_expired_command_releases_its_place(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, command_ttl_steps=150, max_live_seeds=1))
    host.start()
    step, _ = tools.until_command(host)
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
    notices = [notice for one in told for notice in one.notices]
    assert {notice.code for notice in notices} == {run_pb2.NOTICE_CODE_PROPOSED}
    assert [notice.decision.disposition for notice in notices] == taken


def test_nothing_is_proposed_where_tamiyo_acts(tools, host):
    assert not any(tools.told(host.report(step)).notices for step in range(100, 1500, 100))


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
    assert told.notices[0].decision == told.decisions[0]
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
