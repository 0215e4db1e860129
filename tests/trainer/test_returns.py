"""Returns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.trainer.returns import Floats, segments, v_trace

UNIT = st.floats(-1, 1, allow_nan=False)
Episode = tuple[Floats, Floats, Floats]


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    size = draw(st.integers(1, 8))
    rewards, values, ratios = (
        draw(st.lists(numbers, min_size=length, max_size=length))
        for numbers, length in ((UNIT, size), (UNIT, size + 1), (st.floats(0, 3), size))
    )
    return np.asarray(rewards), np.asarray(values), np.asarray(ratios)


@given(episode=episodes(), gamma=st.floats(0, 1), lambda_=st.floats(0, 1))
def test_targets_are_the_weighted_sum_of_errors_ahead(episode: Episode, gamma: float, lambda_: float) -> None:
    rewards, values, ratios = episode
    weights = np.minimum(ratios, 1)
    errors = weights * (rewards + gamma * values[1:] - values[:-1])
    expected = [
        values[now]
        + sum(
            (gamma * lambda_) ** (ahead - now) * np.prod(weights[now:ahead]) * errors[ahead]
            for ahead in range(now, len(rewards))
        )
        for now in range(len(rewards))
    ]
    result = v_trace(rewards, values, ratios, gamma=gamma, lambda_=lambda_)
    np.testing.assert_allclose(result.targets, expected, atol=1e-9)
    ahead = np.append(result.targets[1:], values[-1])
    np.testing.assert_allclose(result.returns, rewards + gamma * ahead, atol=1e-9)


@given(episode=episodes())
def test_uncorrected_with_lambda_one_returns_are_what_was_observed(episode: Episode) -> None:
    rewards, values, _ = episode
    result = v_trace(rewards, values, np.ones(len(rewards)), gamma=1.0, lambda_=1.0)
    observed = np.cumsum(rewards[::-1])[::-1] + values[-1]
    np.testing.assert_allclose(result.returns, observed, atol=1e-9)
    np.testing.assert_allclose(result.targets, observed, atol=1e-9)


def test_a_decision_is_not_credited_with_what_the_policy_would_not_have_done_later() -> None:
    rewards, values = np.asarray([0.1, 0.9]), np.asarray([0.0, 0.2, 0.0])
    never, always = (
        v_trace(rewards, values, np.asarray([1.0, ratio]), gamma=1.0, lambda_=1.0).returns for ratio in (0.0, 1.0)
    )
    assert never[0] == pytest.approx(0.1 + 0.2)
    assert always[0] == pytest.approx(0.1 + 0.9)
    assert never[1] == always[1] == pytest.approx(0.9)


@pytest.mark.parametrize(("values", "ratios"), [(2, 2), (3, 1), (3, 3)])
def test_lengths_that_do_not_fit_are_refused(values: int, ratios: int) -> None:
    with pytest.raises(ValueError, match="2 rewards need as many ratios and one value more"):
        v_trace(np.zeros(2), np.zeros(values), np.zeros(ratios), gamma=1.0, lambda_=1.0)


@given(st.sets(st.integers(0, 30)))
def test_stretches_break_exactly_where_experience_is_missing(found: set[int]) -> None:
    positions = sorted(found)
    stretches = segments(positions)
    assert [offset for stretch in stretches for offset in stretch] == list(range(len(positions)))
    for stretch in stretches:
        assert all(positions[b] - positions[a] == 1 for a, b in pairwise(stretch))
    for left, right in pairwise(stretches):
        assert positions[right[0]] > positions[left[-1]] + 1
