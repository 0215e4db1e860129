"""What decisions were worth: returns over episodes, corrected for what was done later.

The reward of a decision is the gain against the twin over the interval that follows it, so that the rewards of an
episode add up to its final gain (less the price of what was grown). A seed goes on paying long after it was planted;
its worth is therefore the return, not the reward.

But behaviour is random and goes on growing: without a correction, a seed is credited with what a better one that
came later brought, or blamed for a worse one. V-trace (Espeholt et al., 2018, arXiv:1802.01561) follows a recorded
episode for as long as it does what the policy would do, and goes over to the critic where it departs from it. For
decisions t = 0 … T-1 with w_t = min(1, pi(a_t | s_t) / mu(a_t | s_t))::

    delta_t  = r_t + gamma V(s_{t+1}) - V(s_t)
    target_t = V(s_t) + w_t (delta_t + gamma lambda (target_{t+1} - V(s_{t+1})))        what the critic learns
    return_t = r_t + gamma target_{t+1}                                                 what the decision was worth

with V(s_T) = target_T = 0 where the episode is done. Where it was cut short, both are the value head's estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Returns:
    """Returns of n decisions, in the unit of the reward.

    Attributes:
        targets: [n] what the states were worth: the critic's targets.
        returns: [n] what the decisions were worth.
    """

    targets: Floats
    returns: Floats


def v_trace(rewards: Floats, values: Floats, ratios: Floats, *, gamma: float, lambda_: float) -> Returns:
    """Returns of consecutive decisions.

    Args:
        rewards: [T] rewards.
        values: [T + 1] estimates of the states' worth; the last is zero where the episode is done.
        ratios: [T] pi / mu of what was done; one throughout gives the lambda-returns of the behaviour.
        gamma: discount of one decision, 0 to 1.
        lambda_: 0 trusts the next state's value, 1 what was observed.

    Raises:
        ValueError: the lengths do not fit.
    """
    if not len(values) - 1 == len(rewards) == len(ratios):
        raise ValueError(f"{len(rewards)} rewards need as many ratios and one value more")
    weights = np.minimum(ratios, 1.0)
    result = Returns(targets=np.empty(len(rewards)), returns=np.empty(len(rewards)))
    ahead = values[-1]
    for index in range(len(rewards) - 1, -1, -1):
        beyond = ahead - values[index + 1]
        delta = rewards[index] + gamma * values[index + 1] - values[index]
        result.returns[index] = rewards[index] + gamma * ahead
        ahead = values[index] + weights[index] * (delta + gamma * lambda_ * beyond)
        result.targets[index] = ahead
    return result


def segments(positions: Iterable[int]) -> list[list[int]]:
    """Splits the positions of an episode's experiences into stretches without gaps.

    An experience whose reward was not measured is missing here; a return must not be carried across it.

    Args:
        positions: ``TrainingExperience.index``, rising.

    Returns:
        Lists of offsets into ``positions``.
    """
    result: list[list[int]] = []
    previous = None
    for offset, position in enumerate(positions):
        if previous is None or position != previous + 1:
            result.append([])
        result[-1].append(offset)
        previous = position
    return result
