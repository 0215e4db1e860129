"""Commands: what a session carries out, what it refuses, and what becomes of a seed."""

from __future__ import annotations

import pytest
from torch.optim import lr_scheduler

from esperml import kasmina
from esperml.v1 import decision_pb2, graph_pb2, health_pb2

APPLIED, REFUSED, EXPIRED = (
    decision_pb2.COMMAND_STATUS_APPLIED,
    decision_pb2.COMMAND_STATUS_REFUSED,
    decision_pb2.COMMAND_STATUS_EXPIRED,
)


def connect(here, bench, **kwargs):
    kwargs = {"run": "r", "mode": "act", "report_every": 5, "overhead_ceiling": None, **kwargs}
    return kasmina.connect(bench.link, here.model, here.optimizer, **kwargs)


def train(here, session, steps, **told):
    return [here.step(session, **told) for _ in range(steps)]


def test_a_seed_lives_its_whole_life_on_command(case, bench, germination, on_seed):
    here = case("mlp")
    limits = graph_pb2.RunLimits(hold_steps=4)
    scheduler = lr_scheduler.CosineAnnealingLR(here.optimizer, 100)
    with connect(here, bench, evaluate=here.evaluate, limits=limits, scheduler=scheduler) as session:
        bench.waiting.append(germination("0", "2", blend_steps=4, budget=60))
        train(here, session, 5)
        applied = bench.applied[0]
        assert (applied.decision_id, applied.status, applied.step) == ("d-1", APPLIED, 5)
        assert 0 < applied.parameters_added <= 60
        assert applied.structure_version == 2
        changed = bench.payloads("structure_changed")[0]
        assert (changed.step, changed.decision_id, changed.graph.structure_version) == (5, "d-1", 2)
        train(here, session, 5)
        seed = bench.reports[1].seeds[0]
        assert (seed.seed_id, seed.blueprint, seed.stage) == (applied.seed_id, "mlp", health_pb2.SEED_STAGE_HOLDING)
        assert seed.alpha == 1
        assert seed.gradient_norm > 0
        assert not seed.HasField("ablation_contribution")
        train(here, session, 5)
        effect = bench.payloads("effect")[0]
        assert (effect.decision_id, effect.basis) == ("d-1", decision_pb2.BASIS_ABLATION)
        seed = bench.reports[2].seeds[0]
        assert seed.ablation_contribution == pytest.approx(effect.loss_reduction)
        bench.waiting.append(on_seed(applied.seed_id, "d-2", fossilise=decision_pb2.Fossilise()))
        train(here, session, 10)
    assert len(bench.payloads("effect")) == 1
    assert bench.applied[1].status == APPLIED
    assert bench.reports[-1].seeds[0].stage == health_pb2.SEED_STAGE_FOSSILISED
    assert bench.reports[-1].run.parameters > bench.reports[0].run.parameters
    assert session.decisions_applied == 2
    text = str(session.summary())
    assert "germinate mlp from 0 to 2: done" in text
    assert "fossilised" in text


def test_the_ablation_is_the_loss_without_the_seed(case, bench, germination):
    here = case("mlp")
    with connect(here, bench, evaluate=here.evaluate, limits=graph_pb2.RunLimits(hold_steps=0)) as session:
        bench.waiting.append(germination("0", "2"))
        train(here, session, 10)
        seed = next(iter(kasmina.host_of(here.model).seeds.values()))
        seed.alpha = 0.0
        without = here.evaluate(here.model)
        seed.alpha = 1.0
        assert seed.ablation_contribution == pytest.approx(without - here.evaluate(here.model), abs=1e-6)
    assert session.summary().seeds[0].HasField("ablation_contribution")


def test_a_culled_seed_leaves_the_host_as_it_was(case, bench, germination, on_seed):
    here = case("mlp")
    with connect(here, bench) as session:
        keys = list(here.model.state_dict())
        bench.waiting.append(germination("0", "2"))
        train(here, session, 5)
        seed_id = bench.applied[0].seed_id
        bench.waiting.append(on_seed(seed_id, "d-2", set_alpha=decision_pb2.SetAlpha(alpha=0.5)))
        bench.waiting.append(on_seed(seed_id, "d-3", cull=decision_pb2.Cull()))
        train(here, session, 5)
    assert [applied.status for applied in bench.applied] == [APPLIED] * 3
    assert bench.applied[2].parameters_added == -bench.applied[0].parameters_added
    # The alpha of a seed is no part of the structure.
    assert len(bench.payloads("structure_changed")) == 2
    assert list(here.model.state_dict()) == keys


def test_a_command_that_comes_again_does_nothing(case, bench, germination):
    here = case("mlp")
    with connect(here, bench) as session:
        bench.waiting += [germination("0", "2")] * 3
        train(here, session, 5)
        bench.waiting += [germination("0", "2")] * 3
        train(here, session, 5)
    assert len(bench.applied) == 1
    assert session.decisions_applied == 1


@pytest.mark.parametrize(
    ("limits", "settings", "reason"),
    [
        ({}, {"source": "x", "target": "2"}, "unknown layer 'x'"),
        ({}, {"source": "0", "target": "6"}, "there is no place from '0' to '6'"),
        ({}, {"blueprint": "tree"}, "unknown blueprint 'tree'"),
        ({}, {"budget": 0}, "parameter_budget must be at least 1"),
        ({}, {"budget": 5}, "over budget: the smallest 'mlp' here has"),
        ({}, {"decision_id": ""}, "decision_id is required"),
        ({"graft_parameter_budget": 7}, {}, "over budget: the smallest 'mlp' here has"),
        ({"parameter_budget": 7}, {}, "over budget: the smallest 'mlp' here has"),
        ({"max_live_seeds": 0}, {}, "allows 0 live seeds, and there are 0"),
        ({"warmup_steps": 6}, {}, "nothing before step 6; this is step 5"),
        ({"last_germination_step": 4}, {}, "no germination after step 4; this is step 5"),
    ],
)
def test_what_breaks_the_limits_or_makes_no_sense_is_refused_by_name(
    case, bench, germination, limits, settings, reason
):
    here = case("mlp")
    with connect(here, bench, limits=graph_pb2.RunLimits(**limits)) as session:
        bench.waiting.append(germination(**{"source": "0", "target": "2", **settings}))
        train(here, session, 5)
    assert bench.applied[0].status == REFUSED
    assert reason in bench.applied[0].reason
    assert not bench.payloads("structure_changed")
    assert session.decisions_refused == 1
    assert reason in str(session.summary())


@pytest.mark.parametrize(
    "action",
    [
        {"set_alpha": decision_pb2.SetAlpha(alpha=1)},
        {"fossilise": decision_pb2.Fossilise()},
        {"cull": decision_pb2.Cull()},
    ],
)
def test_commands_about_unknown_seeds_are_refused(case, bench, on_seed, action):
    here = case("mlp")
    with connect(here, bench) as session:
        bench.waiting.append(on_seed("ghost", "d-1", **action))
        train(here, session, 5)
    assert (bench.applied[0].status, bench.applied[0].reason) == (REFUSED, "unknown seed 'ghost'")


@pytest.mark.parametrize("action", [None, decision_pb2.Action(none=decision_pb2.NoAction())])
def test_a_command_without_an_action_is_refused(case, bench, action):
    here = case("mlp")
    with connect(here, bench) as session:
        bench.waiting.append(decision_pb2.Command(decision_id="d", action=action))
        train(here, session, 5)
    assert "nothing to carry out" in bench.applied[0].reason


def test_an_expired_command_is_not_carried_out(case, bench, germination):
    here = case("mlp")
    with connect(here, bench) as session:
        bench.waiting.append(germination("0", "2", expires=4))
        train(here, session, 5)
    assert bench.applied[0].status == EXPIRED
    assert "expired after step 4; this is step 5" in bench.applied[0].reason


def test_an_observed_run_refuses_everything(case, bench, germination):
    here = case("mlp")
    with connect(here, bench, mode="observe") as session:
        bench.waiting.append(germination("0", "2"))
        train(here, session, 5)
    assert (bench.applied[0].status, bench.applied[0].reason) == (REFUSED, "the run is only observed")


def test_the_budget_of_a_run_is_shared_by_its_seeds(case, bench, germination):
    here = case("mlp")
    with connect(here, bench, limits=graph_pb2.RunLimits(parameter_budget=100)) as session:
        bench.waiting.append(germination("0", "0", decision_id="a", budget=80))
        bench.waiting.append(germination("2", "2", decision_id="b", budget=80, blueprint="low_rank"))
        train(here, session, 5)
    assert [applied.status for applied in bench.applied] == [APPLIED, APPLIED]
    assert sum(applied.parameters_added for applied in bench.applied) <= 100


def test_an_occupied_place_is_refused(case, bench, germination):
    here = case("mlp")
    with connect(here, bench) as session:
        bench.waiting += [germination("0", "0", decision_id="a"), germination("0", "0", decision_id="b")]
        train(here, session, 5)
    assert "the place holds seed 'seed-a', which is germinated" in bench.applied[1].reason


def test_long_decision_ids_give_short_seed_names_that_differ(case, bench, germination):
    here = case("mlp")
    with connect(here, bench) as session:
        for i in range(3):
            bench.waiting.append(germination(str(2 * i), str(2 * i), decision_id=f"0123456789.{i}"))
        train(here, session, 5)
    names = [applied.seed_id for applied in bench.applied]
    assert names[0] == "seed-01234567"
    assert len(set(names)) == 3
