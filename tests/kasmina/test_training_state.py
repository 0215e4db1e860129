"""Grafting, culling, going back and resuming in any order keep host, seeds and optimizer consistent."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.optim import lr_scheduler

from esperml import kasmina
from esperml.kasmina.seeds import CONTAINER, Seed
from esperml.kasmina.training_state import TrainingState


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


class Grown(RuleBasedStateMachine):
    """A host under training, and the states that it was in."""

    @initialize(optimizer=st.sampled_from(["SGD", "AdamW", "Adafactor"]), groups=st.booleans())
    def begin(self, optimizer: str, groups: bool) -> None:
        self.kind, self.groups = optimizer, groups
        self.taken: list[dict[str, Any]] = []
        self.born = 0
        self.program()

    def program(self) -> None:
        """What the user's program makes at its start."""
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 2))
        kasmina.wrap(self.model, torch.randn(8, 6))
        self.host = kasmina.host_of(self.model)
        parameters: Any = list(self.model.parameters())
        if self.groups:
            parameters = [{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.01}]
        kwargs = {"momentum": 0.9} if self.kind == "SGD" else {}
        self.optimizer = getattr(torch.optim, self.kind)(parameters, lr=0.05, **kwargs)
        self.scheduler = lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=10_000, cycle_momentum=False)
        self.grafter = kasmina.Grafter(self.host, self.optimizer, self.scheduler)
        self.state = TrainingState(self.grafter, self.optimizer, self.scheduler)

    @rule()
    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 6)).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.grafter.advance()

    @rule(place=st.integers(0, 4), blueprint=st.sampled_from(["low_rank", "mlp", "gate"]), blend=st.integers(0, 3))
    def graft(self, place: int, blueprint: str, blend: int) -> None:
        where = self.host.places[place % len(self.host.places)]
        names = [self.host.layers[i].name for i in (where.source, where.target)]
        self.born += 1
        if self.host.occupant(self.host.places.index(where)) is None:
            self.grafter.germinate(blueprint, *names, 40, seed_id=f"s{self.born}", blend_steps=blend)
        else:
            with pytest.raises(kasmina.RefusedError, match="the place holds seed"):
                self.grafter.germinate(blueprint, *names, 40, seed_id=f"s{self.born}", blend_steps=blend)

    @precondition(lambda self: self.host.seeds)
    @rule(data=st.data(), verb=st.sampled_from(["cull", "fossilise", "set_alpha"]))
    def change(self, data: st.DataObject, verb: str) -> None:
        seed = data.draw(st.sampled_from(sorted(self.host.seeds)))
        try:
            getattr(self.grafter, verb)(seed, *([0.5] if verb == "set_alpha" else []))
        except kasmina.RefusedError:
            assert not self.host.seeds[seed].live or verb == "fossilise"

    @rule()
    def take(self) -> None:
        self.taken.append(self.state.capture())

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), restart=st.booleans())
    def go_back(self, data: st.DataObject, restart: bool) -> None:
        state = data.draw(st.sampled_from(self.taken))
        file = io.BytesIO()
        torch.save(state, file)
        if restart:
            self.program()
        version = self.host.structure_version
        file.seek(0)
        restructured = self.state.restore(torch.load(file, weights_only=True) if restart else state)
        now = self.state.capture()
        assert self.host.structure_version > version or not restructured
        now["structure_version"] = state["structure_version"]
        assert equal(now, state)

    @invariant()
    def the_optimizer_trains_what_the_model_has(self) -> None:
        if not hasattr(self, "model"):
            return
        trained = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        assert len(trained) == len(set(trained))
        assert set(trained) == {id(parameter) for parameter in self.model.parameters()}
        assert {id(parameter) for parameter in self.optimizer.state} <= set(trained)
        assert len(self.scheduler.base_lrs) == len(self.optimizer.param_groups)

    @invariant()
    def the_model_holds_its_seeds_and_no_others(self) -> None:
        if not hasattr(self, "model"):
            return
        held = {name.split(".")[-1] for name, _ in self.model.named_modules() if name.split(".")[-2:-1] == [CONTAINER]}
        assert held == set(self.host.seeds)
        assert len({seed.place for seed in self.host.seeds.values()}) == len(self.host.seeds)
        hooks = sum(len(m._forward_hooks) for m in self.model.modules())
        # One where the seed adds, and where it spans two layers one where their call ends.
        assert hooks == sum(self.host.places[seed.place].span for seed in self.host.seeds.values())


TestGrown = Grown.TestCase
TestGrown.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_all_that_a_seed_knows_is_part_of_the_state(case):
    """What a seed holds beside its module is plain, so that the state takes it along."""
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    seed = grafter.germinate("mlp", "2", "2", 500, seed_id="s", blend_steps=7, decision_id="d")
    assert isinstance(seed, Seed)
    (described,) = TrainingState(grafter, here.optimizer, None).capture()["seeds"]
    known = {name for name in vars(seed) if not name.startswith("_")}
    assert {*described["facts"], "seed_id", "place", "blueprint", "body"} == known


def test_a_buffer_that_has_grown_is_put_back(case):
    here = case("mlp")
    here.model.register_buffer("seen", torch.arange(3.0))
    state = TrainingState(kasmina.Grafter(kasmina.host_of(here.model), here.optimizer), here.optimizer, None)
    taken = state.capture()
    here.model.seen = torch.arange(5.0)
    state.restore(taken)
    assert torch.equal(here.model.seen, torch.arange(3.0))


@pytest.mark.parametrize("merged", [True, False])
def test_parameters_that_the_user_moved_between_groups_go_back_to_theirs(case, merged):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    grafter.germinate("mlp", "2", "2", 500, seed_id="s")
    state = TrainingState(grafter, here.optimizer, None)

    def merge() -> None:
        first, second = here.optimizer.param_groups
        first["params"] += second["params"]
        here.optimizer.param_groups.remove(second)

    if merged:
        merge()
    taken = state.capture()
    if not merged:
        merge()
    here.step()
    state.restore(taken)
    assert equal({**state.capture(), "generators": None}, {**taken, "generators": None})
    here.step()
