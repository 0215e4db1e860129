"""What decisions were worth: lambda-returns over episodes.

The reward of a decision is the gain against the twin over the interval that follows it, so that the rewards of an
episode add up to its final gain (less the price of what was grown). A seed goes on paying long after it was planted;
its worth is therefore the return, not the reward.

Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438), for decisions t = 0 … T-1::

    delta_t     = r_t + gamma V(s_{t+1}) - V(s_t)
    advantage_t = delta_t + gamma lambda advantage_{t+1}
    return_t    = advantage_t + V(s_t)

with V(s_T) = 0 where the episode is done. Where it was cut short, V(s_T) is the value head's estimate.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def advantages(rewards: Floats, values: Floats, *, gamma: float, lambda_: float) -> Floats:
    """Generalised advantage estimates of consecutive decisions.

    Args:
        rewards: [T] rewards.
        values: [T + 1] estimates of the states' worth; the last is zero where the episode is done.
        gamma: discount of one decision, 0 to 1.
        lambda_: 0 trusts the next state's value, 1 only what was observed.

    Returns:
        [T] advantages, in the unit of the reward.

    Raises:
        ValueError: the lengths do not fit.
    """
    if len(values) != len(rewards) + 1:
        raise ValueError(f"{len(rewards)} rewards need {len(rewards) + 1} values, not {len(values)}")
    deltas = rewards + gamma * values[1:] - values[:-1]
    result = np.empty(len(rewards))
    running = 0.0
    for index in range(len(rewards) - 1, -1, -1):
        running = deltas[index] + gamma * lambda_ * running
        result[index] = running
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
