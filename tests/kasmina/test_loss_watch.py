"""Sick losses are told from noisy ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esperml.kasmina.loss_watch import FLAT, SIGNIFICANT, LossWatch, Verdict

STEPS = 1500
STEP = np.arange(STEPS)

CURVES: dict[str, np.ndarray] = {
    "falling": 0.2 + 2 * np.exp(-STEP / 300),
    "power law": 2.5 * (1 + STEP / 50) ** -0.4,
    "converged": np.full(STEPS, 1.0),
    "epochs": 0.2 + 2 * np.exp(-(STEP // 200) * 200 / 500) + 0.02 * (STEP % 200) / 200,
    "negative": -3 + 2 * np.exp(-STEP / 300),
}

NOISES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "none": lambda rng: np.zeros(STEPS),
    "normal": lambda rng: rng.normal(0, 0.15, STEPS),
    "strong": lambda rng: rng.normal(0, 0.6, STEPS),
    "heavy tails": lambda rng: 0.1 * rng.standard_t(2.5, STEPS),
    "skewed": lambda rng: 0.1 * np.exp(rng.normal(0, 1, STEPS)),
    "outliers": lambda rng: rng.normal(0, 0.1, STEPS) + 1e4 * (rng.random(STEPS) < 0.01),
    "correlated": lambda rng: np.convolve(rng.normal(0, 0.1, STEPS + 4), np.ones(5) / 2.2, "valid"),
}


def verdicts(losses, watch: LossWatch | None = None) -> list[tuple[int, Verdict]]:
    """Every verdict on a curve, asked for after each tenth loss."""
    watch = LossWatch() if watch is None else watch
    found = []
    for step, loss in enumerate(losses, 1):
        watch.take(step, float(loss))
        if step % 10 == 0 and (verdict := watch.verdict()) is not None:
            found.append((step, verdict))
    return found


def test_hardly_any_healthy_run_is_taken_for_a_sick_one():
    """35 kinds of curves and noise, 6 of each, 1,500 losses: at most 1 in 210 runs has any verdict."""
    rng = np.random.default_rng(0)
    sick = [
        (curve, noise, found[0])
        for curve, level in CURVES.items()
        for noise, draw in NOISES.items()
        for _ in range(6)
        if (found := verdicts(level + draw(rng)))
    ]
    assert len(sick) <= 1, sick


@pytest.mark.parametrize("noise", [name for name in NOISES if name != "outliers"])
@pytest.mark.parametrize("curve", list(CURVES))
def test_a_loss_that_runs_away_is_found_within_fifty_steps(curve, noise):
    losses = CURVES[curve] + NOISES[noise](np.random.default_rng(1))
    losses[1000:] += np.minimum(np.expm1((STEP[1000:] - 1000) / 8), 1e6)
    watch = LossWatch()
    step, verdict = verdicts(losses, watch)[0]
    assert (verdict.ailment, 1000 < step <= 1050) == ("diverged", True)
    assert step - 60 <= verdict.since <= step
    assert watch.alarmed
    assert watch.in_doubt


@pytest.mark.parametrize("curve", list(CURVES))
def test_a_climb_that_is_too_slow_to_stand_out_is_found_in_the_end(curve):
    losses = CURVES[curve] + np.random.default_rng(1).normal(0, 0.05, STEPS)
    losses[500:] += (STEP[500:] - 500) * 0.004
    assert verdicts(losses)[-1][1].ailment == "diverged"


def test_a_loss_that_stays_above_what_it_was_has_stalled():
    losses = CURVES["falling"] + np.random.default_rng(1).normal(0, 0.05, STEPS)
    losses[900:] = losses[899 - 300 : 899].mean() + 0.2 + np.random.default_rng(2).normal(0, 0.05, STEPS - 900)
    found = verdicts(losses)
    assert found[0][1].ailment == "stalled"
    assert 1190 <= found[0][0] <= 1260
    assert verdicts(losses, LossWatch(stall_steps=None)) == []


def test_a_loss_that_stands_still_above_what_it_was_has_stalled():
    losses = CURVES["falling"] + np.random.default_rng(1).normal(0, 0.05, STEPS)
    losses[900:] = losses[800:900].max()
    step, verdict = verdicts(losses)[0]
    assert (verdict.ailment, "stands still" in verdict.words) == ("stalled", True)
    assert step <= 900 + FLAT + 10


def test_a_step_up_that_heals_is_no_stall():
    losses = CURVES["falling"] + np.random.default_rng(1).normal(0, 0.05, STEPS)
    losses[900:] += 0.5 * np.exp(-(STEP[900:] - 900) / 200)
    assert verdicts(losses) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_two_losses_in_a_row_that_are_not_finite_are_told_and_one_is_not(value):
    watch = LossWatch()
    for step, loss in enumerate([1.0, value, 1.0, 1.0], 1):
        watch.take(step, loss)
        assert watch.verdict() is None
        assert watch.in_doubt == (step == 2)
    watch.take(5, value)
    watch.take(6, value)
    verdict = watch.verdict()
    assert (verdict.ailment, verdict.since) == ("not finite", 5)


@given(
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=400),
    cut=st.integers(0, 400),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_any_losses_are_taken_and_a_watch_goes_on_from_its_state(losses, cut, scale):
    whole, first = LossWatch(), LossWatch()
    losses = [loss * scale for loss in losses]
    for step, loss in enumerate(losses[:cut], 1):
        first.take(step, loss)
    second = LossWatch()
    second.load_state_dict(first.state_dict())
    for step, loss in enumerate(losses, 1):
        whole.take(step, loss)
        if step > cut:
            second.take(step, loss)
    assert str(second.state_dict()) == str(whole.state_dict()) or cut > len(losses) or not math.isfinite(sum(losses))
    verdict = whole.verdict()
    assert verdict is None or verdict.words
    assert 0 <= whole.state_dict()["score"] <= SIGNIFICANT * 400


def test_tiny_trainings_of_many_kinds_are_healthy():
    """Real losses: optimizers, batch sizes and rates, dropout and noisy labels; 12 runs of 500 steps."""
    sick = []
    for number in range(12):
        torch.manual_seed(number)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2 * (number % 2)), nn.Linear(16, 3))
        rate = (3e-3, 1e-2, 3e-2)[number % 3]
        make = (torch.optim.SGD, torch.optim.AdamW)[number // 3 % 2]
        optimizer = make(model.parameters(), rate * (10 if make is torch.optim.SGD else 1))
        teacher, batch, losses = torch.randn(8, 3), (4, 32)[number // 6], []
        for _ in range(500):
            x = torch.randn(batch, 8)
            labels = (x @ teacher).argmax(1)
            labels = torch.where(torch.rand(batch) < 0.1, torch.randint(0, 3, (batch,)), labels)
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        sick += [(number, found) for found in verdicts(losses)[:1]]
    assert sick == []
