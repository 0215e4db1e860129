"""Lambda-returns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.trainer.returns import advantages, segments

UNIT = st.floats(-1, 1, allow_nan=False)


@st.composite
def episodes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rewards = draw(st.lists(UNIT, min_size=1, max_size=8))
    values = draw(st.lists(UNIT, min_size=len(rewards) + 1, max_size=len(rewards) + 1))
    return np.asarray(rewards), np.asarray(values)


@given(episode=episodes(), gamma=st.floats(0, 1), lambda_=st.floats(0, 1))
def test_advantages_are_the_weighted_sum_of_errors_ahead(
    episode: tuple[np.ndarray, np.ndarray], gamma: float, lambda_: float
) -> None:
    rewards, values = episode
    errors = rewards + gamma * values[1:] - values[:-1]
    expected = [
        sum((gamma * lambda_) ** (ahead - now) * errors[ahead] for ahead in range(now, len(rewards)))
        for now in range(len(rewards))
    ]
    np.testing.assert_allclose(advantages(rewards, values, gamma=gamma, lambda_=lambda_), expected, atol=1e-9)


@given(episode=episodes())
def test_with_lambda_one_the_critic_only_says_what_lies_beyond(episode: tuple[np.ndarray, np.ndarray]) -> None:
    rewards, values = episode
    returns = advantages(rewards, values, gamma=1.0, lambda_=1.0) + values[:-1]
    np.testing.assert_allclose(returns, np.cumsum(rewards[::-1])[::-1] + values[-1], atol=1e-9)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rewards need 3 values, not 2"):
        advantages(np.zeros(2), np.zeros(2), gamma=1.0, lambda_=1.0)


@given(st.sets(st.integers(0, 30)))
def test_stretches_break_exactly_where_experience_is_missing(found: set[int]) -> None:
    positions = sorted(found)
    stretches = segments(positions)
    assert [offset for stretch in stretches for offset in stretch] == list(range(len(positions)))
    for stretch in stretches:
        assert all(positions[b] - positions[a] == 1 for a, b in pairwise(stretch))
    for left, right in pairwise(stretches):
        assert positions[right[0]] > positions[left[-1]] + 1
