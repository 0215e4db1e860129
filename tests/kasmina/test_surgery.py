"""Every optimizer and scheduler of PyTorch goes on as before around what joins it and leaves it."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from esperml import kasmina

ALL = [
    name for name, kind in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(kind, torch.optim.Optimizer)
]
CLOSED = {"LBFGS", "SparseAdam"}
OPEN = [name for name in ALL if name not in {*CLOSED, "Optimizer"}]


def host(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 8, bias), nn.Tanh(), nn.Linear(8, 8, bias), nn.Tanh(), nn.Linear(8, 3, bias))
    return kasmina.wrap(model, torch.randn(16, 10))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.ones(16, 10)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(16) % 3).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPEN)
def test_what_was_there_trains_on_as_if_nothing_had_joined(name):
    """While a newborn seed has alpha 0 the host's parameters move exactly as in a host without it."""
    plain, grown = host(bias=name != "Muon"), host(bias=name != "Muon")
    optimizers = [getattr(torch.optim, name)(model.parameters(), lr=1e-2) for model in (plain, grown)]
    grafter = kasmina.Grafter(kasmina.host_of(grown), optimizers[1])
    for number in range(9):
        if number == 3:
            grafter.germinate("low_rank", "2", "2", 100, seed_id="s")
            grafter.set_alpha("s", 0.0)
        if number == 6:
            grafter.cull("s")
        for model, optimizer in zip((plain, grown), optimizers, strict=True):
            step(model, optimizer)
    for one, other in zip(plain.parameters(), grown.parameters(), strict=True):
        assert torch.equal(one, other)
    assert str(optimizers[0].state_dict()) == str(optimizers[1].state_dict())


@pytest.mark.parametrize("name", OPEN)
def test_newborn_parameters_train(name):
    model = host(bias=name != "Muon")
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2)
    seed = kasmina.Grafter(kasmina.host_of(model), optimizer).germinate("low_rank", "2", "2", 100, seed_id="s")
    born = [parameter.detach().clone() for parameter in seed.body.parameters()]
    for _ in range(2):
        step(model, optimizer)
    assert any(not torch.equal(one, other) for one, other in zip(born, seed.body.parameters(), strict=True))


@pytest.mark.parametrize("name", sorted(CLOSED))
def test_an_optimizer_that_nothing_can_join_is_refused_when_connecting(bench, name):
    model = host()
    optimizer = getattr(torch.optim, name)(list(model.parameters()))
    with pytest.raises(kasmina.KasminaError, match=rf"{name} .*; connect with mode='observe'"):
        kasmina.connect(bench.link, model, optimizer, run="r", mode="act")
    kasmina.connect(bench.link, model, optimizer, run="r", mode="observe").close()
    with pytest.raises(kasmina.RefusedError, match=name):
        kasmina.Grafter(kasmina.host_of(model), optimizer).germinate("mlp", "2", "2", 500, seed_id="s")


def test_muon_refuses_what_is_no_matrix_and_nothing_is_changed():
    model = host(bias=False)
    optimizer = torch.optim.Muon(model.parameters())
    grafter = kasmina.Grafter(kasmina.host_of(model), optimizer)
    with pytest.raises(kasmina.RefusedError, match=r"Muon trains matrices only, and '\w+.bias' of the seed is none"):
        grafter.germinate("mlp", "2", "2", 500, seed_id="s")
    assert (grafter.host.seeds, grafter.host.structure_version, len(optimizer.param_groups)) == ({}, 1, 1)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("named", [True, False])
def test_newborn_parameters_take_after_the_group_of_their_target(named):
    model = host()
    parameters = [
        list(m.named_parameters(str(i)) if named else m.parameters()) for i, m in enumerate(model) if i % 2 == 0
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters[0], "lr": 1e-3},
            {"params": parameters[1], "lr": 2e-3, "weight_decay": 0.5},
            {"params": parameters[2], "lr": 3e-3, "betas": (0.5, 0.9)},
        ]
    )
    factors = [0.5, 0.25, 0.125]
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda number, f=f: f**number for f in factors])
    grafter = kasmina.Grafter(kasmina.host_of(model), optimizer, scheduler)
    for number, place in enumerate(("4", "0", "2")):
        seed = grafter.germinate("mlp", place, place, 500, seed_id=f"s{place}")
        own, model_group = optimizer.param_groups[3 + number], optimizer.param_groups[int(place) // 2]
        assert own["params"] == list(seed.body.parameters())
        ignored = {"params", "param_names"}
        assert {k: v for k, v in own.items() if k not in ignored} == {
            k: v for k, v in model_group.items() if k not in ignored
        }
    step(model, optimizer)
    scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([5e-4, 5e-4, 3.75e-4, 3.75e-4, 5e-4, 5e-4])
    grafter.cull("s0")
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [2.5e-4, 1.25e-4, 4.6875e-5, 4.6875e-5, 1.25e-4]
    )


def test_a_target_whose_own_parameters_are_frozen_lends_nothing():
    model = host()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[4].parameters()}], 0.2)
    grafter = kasmina.Grafter(kasmina.host_of(model), optimizer)
    grafter.germinate("mlp", "2", "2", 500, seed_id="s")
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.1]


def test_names_stay_with_parameters_where_the_user_has_moved_them():
    model = host()
    optimizer = torch.optim.SGD(list(model.named_parameters()), 0.1)
    grafter = kasmina.Grafter(kasmina.host_of(model), optimizer)
    grafter.germinate("low_rank", "2", "2", 100, seed_id="s")
    first, second = optimizer.param_groups
    for key in ("params", "param_names"):
        first[key] = second[key] + first[key]
    optimizer.param_groups.remove(second)
    grafter.cull("s")
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_a_seed_without_parameters_needs_no_group():
    kasmina.register(
        kasmina.Blueprint("bare", lambda g: True, lambda g, s: 0, lambda g, s: Bare(), lambda _geometry: 1)
    )
    try:
        model = host()
    finally:
        kasmina.unregister("bare")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(optimizer.state_dict())
    grafter = kasmina.Grafter(kasmina.host_of(model), optimizer)
    grafter.germinate("bare", "2", "2", 100, seed_id="s")
    assert optimizer.state_dict() == before
    grafter.cull("s")
    assert optimizer.state_dict() == before


class Bare(nn.Module):
    def forward(self, x, output):
        return output * 0
