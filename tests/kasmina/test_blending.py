"""How a seed comes in: training apart, schedules of alpha, and smaller steps at first."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esperml import kasmina
from esperml.kasmina import schedules, stages
from esperml.kasmina.evaluation import evaluate_without
from esperml.v1 import decision_pb2

SCHEDULES = decision_pb2.AlphaSchedule.values()


@given(schedule=st.sampled_from(SCHEDULES), steps=st.integers(0, 60))
def test_every_schedule_rises_from_near_0_to_1(schedule, steps):
    alphas = [schedules.alpha_at(schedule, step, steps) for step in range(1, steps + 3)]
    assert alphas == sorted(alphas)
    assert all(0 < alpha <= 1 for alpha in alphas)
    assert alphas[max(0, steps - 1) :] == [1.0] * (3 if steps else 2)
    if steps > 1 and schedule > decision_pb2.ALPHA_SCHEDULE_LINEAR:
        assert alphas[0] < 1 / steps or steps == 2
        assert schedules.alpha_at(schedule, steps, 2 * steps) == pytest.approx(0.5)


def test_a_schedule_is_linear_unless_it_is_said_otherwise():
    assert [schedules.alpha_at(schedules.LINEAR, step, 4) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1, 1]


def plant(here, **options):
    host = kasmina.host_of(here.model)
    grafter = kasmina.Grafter(host, here.optimizer)
    return grafter, grafter.germinate("mlp", "0", "2", 500, seed_id="s", **options)


def gradients_of(here, seed):
    here.model.zero_grad()
    here.loss().backward()
    own = {id(parameter) for parameter in seed.body.parameters()}
    return [p.grad.clone() for p in here.model.parameters() if id(p) not in own]


def test_a_seed_that_trains_apart_learns_and_the_host_does_not_notice(case):
    plain, here = case("mlp"), case("mlp")
    grafter, seed = plant(here, train_steps=3, blend_steps=2)
    seen = []
    for _ in range(3):
        seen.append(stages.stage_name(seed.stage))
        assert torch.equal(here.logits(), plain.logits())
        for one, other in zip(gradients_of(here, seed), gradients_of(plain, seed), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(here.loss(), plain.loss())
        for each in (here, plain):
            each.optimizer.step()
        grafter.advance()
    assert seed.body.out.weight.any()
    seen.append(stages.stage_name(seed.stage))
    assert seen == ["germinated", "training", "training", "blending"]
    assert (seed.alpha, seed.errors) == (0.5, 0)
    assert not torch.equal(here.logits(), plain.logits())


def test_a_command_ends_training_apart(case):
    here = case("mlp")
    grafter, seed = plant(here, train_steps=50, blend_steps=2)
    grafter.advance()
    assert seed.stage == stages.TRAINING
    grafter.set_alpha("s", 0.5)
    grafter.advance()
    assert (seed.stage, seed.alpha) == (stages.BLENDING, 0.5)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_newborn_parameters_warm_up_under_any_scheduler(case, rate):
    here = case("mlp")
    here.optimizer = torch.optim.Adam(here.model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(here.optimizer, 0.5)
    host = kasmina.host_of(here.model)
    grafter = kasmina.Grafter(host, here.optimizer, scheduler)
    seed = grafter.germinate("mlp", "2", "2", 500, seed_id="s", warmup_steps=4)
    used = []
    here.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append([float(group["lr"]) for group in optimizer.param_groups])
    )
    for step in range(6):
        here.step()
        grafter.advance()
        scheduler.step()
        rates = [float(group["lr"]) for group in here.optimizer.param_groups]
        assert rates == pytest.approx([0.1 * 0.5 ** (step + 1)] * 2)
    assert [newborn / own for own, newborn in used] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert seed.errors == 0
    grafter.advance()
    assert len(here.optimizer._optimizer_step_pre_hooks) == 1


def test_warming_up_ends_with_the_seed_and_survives_a_step_that_fails(case):
    here = case("mlp")
    grafter, seed = plant(here, warmup_steps=10)
    here.loss().backward()
    group = here.optimizer.param_groups[1]
    failing = here.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            here.optimizer.step()
    failing.remove()
    here.optimizer.step()
    assert group["lr"] == 1e-2
    grafter.cull("s")
    assert not here.optimizer._optimizer_step_pre_hooks
    assert not here.optimizer._optimizer_step_post_hooks
    here.step()
    assert seed.stage == stages.CULLED


def test_a_command_says_how_a_seed_comes_in(case, bench, germination):
    here = case("mlp")
    command = germination("0", "2", blend_steps=4)
    command.action.germinate.train_steps = 2
    command.action.germinate.schedule = decision_pb2.ALPHA_SCHEDULE_COSINE
    command.action.germinate.warmup_steps = 3
    with kasmina.connect(bench.link, here.model, here.optimizer, run="r", mode="act", report_every=1) as session:
        bench.waiting.append(command)
        for _ in range(9):
            here.step(session)
    assert session.failure == ""
    told = [(stages.stage_name(s.stage), round(s.alpha, 3)) for report in bench.reports for s in report.seeds]
    assert told[:6] == [
        ("training", 0.0),
        ("blending", 0.146),
        ("blending", 0.5),
        ("blending", 0.854),
        ("holding", 1.0),
        ("holding", 1.0),
    ]


def test_without_its_seed_alpha_is_put_back_whatever_the_evaluator_does(case):
    here = case("mlp")
    _, seed = plant(here)
    nn.init.normal_(seed.body.out.weight)
    plain = copy.deepcopy(here)
    kasmina.Grafter(kasmina.host_of(plain.model), None).cull("s")
    assert evaluate_without(here.model, seed, here.evaluate) == pytest.approx(plain.evaluate(plain.model))

    def fail(_model):
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        evaluate_without(here.model, seed, fail)
    assert seed.alpha == 1
