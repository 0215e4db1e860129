"""Metrics, against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.trainer.metrics import Judged, adaptation_accuracy, judge, policy_return, ranking, value_error


def _judged(
    adapted: list[bool],
    returns: list[float],
    hosts: list[str],
    *,
    adapt: list[float] | None = None,
    ratio: list[float] | None = None,
    graft: list[float] | None = None,
) -> Judged:
    zeros = [0.0] * len(returns)
    return Judged(
        adapted=np.asarray(adapted, dtype=bool),
        returns=np.asarray(returns, dtype=float),
        values=np.asarray(zeros),
        adapt_probability=np.asarray(adapt or zeros),
        log_ratio=np.asarray(ratio or zeros),
        graft_log_ratio=np.asarray(ratio or zeros),
        graft_log_probability=np.asarray(graft or zeros),
        hosts=hosts,
        clusters=hosts,
    )


def test_adapting_was_right_where_it_returned_more_than_doing_nothing() -> None:
    judged = _judged(
        [True, False, True, False, True, False],
        [0.3, 0.1, 0.1, 0.3, -0.2, 0.0],
        ["a", "a", "b", "b", "c", "c"],
        adapt=[0.9, 0.9, 0.8, 0.8, 0.1, 0.1],
    )
    result = adaptation_accuracy(judged)
    assert result["adaptation_accuracy"] == pytest.approx(2 / 3)
    assert result["adaptation_base_rate"] == pytest.approx(1 / 3)
    assert result["adaptation_balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


def test_adapting_is_judged_by_what_the_policy_would_have_grown() -> None:
    bad_graft_likely = _judged([True, True], [0.5, -0.1], ["a", "a"], adapt=[0.2, 0.2], ratio=[-5.0, 1.0])
    assert adaptation_accuracy(bad_graft_likely) == {"adaptation_accuracy": 1.0, "adaptation_base_rate": 0.0}


def test_without_a_decision_to_do_nothing_the_twin_is_the_measure() -> None:
    assert adaptation_accuracy(_judged([True], [-0.01], ["a"], adapt=[0.4]))["adaptation_accuracy"] == 1.0
    assert adaptation_accuracy(_judged([True], [0.01], ["a"], adapt=[0.4]))["adaptation_accuracy"] == 0.0


def test_the_value_head_is_judged_by_error_and_explained_variance() -> None:
    returns = np.asarray([0.0, 1.0, 2.0])
    assert value_error(returns + 0.5, returns) == pytest.approx({"value_mae": 0.5, "value_explained_variance": 1.0})
    assert value_error(np.ones(3), returns)["value_explained_variance"] == 0.0
    assert value_error(np.zeros(2), np.ones(2)) == {"value_mae": 1.0}


def test_grafts_are_ranked_on_one_host_at_a_time() -> None:
    judged = _judged([True] * 6, [0.1, 0.2, 0.3, 9.3, 9.2, 9.1], ["a"] * 3 + ["b"] * 3, graft=[-3, -2, -1, -3, -2, -1])
    result = ranking(judged)
    assert result["graft_rank_correlation"] == pytest.approx(0.0)
    assert result["graft_score"] == pytest.approx(0.0)
    perfect = _judged([True] * 3, [0.1, 0.2, 0.9], ["a"] * 3, graft=[-3, -2, -1])
    assert ranking(perfect) == pytest.approx({"graft_rank_correlation": 1.0, "graft_score": 1.0})


def test_ties_share_their_rank() -> None:
    tied = _judged([True] * 4, [0.1, 0.2, 0.2, 0.3], ["a"] * 4, graft=[-4, -2, -2, -1])
    assert ranking(tied)["graft_rank_correlation"] == pytest.approx(1.0)
    indifferent = _judged([True] * 3, [0.1, 0.2, 0.3], ["a"] * 3)
    assert ranking(indifferent) == pytest.approx({"graft_score": 0.0})


def test_the_policys_return_is_the_weighted_mean_of_what_was_done() -> None:
    judged = _judged(
        [True, False] * 2, [1.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b"], ratio=[np.log(3), 0.0, np.log(3), 0.0]
    )
    result = policy_return(judged, seed=0)
    assert result["behaviour_return"] == pytest.approx(0.5)
    assert result["policy_return"] == pytest.approx(0.75)
    assert result["policy_gain"] == result["policy_gain_low"] == result["policy_gain_high"] == pytest.approx(0.25)
    assert result["effective_samples"] == pytest.approx(64 / 20)


def test_a_metric_that_cannot_be_measured_is_absent() -> None:
    assert judge(_judged([], [], [])) == {"decisions": 0.0}
    single = judge(_judged([False], [0.1], ["a"]))
    assert set(single) == {
        "decisions",
        "value_mae",
        "behaviour_return",
        "policy_return",
        "policy_gain",
        "effective_samples",
    }


@given(
    returns=st.lists(st.floats(-1, 1), min_size=2, max_size=20),
    seed=st.integers(0, 1000),
)
def test_whatever_is_measured_is_finite_and_in_range(returns: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    size = len(returns)
    judged = _judged(
        (random.random(size) < 0.5).tolist(),
        returns,
        [f"host {number}" for number in random.integers(0, 4, size)],
        adapt=random.random(size).tolist(),
        ratio=random.normal(0, 200, size).tolist(),
        graft=random.normal(-3, 1, size).tolist(),
    )
    result = judge(judged, seed=seed)
    assert all(np.isfinite(value) for value in result.values())
    assert min(returns) - 1e-9 <= result["policy_return"] <= max(returns) + 1e-9
    assert result["policy_gain_low"] <= result["policy_gain_high"] if "policy_gain_low" in result else True
    for name in ("adaptation_accuracy", "adaptation_base_rate", "adaptation_balanced_accuracy"):
        assert 0 <= result.get(name, 0.5) <= 1
    assert -1 - 1e-9 <= result.get("graft_rank_correlation", 0) <= 1 + 1e-9
    assert result.get("graft_score", 0) <= 1 + 1e-9
