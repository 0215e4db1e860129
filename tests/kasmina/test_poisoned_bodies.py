"""Blueprints that would harm: what they do is left out of the pass and counted, and the host trains as if alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from esperml import kasmina
from esperml.kasmina import guard
from esperml.v1 import decision_pb2


class Poison(nn.Module):
    """Silent at first; from its third call in training on it does what ``what`` says."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.calls = 0
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, output):
        self.calls += self.training
        added = output * self.weight + x.mean() * self.weight
        if self.calls < 3:
            return added
        match self.what:
            case "nan":
                return added * float("nan")
            case "infinity":
                return added + float("inf")
            case "one nan":
                return torch.cat([added[:1] + float("nan"), added[1:]])
            case "explosion":
                return added + 1e12
            case "gradient":  # Finite forwards; the root of 0 has no finite slope.
                return added + torch.sqrt(x.sum() * 0 + self.weight.abs() * 0)
            case "gradient of the output":
                return added + torch.sqrt(output.sum() * 0)
            case "error":
                raise RuntimeError("poison")
            case "memory":
                raise MemoryError("poison")
            case "assertion":
                raise AssertionError("poison")
            case "shape":
                return added[:1]
            case "nothing":
                return None
        raise NotImplementedError(self.what)


FORWARD = ("nan", "infinity", "one nan", "explosion", "error", "memory", "assertion", "shape", "nothing")
BACKWARD = ("gradient", "gradient of the output")


def planted(here, what, place=("2", "2"), **options):
    host = kasmina.host_of(here.model)
    host.blueprints += (kasmina.Blueprint("poison", lambda g: True, lambda g, s: 1, lambda g, s: Poison(what)),)
    grafter = kasmina.Grafter(host, here.optimizer)
    return grafter, grafter.germinate("poison", *place, 10, seed_id="s", **options)


def host_parameters(here):
    return [p for name, p in here.model.named_parameters() if "kasmina_seeds" not in name]


@pytest.mark.parametrize("place", [("2", "2"), ("0", "2")], ids=["span one", "span two"])
@pytest.mark.parametrize("what", [*FORWARD, *BACKWARD])
def test_the_host_trains_on_as_if_alone(case, what, place):
    alone, here = case("mlp"), case("mlp")
    for each in (alone, here):
        each.optimizer = torch.optim.SGD(each.model.parameters(), 0.1)
    grafter, seed = planted(here, what, place)
    seed.body.weight.requires_grad_(what in BACKWARD)
    for _ in range(6):
        loss = here.loss()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(here.model.parameters(), 1.0)  # Sees the gradients of all together.
        assert norm.isfinite()
        assert all(p.grad.isfinite().all() for p in here.model.parameters() if p.grad is not None)
        here.optimizer.step()
        here.optimizer.zero_grad()
        grafter.advance()
        other = alone.loss()
        other.backward()
        nn.utils.clip_grad_norm_(alone.model.parameters(), 1.0)
        alone.optimizer.step()
        alone.optimizer.zero_grad()
        assert loss.isfinite()
    if what in FORWARD:
        assert seed.errors == 4
        assert seed.last_error
        assert loss.item() == pytest.approx(other.item(), abs=1e-5)
        for one, two in zip(host_parameters(here), host_parameters(alone), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("what", ["nan", "explosion"])
def test_a_report_counts_and_the_run_goes_on(case, bench, germination, what):
    here = case("mlp")
    host = kasmina.host_of(here.model)
    host.blueprints += (kasmina.Blueprint("poison", lambda g: True, lambda g, s: 1, lambda g, s: Poison(what)),)
    told = {"run": "r", "mode": "act", "report_every": 1, "governor": None}
    with kasmina.connect(bench.link, here.model, here.optimizer, **told) as session:
        bench.waiting.append(germination("2", "2", blueprint="poison"))
        for _ in range(6):
            here.step(session)
    assert session.failure == ""
    assert [report.seeds[0].errors for report in bench.reports[1:]] == [0, 0, 1, 2, 3]
    assert all(report.run.HasField("train_loss") for report in bench.reports)


def test_a_governor_takes_back_the_seed_to_blame_and_no_other(case, bench, germination):
    here = case("mlp")
    host = kasmina.host_of(here.model)
    host.blueprints += (kasmina.Blueprint("poison", lambda g: True, lambda g, s: 1, lambda g, s: Poison("nan")),)
    with kasmina.connect(bench.link, here.model, here.optimizer, run="r", mode="act", report_every=1) as session:
        bench.waiting.append(germination("2", "2", blueprint="poison", decision_id="guilty"))
        here.step(session)
        next(iter(host.seeds.values())).body.calls = -10
        for _ in range(8):
            here.step(session)
        bench.waiting.append(germination("4", "4", decision_id="innocent"))
        for _ in range(6):
            here.step(session)
    assert session.failure == ""
    undone = [a.decision_id for a in bench.applied if a.status == decision_pb2.COMMAND_STATUS_UNDONE]
    assert "guilty" in undone
    assert not any(seed.blueprint == "poison" for seed in host.seeds.values())
    assert "gave values that are not finite" in bench.applied[-1].reason


def test_a_blueprint_that_lies_about_its_cost_is_refused_and_the_run_goes_on(case, bench, germination):
    here = case("mlp")
    host = kasmina.host_of(here.model)

    def explode(*_):
        raise OverflowError("boom")

    host.blueprints += (
        kasmina.Blueprint("liar", lambda g: True, lambda g, s: 1, lambda g, s: nn.Linear(30, 30)),
        kasmina.Blueprint("bomb", lambda g: True, lambda g, s: 1, explode),
    )
    with kasmina.connect(bench.link, here.model, here.optimizer, run="r", mode="act", report_every=1) as session:
        for number, name in enumerate(("liar", "bomb", "mlp")):
            bench.waiting.append(germination("2", "2", blueprint=name, decision_id=f"d-{number}", budget=5000))
            here.step(session)
    assert session.failure == ""
    assert [(a.status, a.reason) for a in bench.applied] == [
        (decision_pb2.COMMAND_STATUS_REFUSED, "'liar' has 930 parameters though it states 1"),
        (decision_pb2.COMMAND_STATUS_REFUSED, "'bomb' cannot be built: OverflowError: boom"),
        (decision_pb2.COMMAND_STATUS_APPLIED, ""),
    ]


def test_a_host_that_is_sick_by_itself_is_not_held_against_its_seed(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    seed = grafter.germinate("low_rank", "2", "2", 500, seed_id="s")
    here.model(here.inputs[0] * float("nan"))
    assert seed.errors == 0


def test_an_empty_batch_is_no_error(case):
    here = case("mlp")
    grafter = kasmina.Grafter(kasmina.host_of(here.model), here.optimizer)
    seed = grafter.germinate("low_rank", "2", "2", 500, seed_id="s")
    assert here.model(here.inputs[0][:0]).shape == (0, 3)
    assert seed.errors == 0


@pytest.mark.parametrize("how", ["deepcopy", "saved"])
def test_copies_are_shielded_too(case, how):
    here = case("mlp")
    _, seed = planted(here, "gradient")
    seed.body.calls = 5
    if how == "deepcopy":
        twin = copy.deepcopy(here.model)
    else:
        host = kasmina.host_of(here.model)
        host.blueprints = host.blueprints[:-1]  # Of the test's own; what is saved names its blueprints.
        saved = io.BytesIO()
        torch.save(here.model, saved)
        saved.seek(0)
        twin = torch.load(saved, weights_only=False)
    twin(here.inputs[0]).sum().backward()
    mine = kasmina.host_of(twin).seeds["s"]
    assert mine.body.weight.grad is not None
    assert all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # By the compiler itself.
@pytest.mark.parametrize("what", ["nan", "explosion"])
def test_where_the_answer_is_not_at_hand_zeros_are_added_and_counted_later(case, what):
    here, alone = case("mlp"), case("mlp")
    _, seed = planted(here, what)
    seed.body.calls = 5
    compiled = torch.compile(here.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(here.inputs[0]), alone.model(*alone.inputs))
    compiled(here.inputs[0]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in here.model.parameters())
    assert seed.errors == 0
    seed.count_unusable()
    assert (seed.errors, seed.last_error) == (2, guard.UNUSABLE)


def test_half_precision_that_overflows_is_left_out():
    model = nn.Sequential(nn.Linear(4, 4)).half()
    x = torch.randn(2, 4).half()
    kasmina.wrap(model, x)
    seed = kasmina.Grafter(kasmina.host_of(model), None).germinate("low_rank", "0", "0", 100, seed_id="s")
    nn.init.constant_(seed.body.up.weight, 6e4)
    nn.init.constant_(seed.body.down.weight, 10)
    assert torch.equal(model(x.abs()), nn.functional.linear(x.abs(), model[0].weight, model[0].bias))
    assert (seed.errors, seed.last_error) == (1, guard.UNUSABLE)
