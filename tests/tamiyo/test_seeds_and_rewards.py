import math

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.v1 import event_pb2

NOW = Timestamp(seconds=5)
TELEMETRY, EVENTS, OUTCOMES = event_pb2.KIND_TELEMETRY, event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES


def test_a_seed_is_settled_by_rule_once_and_not_as_experience_of_the_policy(tools, tmp_path):
    host = tools.Host(tools.controller(tmp_path, policy="nothing"))
    host.start()
    told = tools.told(host.report(100, [tools.seed(ablation_contribution=-0.1)], held_out_loss=0.5))
    culled = next(decision for decision in told.decisions if decision.policy == "lifecycle")
    assert culled.action.WhichOneof("kind") == "cull"
    assert culled.target.seed_id == "s1"
    assert told.commands[0].decision_id == culled.decision_id
    again = tools.told(host.report(150, [tools.seed(ablation_contribution=-0.1)]))
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
        [d.action.WhichOneof("kind") for d in tools.told(host.report(step, [tools.seed()])).decisions]
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
    step, told = tools.until_command(host)
    host.answer(told.commands[0], step=step + 1, added=500)
    reward = tools.told(host.report(step + 100, held_out_loss=1.0)).experience[0].reward
    assert reward.total == pytest.approx(-0.02 * 0.5)
