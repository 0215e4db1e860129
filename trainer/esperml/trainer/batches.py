"""Steps of the replay buffer as tensors, and what a policy makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esperml.tamiyo.features import GraphBatch, GraphTensors, collate
from esperml.tamiyo.policy import PolicyNetwork
from esperml.trainer import returns
from esperml.trainer.likelihood import Distribution
from esperml.trainer.metrics import Floats, Judged
from esperml.trainer.replay import Step

_INFERENCE_BATCH = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """n recorded decisions as tensors.

    Attributes:
        graphs: the n hosts.
        adapted: [n] bool, True where something was germinated.
        may_adapt: [n] bool, False where the mask left no choice.
        place: [n] index among the host's places of what was germinated; 0 where nothing was.
        blueprint: [n] index into the vocabulary; 0 where nothing was.
        adapt_log_propensity: [n] behaviour's log-probability of adapting or not, whichever was done.
        graft_log_propensity: [n] that of place and blueprint together; 0 where nothing was germinated.
        returns: [n] lambda-returns.
        host: [n] number of the host, as in :class:`~esperml.trainer.transitions.Transition`.
        advantage_scale: standard deviation of advantages, above 0.
    """

    graphs: GraphBatch
    adapted: Tensor
    may_adapt: Tensor
    place: Tensor
    blueprint: Tensor
    adapt_log_propensity: Tensor
    graft_log_propensity: Tensor
    returns: Tensor
    host: Tensor
    advantage_scale: float

    @classmethod
    def of(
        cls,
        steps: Sequence[Step],
        returns_: Floats,
        *,
        advantage_scale: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """The batch of ``steps`` with their returns."""

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        return cls(
            graphs=collate([step.features for step in steps]).to(device),
            adapted=column([step.choice.place is not None for step in steps], torch.bool),
            may_adapt=column([step.may_adapt for step in steps], torch.bool),
            place=column([step.choice.place or 0 for step in steps], torch.int64),
            blueprint=column([step.blueprint or 0 for step in steps], torch.int64),
            adapt_log_propensity=column([step.choice.adapt_log_probability for step in steps], torch.float32),
            graft_log_propensity=column(
                [step.choice.place_log_probability + step.choice.blueprint_log_probability for step in steps],
                torch.float32,
            ),
            returns=column(returns_.tolist(), torch.float32),
            host=column(_numbers([step.host for step in steps]), torch.int64),
            advantage_scale=advantage_scale,
        )

    def log_likelihood(self, policy: Distribution) -> tuple[Tensor, Tensor, Tensor]:
        """[n] each: the policy's log-probability of whether, where and what was done; 0 where a head had no say."""
        rows = torch.arange(len(self.place), device=self.place.device)
        whether = torch.where(self.may_adapt, policy.whether[rows, self.adapted.long()], 0.0)
        # Only where something was germinated is there a place to look up.
        where, what = torch.zeros_like(whether), torch.zeros_like(whether)
        grafts = self.adapted.nonzero().squeeze(1)
        place = policy.first_place[grafts] + self.place[grafts]
        where = where.index_put((grafts,), policy.where[place])
        what = what.index_put((grafts,), policy.what[place, self.blueprint[grafts]])
        return whether, where, what


def _numbers(names: Sequence[str]) -> list[int]:
    """The same number for the same name."""
    number = {name: position for position, name in enumerate(dict.fromkeys(names))}
    return [number[name] for name in names]


def values_of(network: PolicyNetwork, graphs: Sequence[GraphTensors], device: torch.device | str = "cpu") -> Floats:
    """[n] the value head's estimates of n hosts, in evaluation mode."""
    network.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(graphs), _INFERENCE_BATCH):
            batch = collate(graphs[start : start + _INFERENCE_BATCH]).to(device)
            parts.append(network(batch).value.double().cpu().numpy())
    return np.concatenate(parts) if parts else np.empty(0)


def lambda_returns(
    network: PolicyNetwork,
    steps: Sequence[Step],
    *,
    gamma: float,
    lambda_: float,
    device: torch.device | str = "cpu",
) -> tuple[Floats, Floats]:
    """Returns of steps under the current value head.

    Args:
        network: whose value head estimates what lies beyond.
        steps: episode by episode, by position within.
        gamma: discount of one decision.
        lambda_: see :func:`esperml.trainer.returns.advantages`.
        device: where the network is.

    Returns:
        [n] returns and [n] advantages.
    """
    values = values_of(network, [step.features for step in steps], device)
    beyond = {index: step.next_features for index, step in enumerate(steps) if step.next_features is not None}
    estimates = values_of(network, list(beyond.values()), device)
    ahead = dict(zip(beyond, estimates.tolist(), strict=True))
    rewards = np.asarray([step.reward for step in steps], dtype=np.float64)
    result = np.empty(len(steps))
    for stretch in _stretches(steps):
        # Zero where the episode is done: nothing lies beyond.
        last = 0.0 if steps[stretch[-1]].done else ahead[stretch[-1]]
        result[stretch] = returns.advantages(
            rewards[stretch], np.append(values[stretch], last), gamma=gamma, lambda_=lambda_
        )
    return result + values, result


def _stretches(steps: Sequence[Step]) -> Iterator[list[int]]:
    """Indices of steps that follow one another without a gap."""
    by_episode: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        by_episode.setdefault(step.episode, []).append(index)
    for indices in by_episode.values():
        for stretch in returns.segments(steps[index].position for index in indices):
            yield [indices[offset] for offset in stretch]


def judged(
    network: PolicyNetwork, steps: Sequence[Step], returns_: Floats, device: torch.device | str = "cpu"
) -> Judged:
    """What the policy makes of recorded decisions; those that had no choice are left out."""
    network.eval()
    chosen = [index for index, step in enumerate(steps) if step.may_adapt]
    columns: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for start in range(0, len(chosen), _INFERENCE_BATCH):
            part = chosen[start : start + _INFERENCE_BATCH]
            batch = Batch.of([steps[index] for index in part], returns_[part], device=device)
            output = network(batch.graphs)
            policy = Distribution.of(output, batch.graphs)
            whether, where, what = batch.log_likelihood(policy)
            graft = where + what
            ratio = graft - batch.graft_log_propensity
            columns.append(
                (
                    batch.adapted,
                    output.value,
                    policy.whether[:, 1].exp(),
                    whether - batch.adapt_log_propensity + ratio,
                    ratio,
                    graft,
                )
            )
    arrays = [torch.cat(column).cpu().double().numpy() for column in zip(*columns, strict=True)] or [np.empty(0)] * 6
    return Judged(
        adapted=arrays[0].astype(bool),
        returns=returns_[chosen],
        values=arrays[1],
        adapt_probability=arrays[2],
        log_ratio=arrays[3],
        graft_log_ratio=arrays[4],
        graft_log_probability=arrays[5],
        hosts=[steps[index].host for index in chosen],
        clusters=[steps[index].cluster for index in chosen],
    )
