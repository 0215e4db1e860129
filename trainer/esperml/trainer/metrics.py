"""How good a policy is, as far as recorded experience can tell.

Returns are those of the recorded decisions, observed to the end of their episodes. Decisions of one *host* were taken
on runs of one twin, at whatever steps, before anything grew there, so that what was done compares. A metric that the
experience cannot measure is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_BOOTSTRAPS = 1000
_LEAST_RANKED = 3


@dataclass(frozen=True, slots=True)
class Judged:
    """Recorded decisions beside what the policy makes of them; n decisions that had a choice.

    Attributes:
        adapted: [n] True where something was germinated.
        returns: [n] what the decision was worth, observed.
        values: [n] the value head's estimate of that.
        adapt_probability: [n] the policy's probability of adapting.
        log_ratio: [n] log of the policy's probability of what was done, over the behaviour's.
        graft_log_ratio: [n] the same of place and blueprint alone, given that something is done; 0 where nothing was.
        graft_log_probability: [n] the policy's log-probability of place and blueprint; 0 where nothing was done.
        hosts: [n] name of the host, as in :class:`~esperml.trainer.transitions.Transition`.
        clusters: [n] name of the cluster.
    """

    adapted: Bools
    returns: Floats
    values: Floats
    adapt_probability: Floats
    log_ratio: Floats
    graft_log_ratio: Floats
    graft_log_probability: Floats
    hosts: Sequence[str]
    clusters: Sequence[str]


def judge(judged: Judged, *, seed: int = 0) -> dict[str, float]:
    """Every metric that can be measured, by name. ``seed`` is that of the bootstrap."""
    return {
        "decisions": float(len(judged.returns)),
        **adaptation_accuracy(judged),
        **value_error(judged.values, judged.returns),
        **ranking(judged),
        **policy_return(judged, seed=seed),
    }


def adaptation_accuracy(judged: Judged) -> dict[str, float]:
    """Accuracy of the adaptation head against what proved right.

    Adapting was right on a host if the grafts recorded there, weighted by how likely the policy is to choose them
    (self-normalised importance weights), returned more than the decisions to do nothing that were recorded there; or,
    where there are none, more than the twin that was left alone, which is 0 by definition. The head said so if its mean
    probability of adapting there is above one half. A host on which nobody adapted is not judged.

    Returns:
        ``adaptation_accuracy`` over hosts, ``adaptation_base_rate`` (the share of hosts where adapting was right)
        and, where both answers were right somewhere, ``adaptation_balanced_accuracy``.
    """
    right: list[bool] = []
    said: list[bool] = []
    for members in _groups(judged.hosts):
        grafts, nothing = members[judged.adapted[members]], members[~judged.adapted[members]]
        if not len(grafts):
            continue
        weights = np.exp(judged.graft_log_ratio[grafts] - judged.graft_log_ratio[grafts].max())
        gain = float(np.average(judged.returns[grafts], weights=weights))
        gain -= float(judged.returns[nothing].mean()) if len(nothing) else 0.0
        right.append(gain > 0)
        said.append(float(judged.adapt_probability[members].mean()) > 0.5)
    if not right:
        return {}
    answers, truth = np.asarray(said), np.asarray(right)
    result = {"adaptation_accuracy": float((answers == truth).mean()), "adaptation_base_rate": float(truth.mean())}
    if truth.any() and not truth.all():
        result["adaptation_balanced_accuracy"] = float((answers[truth].mean() + (~answers[~truth]).mean()) / 2)
    return result


def value_error(values: Floats, returns: Floats) -> dict[str, float]:
    """How far the value head is from what came of it.

    Returns:
        ``value_mae``, in units of the reward, and ``value_explained_variance``, which is
        1 - Var(returns - values) / Var(returns) and absent where all returns are equal.
    """
    if not len(returns):
        return {}
    result = {"value_mae": float(np.abs(values - returns).mean())}
    if returns.var() > 0:
        result["value_explained_variance"] = float(1 - (returns - values).var() / returns.var())
    return result


def ranking(judged: Judged) -> dict[str, float]:
    """How well the policy orders the grafts that were recorded on one host before anything else grew there.

    Returns:
        ``graft_rank_correlation``: Spearman's, between the policy's probabilities and the returns, averaged over the
        hosts with three grafts or more. ``graft_score``: what the recorded graft that the policy prefers gains over
        the average one, as a share of what the best recorded one gains; sums over those hosts. The best of noisy
        returns is biased upward, so that even a perfect policy stays somewhat below 1.
    """
    correlations: list[float] = []
    gained = possible = 0.0
    for members in _groups(judged.hosts):
        grafts = members[judged.adapted[members]]
        returns, scores = judged.returns[grafts], judged.graft_log_probability[grafts]
        if len(grafts) < _LEAST_RANKED or np.ptp(returns) == 0:
            continue
        gained += float(returns[scores == scores.max()].mean() - returns.mean())
        possible += float(returns.max() - returns.mean())
        if np.ptp(scores) > 0:
            correlations.append(float(np.corrcoef(_ranks(scores), _ranks(returns))[0, 1]))
    result: dict[str, float] = {}
    if correlations:
        result["graft_rank_correlation"] = float(np.mean(correlations))
    if possible > 0:
        result["graft_score"] = gained / possible
    return result


def policy_return(judged: Judged, *, seed: int) -> dict[str, float]:
    """What a decision of the policy is worth, estimated from decisions that others took.

    Self-normalised importance sampling, one decision at a time: the policy decides once, and things go on as they did.
    The interval is the 95 % bootstrap over clusters, since decisions of one cluster are not independent.

    Returns:
        ``behaviour_return``, ``policy_return``, ``policy_gain`` (their difference) with ``policy_gain_low`` and
        ``policy_gain_high``, and ``effective_samples`` (Kish). The interval is absent for a single cluster.
    """
    if not len(judged.returns):
        return {}
    weights = np.exp(judged.log_ratio - judged.log_ratio.max())
    estimate = float(np.average(judged.returns, weights=weights))
    result = {
        "behaviour_return": float(judged.returns.mean()),
        "policy_return": estimate,
        "policy_gain": estimate - float(judged.returns.mean()),
        "effective_samples": float(weights.sum() ** 2 / np.square(weights).sum()),
    }
    clusters = _groups(judged.clusters)
    if len(clusters) > 1:
        sums = np.asarray(
            [
                (
                    weights[members].sum(),
                    weights[members] @ judged.returns[members],
                    judged.returns[members].sum(),
                    len(members),
                )
                for members in clusters
            ]
        )
        draws = np.random.default_rng(seed).integers(len(clusters), size=(_BOOTSTRAPS, len(clusters)))
        weight, weighted, plain, count = np.moveaxis(sums[draws].sum(axis=1), 1, 0)
        low, high = np.quantile(weighted / np.maximum(weight, np.finfo(float).tiny) - plain / count, (0.025, 0.975))
        result |= {"policy_gain_low": float(low), "policy_gain_high": float(high)}
    return result


def _groups(names: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    return [np.asarray(indices, dtype=np.int64) for indices in members.values()]


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse], dtype=np.float64)
