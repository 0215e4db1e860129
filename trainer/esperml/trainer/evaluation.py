"""Judges a policy on steps that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from esperml.tamiyo.policy import PolicyNetwork
from esperml.trainer.algorithm import AdvantageWeightedActorCritic
from esperml.trainer.batches import Batch, judged, returns_of
from esperml.trainer.metrics import judge
from esperml.trainer.replay import Step
from esperml.trainer.returns import Returns

_CHUNK = 512


def evaluate(
    network: PolicyNetwork, steps: Sequence[Step], *, gamma: float, device: torch.device | str
) -> dict[str, float]:
    """The metrics of :mod:`esperml.trainer.metrics`, on returns as they were observed.

    Args:
        network: the policy.
        steps: episode by episode, by position within.
        gamma: discount of one decision.
        device: where the network is.
    """
    # With lambda = 1 a complete episode's return owes nothing to the critic that is judged by it.
    returns, held = returns_of(network, steps, gamma=gamma, lambda_=1.0, corrected=False, device=device)
    return judge(judged(steps, returns.returns, held))


def selection_score(metrics: dict[str, float]) -> float | None:
    """The number that is greatest for the best policy: what its decisions gain over behaviour's, by the lower bound.

    The bound, not the estimate, because a policy that rests on few recorded decisions is easily overrated (Thomas et
    al., 2015, "High-confidence off-policy evaluation"). Losses rank policies less well: a policy that grows sure of
    itself gains more and yet pays for every surprise.

    Returns:
        None where the gain could not be measured.
    """
    return metrics.get("policy_gain_low", metrics.get("policy_gain"))


def held_out_losses(
    algorithm: AdvantageWeightedActorCritic,
    steps: Sequence[Step],
    *,
    advantage_scale: float,
    device: torch.device | str,
) -> dict[str, float]:
    """The losses that training minimises, on ``steps``, averaged over the decisions that each is about.

    Returns:
        ``<name>_loss`` for each loss that has something to judge; empty where there is no step.
    """
    if not steps:
        return {}
    config = algorithm.config
    returns, _ = returns_of(
        algorithm.network, steps, gamma=config.gamma, lambda_=config.lambda_, corrected=True, device=device
    )
    algorithm.network.eval()
    totals = dict.fromkeys(("whether", "graft", "ranking", "critic"), 0.0)
    counts = dict.fromkeys(totals, 0)
    with torch.no_grad():
        for chunk in _chunks(steps):
            batch = Batch.of(
                [steps[index] for index in chunk],
                Returns(returns.targets[chunk], returns.returns[chunk]),
                advantage_scale=advantage_scale,
                device=device,
            )
            losses = algorithm.losses(batch)
            choices, grafts = int(batch.may_adapt.sum()), int(batch.adapted.sum())
            for name, count in (("whether", choices), ("graft", grafts), ("ranking", grafts), ("critic", len(chunk))):
                totals[name] += float(getattr(losses, name)) * count
                counts[name] += count
    return {f"{name}_loss": totals[name] / counts[name] for name in totals if counts[name]}


def _chunks(steps: Sequence[Step]) -> Iterator[list[int]]:
    """Indices of whole hosts, about :data:`_CHUNK` at a time."""
    groups: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        groups.setdefault(step.host, []).append(index)
    chunk: list[int] = []
    for group in groups.values():
        chunk += group
        if len(chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
