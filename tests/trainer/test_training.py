"""Training from start to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from esperml.tamiyo import checkpoint
from esperml.tamiyo.features import collate, extract
from esperml.tamiyo.policy import PolicyNetwork
from esperml.trainer import snapshots
from esperml.trainer.algorithm import AdvantageWeightedConfig
from esperml.trainer.dataset import Dataset, load
from esperml.trainer.likelihood import Distribution
from esperml.trainer.snapshots import SnapshotError
from esperml.trainer.training import LATEST, METRICS, Training, TrainingError, TrainingSettings

QUICK = TrainingSettings(
    algorithm=AdvantageWeightedConfig(batch_size=16, refresh_steps=4), steps=12, evaluate_every=6, hidden=8, layers=1
)


@pytest.fixture
def dataset(small_world: Any, record: Callable[[Any], Path]) -> Dataset:
    return load([record(small_world)])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).network.state_dict()


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_rule_that_decides_the_reward_is_learnt(
    synthetic: ModuleType, world: Any, record: Callable[[Any], Path], tmp_path: Path
) -> None:
    settings = TrainingSettings(
        algorithm=AdvantageWeightedConfig(batch_size=128), steps=200, evaluate_every=50, hidden=64
    )
    with Training(tmp_path / "policy", settings, load([record(world)])) as training:
        metrics = training.run()
    assert metrics["policy_gain"] > 0.05
    assert metrics["policy_gain_low"] > 0
    network = checkpoint.load(tmp_path / "policy").network
    places, whether = _held_out_choices(synthetic, network)
    assert np.mean(places) > 0.8
    assert np.mean(whether) > 0.8


def _held_out_choices(synthetic: ModuleType, network: PolicyNetwork) -> tuple[list[bool], list[bool]]:
    """On hosts never seen: whether the most probable graft is the one that pays, and whether adapting is right."""
    random = np.random.default_rng(1234)
    hosts = [synthetic.make_host(random) for _ in range(100)]
    graphs = collate([extract(synthetic.make_state(host, "run", 100, random), synthetic.BLUEPRINTS) for host in hosts])
    with torch.inference_mode():
        policy = Distribution.of(network(graphs), graphs)
    places, whether = [], []
    for index, host in enumerate(hosts):
        first, count = int(policy.first_place[index]), len(host.places())
        joint = policy.where[first : first + count, None] + policy.what[first : first + count]
        place, blueprint = divmod(int(joint.argmax()), joint.shape[1])
        if host.best is not None:
            places.append((place, network.config.vocabulary[blueprint]) == host.best)
        whether.append(bool(policy.whether[index, 1] > policy.whether[index, 0]) == (host.best is not None))
    return places, whether


def test_a_training_leaves_a_policy_its_state_and_its_metrics(dataset: Dataset, tmp_path: Path) -> None:
    steps: list[int] = []
    with Training(tmp_path, QUICK, dataset) as training:
        metrics = training.run(lambda step, losses: steps.append(step))
        state = training.state
    assert steps == list(range(1, 13))
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12]
    assert lines[-1]["validation"] == metrics
    assert state.best == max(
        line["validation"].get("policy_gain_low", line["validation"]["policy_gain"]) for line in lines
    )
    best, latest = checkpoint.load(tmp_path), checkpoint.load(tmp_path / LATEST)
    assert best.metadata.notes["step"] == str(state.best_step)
    assert latest.metadata.notes["step"] == "12"
    assert json.loads(latest.metadata.notes["settings"]) == asdict(QUICK)
    assert best.network.config.vocabulary == ("gate", "mlp")


def test_twins_are_never_split(dataset: Dataset, tmp_path: Path) -> None:
    with Training(tmp_path, replace(QUICK, validation_fraction=0.5), dataset) as training:
        trained, held_out = ({step.cluster for step in part} for part in (training._train, training._validation))
    assert trained
    assert held_out
    assert not trained & held_out


@pytest.mark.parametrize("stop", [6, 12])
def test_a_resumed_training_ends_bit_by_bit_where_one_that_never_stopped_does(
    dataset: Dataset, tmp_path: Path, stop: int
) -> None:
    settings = replace(QUICK, steps=18)
    with Training(tmp_path / "whole", settings, dataset) as training:
        whole = training.run()
    with Training(tmp_path / "parts", replace(settings, steps=stop), dataset) as training:
        training.run()
    torch.manual_seed(99)
    with Training(tmp_path / "parts", settings, None, resume=True) as training:
        assert training.state.step == stop
        parts = training.run()
    assert parts == whole
    for folder in ("", LATEST):
        assert _same(_weights(tmp_path / "whole" / folder), _weights(tmp_path / "parts" / folder))
    one, other = (snapshots.load(tmp_path / name / LATEST) for name in ("whole", "parts"))
    assert _same(one.optimizer, other.optimizer)
    assert (one.sampler, one.best, one.best_step, one.stale) == (
        other.sampler,
        other.best,
        other.best_step,
        other.stale,
    )
    assert (tmp_path / "whole" / METRICS).read_text() == (tmp_path / "parts" / METRICS).read_text()


def test_updates_after_the_last_save_are_done_again_and_logged_once(dataset: Dataset, tmp_path: Path) -> None:
    with Training(tmp_path, QUICK, dataset) as training:
        training.run()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 18}\n{"step": 2')
    with Training(tmp_path, replace(QUICK, steps=18), None, resume=True) as training:
        training.run()
    lines = [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [6, 12, 18]


def test_more_experience_can_be_added_on_resuming(
    synthetic: ModuleType, dataset: Dataset, record: Callable[[Any], Path], tmp_path: Path
) -> None:
    with Training(tmp_path, QUICK, dataset) as training:
        training.run()
        held_out = {name for name, out in training.state.held_out.items() if out}
    more = load([record(synthetic.make_world(4, 3, seed=8))])
    with Training(tmp_path, replace(QUICK, steps=18), more, resume=True) as training:
        assert len(training.replay) == len(dataset.transitions) + len(more.transitions)
        assert training.state.best is None
        training.run()
        assert held_out <= {name for name, out in training.state.held_out.items() if out}


def test_a_training_that_is_done_is_only_evaluated_again(dataset: Dataset, tmp_path: Path) -> None:
    with Training(tmp_path, QUICK, dataset) as training:
        first = training.run()
    with Training(tmp_path, QUICK, None, resume=True) as training:
        assert training.run() == first


def test_without_hosts_to_hold_out_the_latest_policy_is_the_best(dataset: Dataset, tmp_path: Path) -> None:
    with Training(tmp_path, replace(QUICK, validation_fraction=0.0), dataset) as training:
        assert training.run() == {}
        assert training.state.best_step == 12
    assert _same(_weights(tmp_path), _weights(tmp_path / LATEST))


def test_training_stops_early_when_nothing_gets_better(dataset: Dataset, tmp_path: Path) -> None:
    algorithm = replace(QUICK.algorithm, learning_rate=0.05)
    settings = replace(QUICK, algorithm=algorithm, steps=500, evaluate_every=2, patience=3)
    with Training(tmp_path, settings, dataset) as training:
        training.run()
        assert training.state.step < 500
        assert training.state.stale == 3
        assert training.state.step == (training.state.best_step or 0) + 6


def test_a_folder_that_holds_a_training_is_not_trained_over(dataset: Dataset, tmp_path: Path) -> None:
    with Training(tmp_path, QUICK, dataset) as training:
        training.run()
    with pytest.raises(TrainingError, match="resume it, or train into another folder"):
        Training(tmp_path, QUICK, dataset)


def test_a_crash_while_saving_leaves_a_training_to_resume(dataset: Dataset, tmp_path: Path) -> None:
    with Training(tmp_path, QUICK, dataset) as training:
        training.run()
    (tmp_path / LATEST).rename(tmp_path / f"{LATEST}.old")
    (tmp_path / f"{LATEST}.new").mkdir()
    with Training(tmp_path, replace(QUICK, steps=18), None, resume=True) as training:
        training.run()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and LATEST in path.name) == [LATEST]


def test_nothing_to_learn_from_is_said_with_the_reason(
    small_world: Any, record: Callable[[Any], Path], tmp_path: Path
) -> None:
    for item in small_world.experiences:
        item.ClearField("reward")
    with pytest.raises(TrainingError, match=r"nothing to learn from.* 36 without a reward left out"):
        Training(tmp_path, QUICK, load([record(small_world)]))
    with pytest.raises(TrainingError, match="no recording was given"):
        Training(tmp_path, QUICK, None)


def test_there_must_be_a_training_to_resume(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="holds no training to resume"):
        Training(tmp_path, QUICK, None, resume=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda facts: facts.update(format=7), "another format"),
        (lambda facts: facts.pop("step"), "step do not fit"),
        (lambda facts: facts.update(surprise=1), "cannot be read"),
    ],
)
def test_a_training_state_that_does_not_fit_is_refused(
    dataset: Dataset, tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    with Training(tmp_path, QUICK, dataset) as training:
        training.run()
    path = tmp_path / LATEST / "training.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(SnapshotError, match=problem):
        snapshots.load(tmp_path / LATEST)


@pytest.mark.parametrize("name", ["training.json", "training.safetensors"])
def test_a_damaged_training_state_is_refused(dataset: Dataset, tmp_path: Path, name: str) -> None:
    with Training(tmp_path, QUICK, dataset) as training:
        training.run()
    (tmp_path / LATEST / name).write_bytes(b"{")
    with pytest.raises(SnapshotError, match="cannot be read"):
        snapshots.load(tmp_path / LATEST)


def test_the_optimizer_of_another_network_is_refused() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    for tensors in ({"7.exp_avg": torch.zeros(3)}, {"0.exp_avg": torch.zeros(4)}, {"x.exp_avg": torch.zeros(3)}):
        with pytest.raises(SnapshotError, match="optimizer tensor"):
            snapshots.restore_optimizer(optimizer, tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("hidden", 0), ("validation_fraction", 1.0), ("patience", 0), ("evaluate_every", 0)],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        TrainingSettings(**{name: value})  # type: ignore[arg-type]


def test_settings_survive_json() -> None:
    assert TrainingSettings.from_json(json.loads(json.dumps(asdict(QUICK)))) == QUICK
    with pytest.raises(TypeError):
        TrainingSettings.from_json({"algorithm": {}, "colour": "blue"})
