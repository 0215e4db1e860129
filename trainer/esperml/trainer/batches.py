"""Steps of the replay buffer as tensors, and what a policy makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esperml.tamiyo.features import GraphBatch, GraphTensors, collate
from esperml.tamiyo.policy import PolicyNetwork
from esperml.trainer.likelihood import Distribution
from esperml.trainer.metrics import Judged
from esperml.trainer.replay import Step
from esperml.trainer.returns import Floats, Returns, segments, v_trace

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
        targets: [n] what the states were worth.
        returns: [n] what the decisions were worth.
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
    targets: Tensor
    returns: Tensor
    host: Tensor
    advantage_scale: float

    @classmethod
    def of(
        cls,
        steps: Sequence[Step],
        returns: Returns,
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
            graft_log_propensity=column([step.choice.graft_log_probability for step in steps], torch.float32),
            targets=column(returns.targets.tolist(), torch.float32),
            returns=column(returns.returns.tolist(), torch.float32),
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


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a policy makes of n recorded decisions.

    Attributes:
        values: [n] the value head's estimate of the state's worth.
        adapt_probability: [n] of adapting; 0 where the mask leaves no choice.
        log_probability: [n, 3] of whether, where and what was done; 0 where a head had no say.
    """

    values: Floats
    adapt_probability: Floats
    log_probability: Floats


def opinion(network: PolicyNetwork, steps: Sequence[Step], device: torch.device | str = "cpu") -> Opinion:
    """What a policy, in evaluation mode, makes of ``steps``."""
    network.eval()
    parts: list[Floats] = [np.empty((0, 5))]
    with torch.inference_mode():
        for start in range(0, len(steps), _INFERENCE_BATCH):
            part = steps[start : start + _INFERENCE_BATCH]
            zeros = np.zeros(len(part))
            batch = Batch.of(part, Returns(zeros, zeros), device=device)
            output = network(batch.graphs)
            policy = Distribution.of(output, batch.graphs)
            columns = (output.value, policy.whether[:, 1].exp(), *batch.log_likelihood(policy))
            parts.append(torch.stack(columns, dim=1).double().cpu().numpy())
    table = np.concatenate(parts)
    return Opinion(values=table[:, 0], adapt_probability=table[:, 1], log_probability=table[:, 2:])


def returns_of(
    network: PolicyNetwork,
    steps: Sequence[Step],
    *,
    gamma: float,
    lambda_: float,
    corrected: bool,
    device: torch.device | str = "cpu",
) -> tuple[Returns, Opinion]:
    """Returns of recorded decisions under the current policy and critic.

    Args:
        network: the policy, and the critic that estimates what lies beyond.
        steps: episode by episode, by position within.
        gamma: discount of one decision.
        lambda_: see :func:`esperml.trainer.returns.v_trace`.
        corrected: whether to go over to the critic where an episode departs from the policy; if not, the returns are
            what things came to as they went on.
        device: where the network is.

    Returns:
        The returns of n steps, and the opinion that they were computed with.
    """
    held = opinion(network, steps, device)
    behaviour = [step.choice for step in steps]
    ratios = np.ones(len(steps))
    if corrected:
        taken = np.asarray([choice.joint_log_probability for choice in behaviour])
        ratios = np.exp(np.minimum(held.log_probability.sum(axis=1) - taken, 0.0))
    cut = [index for index, step in enumerate(steps) if step.next_features is not None]
    ahead = dict(zip(cut, _values(network, [steps[index].next_features for index in cut], device), strict=True))
    rewards = np.asarray([step.reward for step in steps], dtype=np.float64)
    result = Returns(targets=np.empty(len(steps)), returns=np.empty(len(steps)))
    for stretch in _stretches(steps):
        # Zero where the episode is done: nothing lies beyond.
        last = 0.0 if steps[stretch[-1]].done else ahead[stretch[-1]]
        values = np.append(held.values[stretch], last)
        part = v_trace(rewards[stretch], values, ratios[stretch], gamma=gamma, lambda_=lambda_)
        result.targets[stretch], result.returns[stretch] = part.targets, part.returns
    return result, held


def _values(
    network: PolicyNetwork, graphs: Sequence[GraphTensors | None], device: torch.device | str
) -> Iterator[float]:
    """The value head's estimates of hosts, in evaluation mode."""
    known = [graph for graph in graphs if graph is not None]
    with torch.inference_mode():
        for start in range(0, len(known), _INFERENCE_BATCH):
            batch = collate(known[start : start + _INFERENCE_BATCH]).to(device)
            yield from network(batch).value.double().cpu().tolist()


def _stretches(steps: Sequence[Step]) -> Iterator[list[int]]:
    """Indices of steps that follow one another without a gap."""
    by_episode: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        by_episode.setdefault(step.episode, []).append(index)
    for indices in by_episode.values():
        for stretch in segments(steps[index].position for index in indices):
            yield [indices[offset] for offset in stretch]


def judged(steps: Sequence[Step], returns: Floats, held: Opinion) -> Judged:
    """What there is to judge a policy by; decisions that had no choice are left out.

    Args:
        steps: n recorded decisions.
        returns: [n] what they were worth.
        held: what the policy makes of them.
    """
    chosen = [index for index, step in enumerate(steps) if step.may_adapt]
    choices = [steps[index].choice for index in chosen]
    whether, graft = held.log_probability[chosen, 0], held.log_probability[chosen, 1:].sum(axis=1)
    graft_ratio = graft - np.asarray([choice.graft_log_probability for choice in choices])
    return Judged(
        adapted=np.asarray([choice.place is not None for choice in choices], dtype=np.bool_),
        returns=returns[chosen],
        values=held.values[chosen],
        adapt_probability=held.adapt_probability[chosen],
        log_ratio=whether - np.asarray([choice.adapt_log_probability for choice in choices]) + graft_ratio,
        graft_log_ratio=graft_ratio,
        graft_log_probability=graft,
        hosts=[steps[index].host for index in chosen],
        clusters=[steps[index].cluster for index in chosen],
    )
