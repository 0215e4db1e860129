"""Grafts on live hosts and their optimizers."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from esperml import kasmina
from esperml.kasmina import stages


def every_graft(host):
    return [
        (blueprint, place)
        for place in host.places
        for i, blueprint in enumerate(host.blueprints)
        if place.fitting >> i & 1
    ]


def plant(grafter, blueprint="mlp", place=0, seed_id="s", budget=10**4, **kwargs):
    host = grafter.host
    where = host.places[place]
    names = [host.layers[i].name for i in (where.source, where.target)]
    return grafter.germinate(blueprint, *names, budget, seed_id=seed_id, **kwargs)


def test_every_graft_at_every_place_preserves_trains_and_leaves_no_trace(any_case):
    host = kasmina.host_of(any_case.model)
    grafter = kasmina.Grafter(host, any_case.optimizer)
    keys = list(any_case.model.state_dict())
    for blueprint, place in every_graft(host):
        before = any_case.logits()
        number = host.places.index(place)
        seed = plant(grafter, blueprint.name, number, budget=blueprint.smallest(place.geometry) * 12)
        assert torch.allclose(any_case.logits(), before, atol=1e-6)
        born = [p.detach().clone() for p in seed.body.parameters()]
        for _ in range(3):
            any_case.step()
            grafter.advance()
        assert seed.errors == 0, seed.last_error
        moved = [not torch.equal(a, b) for a, b in zip(born, seed.body.parameters(), strict=True)]
        assert any(moved)
        assert list(any_case.model.state_dict()) != keys
        grafter.cull("s")
        assert list(any_case.model.state_dict()) == keys
        assert len(any_case.optimizer.param_groups) == 1
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_case.model.modules())


def test_a_seed_of_two_layers_reads_the_source_s_input(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    seed = grafter.germinate("low_rank", "0", "2", 10**4, seed_id="s")
    nn.init.normal_(seed.body.up.weight)
    x = here.inputs[0]
    hidden = torch.relu(here.model[0](x))
    expected = here.model[2].weight @ hidden.T + here.model[2].bias[:, None]
    got = {}
    handle = here.model[2].register_forward_hook(lambda _m, _a, output: got.update(output=output))
    here.model(x)
    handle.remove()
    assert torch.allclose(got["output"], expected.T + seed.body.up(seed.body.down(x)), atol=1e-5)


def test_alpha_scales_the_graft_and_at_zero_it_is_left_out(case):
    here = case("mlp")
    plain = here.logits()
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    seed = plant(grafter, "low_rank", place=3)
    nn.init.normal_(seed.body.up.weight)
    full = here.logits()
    grafter.set_alpha("s", 0.5)
    half = here.logits()
    grafter.set_alpha("s", 0.0)
    assert torch.equal(here.logits(), plain)
    assert torch.allclose(half, (plain + full) / 2, atol=1e-5)


def test_two_seeds_may_end_at_one_layer(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    grafter.germinate("mlp", "2", "2", 500, seed_id="one")
    grafter.germinate("gate", "0", "2", 500, seed_id="two")
    here.step()
    grafter.cull("one")
    assert "2.kasmina_seeds.two.hidden.weight" in here.model.state_dict()
    grafter.cull("two")
    assert not hasattr(here.model[2], "kasmina_seeds")


def test_culling_restores_a_host_that_was_frozen_meanwhile(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    before = here.logits()
    seed = plant(grafter)
    nn.init.normal_(seed.body.out.weight)
    grafter.cull("s")
    assert torch.equal(here.logits(), before)


def test_germinating_in_double_precision_keeps_it(case):
    here = case("mlp")
    here.model.double()
    seed = plant(kasmina.Grafter(kasmina.host_of(here.model), here.optimizer))
    assert {p.dtype for p in seed.body.parameters()} == {torch.float64}
    assert here.model(here.inputs[0].double()).dtype == torch.float64


def test_newborn_parameters_join_with_the_present_hyperparameters(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    here.step()
    state = copy.deepcopy(here.optimizer.state_dict()["state"])
    here.optimizer.param_groups[0]["lr"] = 0.123
    seed = plant(grafter)
    first, newborn = here.optimizer.param_groups
    assert {k: v for k, v in first.items() if k != "params"} == {k: v for k, v in newborn.items() if k != "params"}
    assert newborn["params"] == list(seed.body.parameters())
    after = here.optimizer.state_dict()["state"]
    assert all(torch.equal(state[i]["exp_avg"], after[i]["exp_avg"]) for i in state)


def test_culling_takes_group_and_state_away(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    plant(grafter, place=0, seed_id="a")
    seed = plant(grafter, place=1, seed_id="b")
    kept = plant(grafter, place=2, seed_id="c")
    here.step()
    assert all(p in here.optimizer.state for p in seed.body.parameters())
    grafter.cull("b")
    assert not any(p in here.optimizer.state for p in seed.body.parameters())
    assert [g["params"] for g in here.optimizer.param_groups][2] == list(kept.body.parameters())
    here.step()


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 10)], [4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers_go_on_as_if_nothing_had_happened(case, name):
    plain, grown = case("mlp"), case("mlp")
    schedulers = [SCHEDULERS[name](c.optimizer) for c in (plain, grown)]
    grafter = kasmina.Grafter(kasmina.host_of(grown.model), grown.optimizer, schedulers[1])
    for step in range(14):
        if step == 3:
            plant(grafter, place=0, seed_id="a")
            plant(grafter, place=1, seed_id="b")
        if step == 9:
            grafter.cull("a")
        for c, scheduler in zip((plain, grown), schedulers, strict=True):
            c.step()
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
        rates = [group["lr"] for group in grown.optimizer.param_groups]
        assert rates == pytest.approx([plain.optimizer.param_groups[0]["lr"]] * len(rates))
        assert len(schedulers[1].get_last_lr()) == len(rates)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers_take_newborn_parameters_too(case, make):
    here = case("mlp")
    here.optimizer = make(here.model.parameters(), lr=torch.tensor(1e-2) if make is torch.optim.Adam else 1e-2)
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    here.step()
    seed = plant(grafter)
    born = [parameter.detach().clone() for parameter in seed.body.parameters()]
    here.step()
    assert any(not torch.equal(one, other) for one, other in zip(born, seed.body.parameters(), strict=True))
    grafter.cull("s")
    assert len(here.optimizer.param_groups) == 1
    assert not {id(parameter) for parameter in seed.body.parameters()} & {id(known) for known in here.optimizer.state}
    before = [parameter.detach().clone() for parameter in here.model.parameters()]
    here.step()
    assert any(not torch.equal(one, other) for one, other in zip(before, here.model.parameters(), strict=True))


def test_named_parameters_stay_named(case):
    here = case("mlp")
    here.optimizer = torch.optim.AdamW(here.model.named_parameters())
    plant(kasmina.Grafter(kasmina.host_of(here.model), here.optimizer))
    assert here.optimizer.param_groups[1]["param_names"][0] == "s.hidden.weight"


def test_an_optimizer_of_one_group_refuses(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), torch.optim.LBFGS(here.model.parameters()))
    with pytest.raises(kasmina.RefusedError, match="LBFGS keeps all parameters in one group"):
        plant(grafter)
    assert not kasmina.host_of(here.model).seeds


def test_a_host_without_an_optimizer_can_grow(case):
    here = case("mlp")
    host = kasmina.host_of(here.model)
    grafter = kasmina.Grafter(host, None)
    seed = plant(grafter)
    assert host.seeds == {"s": seed}
    assert len(here.optimizer.param_groups) == 1
    grafter.cull("s")
    assert host.seeds == {}
    assert host.seed_parameters == 0


def test_a_fossil_trains_on_and_closes_its_place(case):
    here = case("mlp")
    host = kasmina.host_of(here.model)
    grafter = kasmina.Grafter(host, here.optimizer)
    seed = plant(grafter)
    with pytest.raises(kasmina.RefusedError, match="from germinated to fossilised"):
        grafter.fossilise("s")
    grafter.advance()
    grafter.fossilise("s")
    assert seed.stage == stages.FOSSILISED
    before = seed.body.out.weight.clone()
    here.step()
    assert not torch.equal(before, seed.body.out.weight)
    assert host.graph().places.blueprints[0] == 0
    for change in (lambda: grafter.cull("s"), lambda: grafter.set_alpha("s", 0.5), lambda: plant(grafter, seed_id="t")):
        with pytest.raises(kasmina.RefusedError, match="fossilised"):
            change()
    assert host.structure_version == 3
    assert host.live_seeds == 0
    assert host.seed_parameters == seed.parameter_count


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: g.germinate("mlp", "nowhere", "2", 100, seed_id="s"), "unknown layer 'nowhere'"),
        (lambda g: g.germinate("mlp", "0", "6", 100, seed_id="s"), "no place from '0' to '6'"),
        (lambda g: g.germinate("tree", "0", "2", 100, seed_id="s"), "unknown blueprint 'tree'; this host can grow low"),
        (lambda g: g.germinate("mlp", "0", "2", 3, seed_id="s"), "over budget: the smallest 'mlp' here has"),
        (lambda g: g.germinate("mlp", "0", "2", 100, seed_id="a.b"), "has a dot in it"),
        (lambda g: g.set_alpha("ghost", 0.5), "unknown seed 'ghost'"),
        (lambda g: g.fossilise("ghost"), "unknown seed 'ghost'"),
        (lambda g: g.cull("ghost"), "unknown seed 'ghost'"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_changes_nothing(case, change, reason):
    here = case("mlp")
    host = kasmina.host_of(here.model)
    with pytest.raises(kasmina.RefusedError, match=reason):
        change(kasmina.Grafter(host, here.optimizer))
    assert (host.structure_version, host.seeds, len(here.optimizer.param_groups)) == (1, {}, 1)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_out_of_range_is_refused(case, alpha):
    grafter = kasmina.Grafter(kasmina.host_of((here := case("mlp")).model), here.optimizer)
    plant(grafter)
    with pytest.raises(kasmina.RefusedError, match="outside 0 to 1"):
        grafter.set_alpha("s", alpha)


class Failing(nn.Module):
    def __init__(self, result) -> None:
        super().__init__()
        self.result = result
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, output):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (RuntimeError("no memory"), "RuntimeError: no memory"),
        (KeyError("k"), "KeyError"),
        (torch.zeros(3), r"gave \(3,\) where \(16, 8\) is due"),
        (None, "gave NoneType where"),
    ],
)
def test_a_seed_that_fails_is_left_out_and_counted(case, result, error):
    here = case("mlp")
    host = kasmina.host_of(here.model)
    host.blueprints += (kasmina.Blueprint("bad", lambda g: True, lambda g, s: 1, lambda g, s: Failing(result)),)
    before = here.logits()
    seed = plant(kasmina.Grafter(host, here.optimizer), "bad")
    assert torch.equal(here.logits(), before)
    assert seed.errors == 1
    assert re.search(error, seed.last_error)
    here.step()


def test_a_target_that_runs_without_its_source_leaves_the_seed_out(case):
    here = case("mlp")
    seed = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer).germinate("mlp", "0", "2", 500, seed_id="s")
    here.model[2](torch.randn(4, 8))
    assert (seed.errors, seed.last_error) == (1, "its source layer did not run before its target")


def test_a_seed_follows_autocast(case):
    here = case("mlp")
    seed = plant(kasmina.Grafter(kasmina.host_of(here.model), here.optimizer))
    nn.init.normal_(seed.body.out.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert here.model(here.inputs[0]).dtype == torch.bfloat16
    assert seed.errors == 0


def test_a_grown_host_moves_to_another_precision_as_one(case):
    here = case("mlp")
    seed = plant(kasmina.Grafter(kasmina.host_of(here.model), here.optimizer))
    here.model.double()
    here.model(here.inputs[0].double())
    assert seed.errors == 0


def test_a_fossil_counts_the_steps_since_it_became_one(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    seed = plant(grafter)
    while seed.stage != stages.HOLDING:
        grafter.advance()
    grafter.fossilise("s")
    grafter.advance()
    grafter.advance()
    assert seed.steps_in_stage == 2
