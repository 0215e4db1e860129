"""The algorithm: what every algorithm must do, and what this one promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from esperml.tamiyo import checkpoint
from esperml.tamiyo.policy import PolicyConfig, PolicyNetwork
from esperml.trainer import snapshots
from esperml.trainer.algorithm import AdvantageWeightedActorCritic, AdvantageWeightedConfig
from esperml.trainer.batches import Batch, judged, opinion, returns_of
from esperml.trainer.likelihood import Distribution
from esperml.trainer.replay import ReplayBuffer, Step
from esperml.trainer.returns import Returns
from esperml.trainer.transitions import transition

VOCABULARY = ("gate", "mlp")
Factory = Callable[[PolicyNetwork], AdvantageWeightedActorCritic]
ALGORITHMS: dict[str, Factory] = {
    "advantage_weighted": lambda network: AdvantageWeightedActorCritic(
        network, AdvantageWeightedConfig(learning_rate=2e-3)
    )
}


@pytest.fixture(params=ALGORITHMS)
def make_algorithm(request: pytest.FixtureRequest) -> Factory:
    return ALGORITHMS[request.param]


@pytest.fixture(scope="module")
def steps(synthetic: ModuleType) -> list[Step]:
    world = synthetic.make_world(6, 4, seed=3)
    with ReplayBuffer(1000, VOCABULARY) as replay:
        replay.add(transition(item, world.runs[item.episode_id]) for item in world.experiences)
        return replay.steps()


@pytest.fixture(scope="module")
def batch(steps: list[Step]) -> Batch:
    returns, held = returns_of(_network(), steps, gamma=1.0, lambda_=0.95, corrected=True)
    return Batch.of(steps, returns, advantage_scale=float((returns.returns - held.values).std()))


def _network(seed: int = 0) -> PolicyNetwork:
    torch.manual_seed(seed)
    return PolicyNetwork(PolicyConfig(vocabulary=VOCABULARY, hidden=16, layers=2))


def _equal(one: PolicyNetwork, other: PolicyNetwork) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# What every algorithm must do.


def test_fitting_lowers_the_loss(make_algorithm: Factory, batch: Batch) -> None:
    algorithm = make_algorithm(_network())
    losses = [algorithm.update(batch)["loss"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_an_update_changes_every_part_of_the_network(make_algorithm: Factory, batch: Batch) -> None:
    before, algorithm = _network(), make_algorithm(_network())
    algorithm.update(batch)
    changed = {
        name.split(".")[0]
        for (name, one), other in zip(before.named_parameters(), algorithm.network.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {name.split(".")[0] for name, _ in before.named_parameters()}


def test_losses_are_named_and_finite(make_algorithm: Factory, batch: Batch) -> None:
    losses = make_algorithm(_network()).update(batch)
    assert {"loss", "critic", "gradient_norm"} <= set(losses)
    assert all(math.isfinite(value) for value in losses.values())


def test_a_seed_decides_everything(make_algorithm: Factory, batch: Batch) -> None:
    networks = [_network(), _network()]
    for network in networks:
        algorithm = make_algorithm(network)
        for _ in range(3):
            algorithm.update(batch)
    assert _equal(*networks)


def test_a_saved_policy_decides_as_the_trained_one(make_algorithm: Factory, batch: Batch, tmp_path: Path) -> None:
    algorithm = make_algorithm(_network())
    algorithm.update(batch)
    checkpoint.save(tmp_path, algorithm.network)
    loaded = checkpoint.load(tmp_path).network
    algorithm.network.eval()
    with torch.inference_mode():
        one, other = algorithm.network(batch.graphs), loaded(batch.graphs)
    assert torch.equal(one.adapt_logit, other.adapt_logit)
    assert torch.equal(one.place_logits, other.place_logits)
    assert torch.equal(one.blueprint_logits, other.blueprint_logits)
    assert torch.equal(one.value, other.value)


def test_a_resumed_algorithm_goes_on_as_if_it_had_never_stopped(
    make_algorithm: Factory, batch: Batch, tmp_path: Path
) -> None:
    algorithm = make_algorithm(_network())
    for _ in range(3):
        algorithm.update(batch)
    checkpoint.save(tmp_path, algorithm.network)
    state = snapshots.optimizer_tensors(algorithm.optimizer)
    resumed = make_algorithm(checkpoint.load(tmp_path).network)
    snapshots.restore_optimizer(resumed.optimizer, state)
    for _ in range(3):
        assert algorithm.update(batch) == resumed.update(batch)
    assert _equal(algorithm.network, resumed.network)


def test_returns_that_are_no_numbers_leave_the_network_as_it_was(make_algorithm: Factory, batch: Batch) -> None:
    algorithm = make_algorithm(_network())
    broken = replace(batch, returns=torch.full_like(batch.returns, torch.nan))
    with pytest.raises(FloatingPointError, match="learning rate"):
        algorithm.update(broken)
    assert _equal(algorithm.network, _network())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same_losses(make_algorithm: Factory, steps: list[Step], batch: Batch) -> None:
    returns = Returns(batch.targets.double().numpy(), batch.returns.double().numpy())
    on_gpu = Batch.of(steps, returns, advantage_scale=batch.advantage_scale, device="cuda")
    one = make_algorithm(_network()).update(batch)
    other = make_algorithm(_network().to("cuda")).update(on_gpu)
    assert other == pytest.approx(one, rel=1e-3)


# What this algorithm promises.


def _bandit(steps: list[Step], done: Sequence[tuple[int | None, float, float]], host: str | None = "host") -> Batch:
    """Decisions on one and the same host: (place or None, propensity of adapting and place together, return)."""
    step = next(step for step in steps if step.may_adapt)
    result, returns = [], []
    for number, (place, propensity, worth) in enumerate(done):
        choice = replace(
            step.choice,
            place=place,
            adapt_log_probability=math.log(0.5),
            place_log_probability=0.0 if place is None else math.log(propensity),
            blueprint_log_probability=0.0,
        )
        name = host or f"host {number}"
        result.append(replace(step, choice=choice, blueprint=None if place is None else 0, host=name))
        returns.append(worth)
    return Batch.of(result, Returns(np.asarray(returns), np.asarray(returns)))


def _train(batch: Batch, updates: int = 150, **changes: Any) -> Distribution:
    config = AdvantageWeightedConfig(learning_rate=3e-3, weight_decay=0.0, entropy_coefficient=0.0, **changes)
    algorithm = AdvantageWeightedActorCritic(_network(), config)
    for _ in range(updates):
        algorithm.update(batch)
    with torch.inference_mode():
        return Distribution.of(algorithm.network(batch.graphs), batch.graphs)


def test_what_behaviour_did_often_is_not_learnt_for_being_frequent(steps: list[Step]) -> None:
    policy = _train(_bandit(steps, [(0, 0.9, 0.0)] * 9 + [(1, 0.1, 0.0)], host=None))
    assert float(policy.where[0]) == pytest.approx(math.log(0.5), abs=0.1)
    assert float(policy.where[1]) == pytest.approx(math.log(0.5), abs=0.1)


def test_the_better_place_is_preferred_by_its_advantage(steps: list[Step]) -> None:
    batch = _bandit(steps, [(0, 0.5, 0.5), (1, 0.5, 0.0)])
    policy = _train(batch, temperature=1.0, graft_coefficient=0.0)
    graft = policy.where[:2] + policy.what[:2, 0]
    # The difference of the returns, 0.5, over temperature times their standard deviation, 0.25.
    assert float(graft[0] - graft[1]) == pytest.approx(0.5 / (1.0 * 0.25), rel=0.05)


def test_a_ranking_says_nothing_of_what_was_not_tried(steps: list[Step]) -> None:
    batch = _bandit(steps, [(0, 0.5, 0.5), (1, 0.5, 0.0)])
    algorithm = AdvantageWeightedActorCritic(_network(), AdvantageWeightedConfig())
    output = algorithm.network(batch.graphs)
    scores = Distribution.of(output, batch.graphs).where
    scores.retain_grad()
    loss = algorithm._ranking_loss(scores[:2], torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[:2].abs().min() > 0
    assert float(scores.grad[2:].abs().max()) == 0.0


def test_a_ranking_is_the_cross_entropy_between_two_softmaxes() -> None:
    algorithm = AdvantageWeightedActorCritic(_network(), AdvantageWeightedConfig(temperature=2.0, noise=0.1))
    scores, advantage = torch.tensor([0.1, -0.4, 2.0, 9.0]), torch.tensor([0.3, 0.0, -0.3, 5.0])
    loss = algorithm._ranking_loss(scores, advantage, torch.tensor([0, 0, 0, 1]))
    target = torch.softmax(advantage[:3] / (2.0 * math.sqrt(0.06 + 0.01)), 0)
    assert float(loss) == pytest.approx(float(-(target * torch.log_softmax(scores[:3], 0)).sum()))
    assert float(algorithm._ranking_loss(scores, advantage, torch.arange(4))) == 0.0


@pytest.mark.parametrize(("gain", "adapts"), [(0.5, True), (-0.5, False)])
def test_adapting_is_learnt_where_it_returned_more_than_doing_nothing(
    steps: list[Step], gain: float, adapts: bool
) -> None:
    policy = _train(_bandit(steps, [(0, 0.5, gain), (1, 0.5, gain), (None, 1.0, 0.0), (None, 1.0, 0.0)]))
    assert bool(policy.whether[0, 1] > policy.whether[0, 0]) is adapts


def test_adapting_is_judged_by_the_place_that_the_policy_prefers(steps: list[Step]) -> None:
    done: list[tuple[int | None, float, float]] = [(0, 0.5, 0.6), (1, 0.5, -0.9), (None, 1.0, 0.0)]
    policy = _train(_bandit(steps, done), updates=300, temperature=0.3)
    assert policy.where[0] > policy.where[1] + 2
    assert policy.whether[0, 1] > policy.whether[0, 0]


def test_a_batch_without_grafts_or_choices_still_trains_the_critic(steps: list[Step]) -> None:
    idle = [step for step in steps if not step.may_adapt][:5]
    losses = AdvantageWeightedActorCritic(_network(), AdvantageWeightedConfig()).update(
        Batch.of(idle, Returns(np.full(5, 0.5), np.full(5, 0.5)))
    )
    assert losses["whether"] == losses["graft"] == losses["ranking"] == losses["entropy"] == 0
    assert losses["critic"] > 0
    assert math.isfinite(losses["gradient_norm"])


def test_the_entropy_is_that_of_the_joint_decision(steps: list[Step], batch: Batch) -> None:
    with torch.inference_mode():
        policy = Distribution.of(_network()(batch.graphs), batch.graphs)
        entropy = policy.entropy()
    for index, step in enumerate(steps):
        first, places = int(policy.first_place[index]), len(step.features.place)
        where = policy.where[first : first + places, None] + policy.what[first : first + places]
        joint = torch.cat([policy.whether[index, :1], (policy.whether[index, 1] + where).flatten()]).exp()
        joint = joint[joint > 0]
        assert float(joint.sum()) == pytest.approx(1.0, abs=1e-5)
        assert float(entropy[index]) == pytest.approx(float(-(joint * joint.log()).sum()), abs=1e-4)


def test_what_is_judged_is_what_the_heads_say(steps: list[Step]) -> None:
    network = _network()
    result = judged(steps, np.zeros(len(steps)), opinion(network, steps))
    chosen = [step for step in steps if step.may_adapt]
    assert result.adapted.tolist() == [step.choice.place is not None for step in chosen]
    row, step = next((row, step) for row, step in enumerate(chosen) if step.choice.place is not None)
    single = Batch.of([step], Returns(np.zeros(1), np.zeros(1)))
    with torch.inference_mode():
        policy = Distribution.of(network(single.graphs), single.graphs)
    place, blueprint = step.choice.place or 0, step.blueprint or 0
    graft = float(policy.where[place] + policy.what[place, blueprint])
    taken = step.choice.place_log_probability + step.choice.blueprint_log_probability
    assert result.graft_log_probability[row] == pytest.approx(graft, abs=1e-4)
    assert result.graft_log_ratio[row] == pytest.approx(graft - taken, abs=1e-4)
    assert result.log_ratio[row] == pytest.approx(
        float(policy.whether[0, 1]) - step.choice.adapt_log_probability + graft - taken, abs=1e-4
    )
    assert judged([], np.zeros(0), opinion(network, [])).returns.size == 0


def test_an_episode_that_was_cut_short_goes_on_with_the_critics_estimate(steps: list[Step]) -> None:
    network = _network()
    episode = [step for step in steps if step.episode == steps[0].episode]
    cut = [replace(step, done=False, next_features=None) for step in episode[:1]]
    cut.append(replace(episode[1], next_features=episode[2].features))
    whole, _ = returns_of(network, episode, gamma=1.0, lambda_=1.0, corrected=False)
    short, _ = returns_of(network, cut, gamma=1.0, lambda_=1.0, corrected=False)
    value = opinion(network, episode).values[2]
    assert whole.returns[0] == pytest.approx(sum(step.reward for step in episode))
    assert short.returns[0] == pytest.approx(episode[0].reward + episode[1].reward + value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 1.5),
        ("lambda_", -0.1),
        ("temperature", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1.0),
        ("weight_clip", 0.5),
        ("batch_size", 0),
    ],
)
def test_a_hyperparameter_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} is "):
        AdvantageWeightedConfig(**{name: value})  # type: ignore[arg-type]
