"""The governor: harm that a graft does is undone, and what was never changed is left alone."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from esperml import kasmina
from esperml.kasmina import GovernorOptions
from esperml.v1 import decision_pb2

APPLIED, REFUSED, UNDONE = (
    decision_pb2.COMMAND_STATUS_APPLIED,
    decision_pb2.COMMAND_STATUS_REFUSED,
    decision_pb2.COMMAND_STATUS_UNDONE,
)


GUARDED = GovernorOptions()


class Poison(nn.Module):
    """Nothing at first; then, from its ``onset``-th training pass on, harm."""

    def __init__(self, features: int, onset: int, harm: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.onset, self.harm, self.passes = onset, harm, 0

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes < self.onset:
            return output * 0 + self.weight
        return output * self.harm + self.weight


@pytest.fixture
def poison():
    """Registers a poisonous blueprint by name, onset and harm; it is gone after the test."""
    names: list[str] = []

    def make(onset: int, harm: float, name: str = "poison") -> None:
        kasmina.register(
            kasmina.Blueprint(
                name,
                lambda geometry: geometry.flat,
                lambda geometry, _size: geometry.out_features,
                lambda geometry, _size: Poison(geometry.out_features, onset, harm),
                lambda _geometry: 1,
            )
        )
        names.append(name)

    yield make
    for name in names:
        kasmina.unregister(name)


class Host:
    """A small host that learns a task with noise, and all that its training depends on."""

    def __init__(self, bench, *, governor: GovernorOptions | None = GUARDED, **told: Any) -> None:
        torch.manual_seed(2)
        self.model = nn.Sequential(
            nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        kasmina.wrap(self.model, torch.randn(32, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.scheduler = lr_scheduler.CosineAnnealingLR(self.optimizer, 1000)
        self.teacher = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
        self.bench = bench
        told = {"run": "r", "mode": "act", "overhead_ceiling": None, "report_every": 10, "governor": governor, **told}
        self.session = kasmina.connect(bench.link, self.model, self.optimizer, scheduler=self.scheduler, **told)

    def train(self, steps: int, *, tell: bool = True) -> list[float]:
        losses = []
        for _ in range(steps):
            x = torch.randn(32, 10)
            loss = functional.cross_entropy(self.model(x), (x @ self.teacher).argmax(1))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.session.step(loss=loss if tell else None)
            self.optimizer.zero_grad()
            losses.append(loss.item())
        assert self.session.failure == ""
        return losses

    def weights(self) -> list[Tensor]:
        named = self.model.named_parameters()
        return [parameter.detach().clone() for name, parameter in named if "kasmina_seeds" not in name]

    @property
    def statuses(self) -> list[int]:
        return [applied.status for applied in self.bench.applied]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def at(command: decision_pb2.Command, step: int) -> decision_pb2.Command:
    command.decided_at_step = step
    return command


@pytest.mark.parametrize("harm", [math.nan, math.inf, 1e30, 30.0])
def test_a_graft_that_does_harm_is_undone_with_all_that_followed(bench, germination, poison, harm):
    poison(3, harm)
    host = Host(bench)
    host.train(99)
    bench.waiting.append(at(germination("3", "3", blueprint="poison", decision_id="d-1"), 99))
    host.train(1)
    assert host.statuses == [APPLIED]
    before = host.weights()
    rates = [group["lr"] for group in host.optimizer.param_groups]
    for _ in range(100):
        host.train(1)
        if UNDONE in host.statuses:
            break
    else:
        pytest.fail("nothing was undone")
    assert same(host.weights(), before)
    assert [group["lr"] for group in host.optimizer.param_groups] == rates[:1]
    assert len(host.optimizer.state) == 6
    assert not kasmina.host_of(host.model).seeds
    undone = bench.applied[-1]
    assert (undone.decision_id, undone.parameters_added) == ("d-1", -8)
    assert "rolled back to step 100, which undoes germinate seed-d-1" in undone.reason
    assert bench.payloads("structure_changed")[-1].graph.structure_version == undone.structure_version == 3
    assert "rolled back to step 100" in str(host.session.summary())
    # Decided before, come after.
    bench.waiting.append(at(germination("3", "3", decision_id="d-2"), 100))
    bench.waiting.append(at(germination("3", "3", decision_id="d-3"), 400))
    assert all(math.isfinite(loss) for loss in host.train(20))
    assert [(applied.decision_id, applied.status) for applied in bench.applied[2:]] == [
        ("d-2", REFUSED),
        ("d-3", APPLIED),
    ]
    assert "before the roll-back at step" in bench.applied[2].reason


def test_a_run_that_is_never_changed_is_bit_identical_and_only_told_of_its_trouble(bench):
    runs = []
    for governor in (None, GovernorOptions()):
        host = Host(bench, governor=governor)
        torch.manual_seed(8)
        losses = host.train(150)
        with torch.no_grad():
            host.model[0].weight.fill_(math.nan)
        host.train(20)
        runs.append((losses, [weight.nan_to_num() for weight in host.weights()], host))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][2].session.summary().remarks == ()
    (remark,) = runs[1][2].session.summary().remarks
    assert "the last 10 training losses are not finite, since step 151: no seed lives and no change is young" in remark
    assert runs[1][2].session.summary().actions == ()


def test_a_run_is_guarded_without_our_doing_where_the_user_asks_for_it(bench):
    host = Host(bench, governor=GovernorOptions(always=True, snapshot_every=10))
    host.train(30)
    before = host.weights()
    host.train(5)
    with torch.no_grad():
        host.model[0].weight.fill_(math.nan)
    host.train(2)
    assert same(host.weights(), before)
    assert "rolled back to step 30" in str(host.session.summary())


def test_an_observed_run_that_was_grown_before_is_told_of_its_trouble_and_left_alone(bench, germination):
    grown = Host(bench)
    bench.waiting.append(germination("3", "3"))
    grown.train(10)
    host = Host(bench, mode="observe")
    host.session.load_state_dict(grown.session.state_dict())
    assert kasmina.host_of(host.model).live_seeds == 1
    with torch.no_grad():
        host.model[0].weight.fill_(math.nan)
    host.train(20)
    assert kasmina.host_of(host.model).live_seeds == 1
    assert "not finite, since step 11: the run is only observed" in str(host.session.summary())


def test_a_graft_is_refused_while_training_is_sick(bench, germination):
    host = Host(bench)
    host.train(10)
    with torch.no_grad():
        host.model[0].weight.fill_(math.nan)
    host.train(9)
    bench.waiting.append(germination("3", "3"))
    host.train(1)
    assert (bench.applied[0].status, "in doubt" in bench.applied[0].reason) == (REFUSED, True)


def test_without_a_loss_the_weights_tell_before_anything_is_kept_of_them(bench, germination):
    host = Host(bench)
    host.train(9, tell=False)
    bench.waiting.append(germination("3", "3"))
    host.train(1, tell=False)
    before = host.weights()
    host.train(5, tell=False)
    with torch.no_grad():
        host.model[0].weight.fill_(math.nan)
    bench.waiting.append(germination("5", "5", decision_id="d-2"))
    host.train(5, tell=False)
    assert same(host.weights(), before)
    assert "0.weight is not finite" in bench.applied[-2].reason
    assert [applied.status for applied in bench.applied] == [APPLIED, UNDONE, REFUSED]


def test_the_youngest_seed_goes_where_nothing_has_changed_since_the_snapshot(bench, germination):
    host = Host(bench, governor=GovernorOptions(snapshot_every=20))
    for step, place in ((10, "0"), (60, "3")):
        bench.waiting.append(germination(place, place, decision_id=f"d-{place}"))
        host.train(60)
        assert step
    seeds = kasmina.host_of(host.model).seeds
    assert list(seeds) == ["seed-d-0", "seed-d-3"]
    with torch.no_grad():
        seeds["seed-d-3"].body.out.weight.fill_(math.nan)
        host.model[0].weight.fill_(math.nan)
    host.train(3)
    assert list(kasmina.host_of(host.model).seeds) == ["seed-d-0"]
    assert bench.applied[-1].decision_id == "d-3"
    assert "culled seed-d-3, the youngest seed" in bench.applied[-1].reason
    assert all(torch.isfinite(weight).all() for weight in host.weights())
    assert len(host.optimizer.param_groups) == 2


def test_harm_that_comes_again_leads_further_back_and_in_the_end_to_a_host_without_seeds(bench, germination):
    host = Host(bench, governor=GovernorOptions(snapshot_every=20, snapshots=3))
    for place in ("0", "3", "5"):
        bench.waiting.append(germination(place, place, decision_id=f"d-{place}"))
        host.train(30)
    left = []
    for _ in range(5):
        with torch.no_grad():
            host.model[0].weight.fill_(math.nan)
        host.train(2)
        left.append(len(kasmina.host_of(host.model).seeds))
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert sum(applied.status == UNDONE for applied in bench.applied) == 3


def test_snapshots_on_disk_do_as_those_in_memory_and_leave_no_file(bench, germination, poison, tmp_path: Path):
    poison(3, 1000.0)
    weights = []
    for folder in (None, tmp_path / "new"):
        host = Host(bench, governor=GovernorOptions(folder=folder))
        torch.manual_seed(4)
        host.train(99)
        bench.waiting.append(germination("3", "3", blueprint="poison"))
        host.train(1)
        if folder is not None:
            assert len(list(folder.iterdir())) == 1
        host.train(60)
        assert UNDONE in host.statuses
        weights.append(host.weights())
        host.session.close()
    assert same(*weights)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_graft_is_refused_where_no_snapshot_can_be_written(bench, germination, tmp_path: Path):
    (tmp_path / "file").write_text("")
    host = Host(bench, governor=GovernorOptions(folder=tmp_path / "file"))
    bench.waiting.append(germination("3", "3"))
    host.train(10)
    assert "no state to go back to can be kept: " in bench.applied[0].reason
    assert "file" in bench.applied[0].reason
    assert host.session.failure == ""


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:500]), Path.touch])
def test_a_snapshot_that_is_gone_leaves_a_cull_as_the_last_resort(bench, germination, tmp_path: Path, damage):
    host = Host(bench, governor=GovernorOptions(folder=tmp_path))
    bench.waiting.append(germination("3", "3"))
    host.train(15)
    damage(next(tmp_path.iterdir()))
    with torch.no_grad():
        host.model[0].weight.fill_(math.nan)
    host.train(5)
    assert not kasmina.host_of(host.model).seeds
    if damage is not Path.touch:
        assert "a snapshot cannot be put back" in str(host.session.summary())
        assert "culled seed-d-1" in bench.applied[-1].reason


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"snapshots": 0}, "snapshots must be at least 1, not 0"),
        ({"snapshot_every": 0}, "snapshot_every must be at least 1"),
        ({"probation_steps": -1}, "probation_steps must be at least 0"),
        ({"stall_steps": 5}, "stall_steps must be at least 64"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, error):
    with pytest.raises(ValueError, match=error):
        GovernorOptions(**options)


def test_a_loss_that_rises_with_the_learning_rate_has_not_stalled(bench, germination):
    """A warm restart, and for comparison the same losses at a rate that stays."""
    interventions = []
    for rate in (0.05, 0.01):
        host = Host(bench, governor=GovernorOptions(stall_steps=64))
        levels = torch.cat((torch.linspace(2, 1, 100), torch.full((300,), 1.0), torch.full((200,), 1.2)))
        losses = levels + 0.02 * torch.randn(600)
        for step, loss in enumerate(losses.tolist(), 1):
            if step == 390:
                bench.waiting.append(at(germination("3", "3", decision_id=f"d-{rate}"), 389))
            if step == 405:
                host.optimizer.param_groups[0]["lr"] = rate
            host.session.step(loss=loss)
        interventions.append([words for _, words in host.session.summary().actions if "rolled back" in words])
    assert interventions[0] == []
    assert "has stayed above" in interventions[1][0]


def test_a_folder_that_fills_up_later_is_told_and_nothing_else_happens(bench, germination, tmp_path: Path):
    folder = tmp_path / "snapshots"
    host = Host(bench, governor=GovernorOptions(folder=folder, snapshot_every=10))
    bench.waiting.append(germination("3", "3"))
    host.train(10)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("")
    host.train(20)
    assert "no state to go back to can be kept" in str(host.session.summary())
    assert host.statuses == [APPLIED]


def test_losses_of_many_entries_are_averaged(bench):
    host = Host(bench)
    host.session.step(loss=torch.tensor([1.0, 3.0]))
    assert host.session.state_dict()["governor"]["watch"]["recent"] == [2.0]


def test_a_disk_that_is_full_leaves_no_half_a_snapshot(bench, germination, tmp_path: Path):
    host = Host(bench, governor=GovernorOptions(folder=tmp_path))
    host.train(9)
    bench.waiting.append(germination("3", "3"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        host.train(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert host.statuses == [REFUSED]
    assert f"no snapshot can be written to {tmp_path}" in bench.applied[0].reason
    assert list(tmp_path.iterdir()) == []
    host.train(5)


def test_a_cull_is_carried_out_though_training_is_sick(bench, germination, on_seed):
    host = Host(bench)
    bench.waiting.append(germination("3", "3"))
    host.train(10)
    host.session.step(loss=math.nan)
    bench.waiting.append(at(on_seed("seed-d-1", "d-2", cull=decision_pb2.Cull()), 10))
    host.train(9)
    assert host.statuses == [APPLIED, APPLIED]
