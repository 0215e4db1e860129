"""A run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from esperml import kasmina
from esperml.v1 import decision_pb2

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2), weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
}

SCHEDULERS: dict[str, Callable[..., Any]] = {
    "none": lambda o: None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step] * len(o.param_groups)),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=60),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [6, 14]),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 30)], [4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.97)]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


class Noisy(nn.Module):
    """Normalisation with running statistics, dropout, and two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.head(torch.relu(self.second(x)))


class Run:
    """A program that trains: everything is made anew from the same code, as after a restart."""

    def __init__(self, bench, optimizer: str, scheduler: str, *, split: bool = False, **told: Any) -> None:
        torch.manual_seed(3)
        self.model = Noisy()
        kasmina.wrap(self.model, torch.randn(16, 10))
        parameters: Any = self.model.parameters()
        if split:
            body = [p for name, p in self.model.named_parameters() if not name.startswith("head")]
            parameters = [{"params": body}, {"params": list(self.model.head.parameters()), "weight_decay": 0.3}]
        self.optimizer = OPTIMIZERS[optimizer](parameters)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.bench = bench
        told = {"run": "r", "mode": "act", "overhead_ceiling": None, "report_every": 4, **told}
        self.session = kasmina.connect(bench.link, self.model, self.optimizer, scheduler=self.scheduler, **told)

    def train(self, steps: int, *, plan: dict[int, list[decision_pb2.Command]] | None = None) -> list[float]:
        losses = []
        for _ in range(steps):
            self.bench.waiting += (plan or {}).get(self.session.steps + 1, [])
            x = torch.randn(16, 10) * (1 + random.random()) + np.random.rand()
            loss = nn.functional.cross_entropy(self.model(x), (x.sum(1) > 0).long())
            loss.backward()
            self.optimizer.step()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            elif self.scheduler is not None:
                self.scheduler.step()
            self.session.step(loss=loss)
            self.optimizer.zero_grad()
            losses.append(loss.item())
        assert self.session.failure == ""
        return losses


def saved(session: kasmina.Session) -> Any:
    """The state after a journey through a file."""
    file = io.BytesIO()
    torch.save(session.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one: Run, other: Run) -> None:
    for a, b in zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1]), a[0]
    first, second = (run.optimizer.state_dict() for run in (one, other))
    assert str(first["param_groups"]) == str(second["param_groups"])
    assert str(first["state"]) == str(second["state"])
    facts = [
        [
            (seed.seed_id, seed.stage, seed.age, seed.steps_in_stage, seed.alpha, seed.held)
            for seed in host.seeds.values()
        ]
        for host in (kasmina.host_of(one.model), kasmina.host_of(other.model))
    ]
    assert facts[0] == facts[1]


@pytest.fixture
def plan(germination, on_seed):
    """Commands by step: three seeds, two of them on one layer; one is culled, one fossilised."""
    cull, fossilise = decision_pb2.Cull(), decision_pb2.Fossilise()
    return {
        4: [germination("first", "second", decision_id="a", blend_steps=12)],
        8: [germination("second", "second", decision_id="b", blueprint="low_rank")],
        12: [germination("head", "head", decision_id="c", blend_steps=3), on_seed("seed-b", "f", fossilise=fossilise)],
        20: [on_seed("seed-a", "d", cull=cull)],
    }


def interrupted(bench, make, plan, after: int, total: int) -> tuple[Run, Run]:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    whole = make(bench)
    expected = whole.train(total, plan=plan)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    first = make(bench)
    before = first.train(after, plan=plan)
    state = saved(first.session)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    second = make(bench)
    second.session.load_state_dict(state)
    assert before + second.train(total - after, plan=plan) == expected
    assert second.session.steps == total
    return whole, second


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_resumed_run_is_bit_identical_with_every_optimizer(bench, plan, optimizer):
    assert_same(*interrupted(bench, lambda b: Run(b, optimizer, "none", split=True), plan, 14, 26))


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_a_resumed_run_is_bit_identical_with_every_scheduler(bench, plan, scheduler):
    optimizer = "momentum" if scheduler == "one_cycle" else "adamw"
    assert_same(*interrupted(bench, lambda b: Run(b, optimizer, scheduler), plan, 14, 26))


@pytest.mark.parametrize("after", [0, 3, 4, 8, 13, 22])
def test_a_run_may_be_interrupted_at_any_step(bench, plan, after):
    assert_same(*interrupted(bench, lambda b: Run(b, "adam", "restarts", split=True), plan, after, 26))


def without(state: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != part}


def changed(state: dict[str, Any], seed: dict[str, Any]) -> dict[str, Any]:
    return {**state, "seeds": [{**state["seeds"][0], **seed}, *state["seeds"][1:]]}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s: {**s, "format": 2}, "format is 2; this version reads 1"),
        (lambda s: without(s, "session"), "session is missing"),
        (lambda s: without(s, "generators"), "generators is missing"),
        (lambda s: changed(s, {"source": "third"}), "seed 'seed-a': unknown layer 'third'"),
        (lambda s: changed(s, {"source": "head", "target": "first"}), "there is no place from 'head' to 'first'"),
        (lambda s: changed(s, {"blueprint": "mine"}), "blueprint 'mine', which is none here; register it before"),
        (lambda s: changed(s, {"parameters": 1}), "seed 'seed-a': over budget"),
        (lambda s: changed(s, {"parameters": 100}), "seed 'seed-a': blueprint 'mlp' makes"),
        (lambda s: {**s, "model": without(s["model"], "head.bias")}, "'head.bias' is here, and not in the state"),
        (lambda s: {**s, "model": {**s["model"], "x": torch.ones(1)}}, "'x' is in the state, and not here"),
        (
            lambda s: {**s, "model": {**s["model"], "head.bias": torch.ones(9)}},
            r"'head.bias' is \(3,\) here, \(9,\) there",
        ),
        (lambda s: {**s, "optimizer": {**s["optimizer"], "class": "SGD"}}, "the state is of SGD, and here it is Adam"),
        (lambda s: {**s, "scheduler": None}, "the state is of none, and here it is CosineAnnealingWarmRestarts"),
        (lambda s: {**s, "optimizer": {**s["optimizer"], "names": [["nothing"]]}}, "do not go with the model: nothing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(bench, plan, change, error):
    run = Run(bench, "adam", "restarts")
    run.train(14, plan=plan)
    state = saved(run.session)
    run.session.close()
    fresh, twin = Run(bench, "adam", "restarts"), Run(bench, "adam", "restarts")
    with pytest.raises(kasmina.CheckpointError, match=error):
        fresh.session.load_state_dict(change(state))
    assert_same(fresh, twin)
    assert fresh.session.steps == 0
    assert not kasmina.host_of(fresh.model).seeds


def test_a_state_of_other_groups_is_refused(bench, plan):
    run = Run(bench, "adam", "none", split=True)
    run.train(14, plan=plan)
    with pytest.raises(kasmina.CheckpointError, match="in 1 groups here; the state has 5, seeds included"):
        Run(bench, "adam", "none").session.load_state_dict(saved(run.session))


def test_what_cannot_be_written_safely_is_named(bench):
    run = Run(bench, "sgd", "none")
    run.optimizer.param_groups[0]["lr"] = np.float64(0.05)
    assert saved(run.session)["optimizer"]["state"]["param_groups"][0]["lr"] == 0.05
    run.optimizer.param_groups[0]["odd"] = object()
    with pytest.raises(
        kasmina.CheckpointError, match=r"optimizer\['param_groups'\]\[0\]\['odd'\] is a builtins.object"
    ):
        run.session.state_dict()


def test_a_scheduler_without_a_state_is_named(bench):
    run = Run(bench, "sgd", "none")
    session = kasmina.connect(bench.link, run.model, run.optimizer, run="r", scheduler=object())
    with pytest.raises(kasmina.CheckpointError, match="scheduler: object has no state_dict"):
        session.state_dict()


def test_parameters_beyond_the_model_and_tied_ones_are_part_of_the_state(bench):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        kasmina.wrap(model, torch.randn(4, 6))
        temperature = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.Adam([*model.parameters(), temperature], 0.1)
        return model, temperature, optimizer, kasmina.connect(bench.link, model, optimizer, run="r")

    def step(model, temperature, optimizer, session):
        optimizer.zero_grad()
        (model(torch.ones(4, 6)).square().sum() * temperature).sum().backward()
        optimizer.step()
        session.step()

    one, other = make(), make()
    for _ in range(3):
        step(*one)
    other[3].load_state_dict(saved(one[3]))
    for _ in range(2):
        step(*one), step(*other)
    assert torch.equal(one[1], other[1])
    assert other[0][2].weight is other[0][0].weight
    assert torch.equal(one[0][0].weight, other[0][0].weight)


def test_a_resumed_session_tells_the_structure_and_does_not_obey_twice(bench, plan):
    run = Run(bench, "adam", "none")
    run.train(14, plan=plan)
    fresh = Run(bench, "adam", "none")
    fresh.session.load_state_dict(saved(run.session))
    graph = bench.payloads("structure_changed")[-1].graph
    assert graph.structure_version == kasmina.host_of(run.model).structure_version == 5
    answers = len(bench.applied)
    fresh.train(
        5, plan={15: [command for commands in plan.values() for command in commands if command.decision_id != "d"]}
    )
    assert len(bench.applied) == answers
    assert list(kasmina.host_of(fresh.model).seeds) == ["seed-a", "seed-b", "seed-c"]
