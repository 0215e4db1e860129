"""What Esper costs keeps to a share of the time, by measuring less."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esperml import kasmina
from esperml.kasmina import budget as budgets
from esperml.kasmina.budget import ALLOWANCE_S, MOST_SKIPPED, Budget
from esperml.kasmina.telemetry import TURNS, Telemetry


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.total_own = 0.0

    def elapsed(self) -> float:
        return self.now


class Training:
    """A training whose costs are known: what is granted is spent."""

    def __init__(self, ceiling, layers, *, interval_s, layer_s, report_s) -> None:
        self.clock = Clock()
        self.budget = Budget(ceiling, self.clock, layers)
        self.interval_s, self.layer_s, self.report_s = interval_s, layer_s, report_s

    def report(self, due):
        granted = self.budget.grant(due)
        own = 0.0
        if granted is not None:
            self.budget.note(granted, granted * self.layer_s)
            own = granted * self.layer_s + self.report_s
        self.clock.total_own += own
        self.clock.now += self.interval_s + own
        return granted

    @property
    def share(self):
        return self.clock.total_own / self.clock.now


costs = st.floats(1e-5, 1e-2)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.001, 0.2), st.integers(1, 60), st.floats(1e-3, 5.0), costs, costs)
def test_the_ceiling_holds_once_the_start_is_paid_back(ceiling, layers, interval_s, layer_s, report_s):
    training = Training(ceiling, layers, interval_s=interval_s, layer_s=layer_s, report_s=report_s)
    dearest = report_s + layers * layer_s
    granted = []
    for number in range(1500):
        granted.append(training.report(layers if number == 0 else max(layers // TURNS, 1)))
        if granted[-MOST_SKIPPED - 1 : -1] == [None] * MOST_SKIPPED:
            return  # From here on reports come because they must.
        # A forecast can be wrong by one report, and the start is paid back with half of what is earned.
        ahead = max(ALLOWANCE_S - ceiling / 2 * training.clock.now, 0) + dearest
        assert training.clock.total_own <= ceiling * training.clock.now + ahead + 1e-9
    assert training.budget.skipped == granted.count(None)


def test_one_report_in_twenty_is_made_even_where_steps_alone_cost_more_than_the_ceiling():
    training = Training(0.01, 8, interval_s=1e-4, layer_s=1e-3, report_s=1e-2)
    granted = [training.report(2) for _ in range(500)][-200:]
    assert [n for n in granted if n is not None] == [1] * 10
    assert granted[::20] == granted[:1] * 10


def test_there_is_no_limit_without_a_ceiling():
    training = Training(None, 50, interval_s=1e-6, layer_s=1.0, report_s=1.0)
    assert [training.report(12) for _ in range(20)] == [12] * 20
    assert training.budget.skipped == 0


def test_all_that_is_due_is_measured_where_there_is_time_enough():
    training = Training(0.01, 50, interval_s=50 * 0.03, layer_s=5e-4, report_s=2e-3)
    assert [training.report(50), *(training.report(12) for _ in range(100))] == [50] + [12] * 100


def test_layers_go_first_and_then_reports():
    half = Training(0.01, 50, interval_s=0.5, layer_s=5e-4, report_s=1e-3)
    granted = [half.report(12) for _ in range(400)][-100:]
    assert None not in granted
    assert 6 <= sum(granted) / 100 <= 9
    hardly = Training(0.01, 50, interval_s=0.05, layer_s=5e-4, report_s=1e-3)
    granted = [hardly.report(12) for _ in range(2000)][-300:]
    assert 80 <= granted.count(None) <= 220
    assert {n for n in granted if n is not None} == {1}


def test_what_a_slow_training_earned_is_not_spent_by_a_fast_one():
    training = Training(0.01, 4, interval_s=100.0, layer_s=5e-4, report_s=1e-3)
    for _ in range(20):
        training.report(1)
    training.interval_s = 1e-3
    before, since = training.clock.total_own, training.clock.now
    for _ in range(1000):
        training.report(1)
    assert training.clock.total_own - before <= 0.01 * (training.clock.now - since) + 2 * ALLOWANCE_S


def test_a_report_says_how_it_was_sampled():
    training = Training(0.02, 8, interval_s=1.0, layer_s=1e-4, report_s=1e-4)
    first = training.budget.sampling(interval=None, due=8, layers=8)
    assert (first.HasField("interval"), first.layers_due, first.layers, first.reports_skipped) == (False, 8, 8, 0)
    assert first.ceiling == pytest.approx(0.02)
    assert training.budget.sampling(interval=50, due=2, layers=1).interval == 50


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_every_layer_is_seen_in_turn_however_few_a_report_measures(granted):
    model = kasmina.wrap(plain_mlp(), example())
    telemetry = Telemetry(kasmina.host_of(model))
    seen = []
    for layers in granted:
        due = telemetry.due
        telemetry.arm(layers)
        model(example()).sum().backward()
        names = [signal.layer for signal in telemetry.collect(None).layers]
        assert len(names) == min(layers, due)
        seen += [int(name) // 2 for name in names]
    # Within a report layers stand in the order of the host, which wraps around between reports.
    assert sorted(seen) == sorted(number % 5 for number in range(len(seen)))


def plain_mlp():
    return nn.Sequential(*(part for _ in range(5) for part in (nn.Linear(4, 4), nn.Tanh())))


def example():
    return torch.ones(3, 4)


def test_a_session_measures_less_where_steps_are_fast(case, bench, monkeypatch):
    monkeypatch.setattr(budgets, "ALLOWANCE_S", 0.0)
    here = case("mlp")
    with kasmina.connect(
        bench.link, here.model, here.optimizer, run="r", report_every=1, overhead_ceiling=0.05
    ) as session:
        for _ in range(400):
            here.step(session)
    summary = session.summary()
    assert 1 <= len(bench.reports) < 200
    last = bench.reports[-1]
    assert last.sampling.reports_skipped > 150
    assert last.sampling.ceiling == pytest.approx(0.05)
    assert [r.step - before.step for before, r in itertools.pairwise(bench.reports)] == [
        r.sampling.interval for r in bench.reports[1:]
    ]
    assert summary.sampling == last.sampling
    assert "reports left out" in str(summary)
    assert "ceiling 5.00%" in str(summary)


def test_without_a_ceiling_nothing_is_said_of_sampling(case, bench):
    here = case("mlp")
    with kasmina.connect(
        bench.link, here.model, here.optimizer, run="r", report_every=5, overhead_ceiling=None
    ) as session:
        for _ in range(20):
            here.step(session)
    assert [report.step for report in bench.reports] == [5, 10, 15, 20]
    assert not any(report.HasField("sampling") for report in bench.reports)
    assert session.summary().sampling is None
    assert "sampling" not in str(session.summary())


def test_an_evaluation_that_fell_on_a_report_left_out_is_made_with_the_next(case, bench, monkeypatch):
    here = case("mlp")
    monkeypatch.setattr(budgets, "ALLOWANCE_S", 0.0)
    with kasmina.connect(
        bench.link,
        here.model,
        here.optimizer,
        run="r",
        report_every=3,
        evaluate=here.evaluate,
        evaluate_every=30,
        overhead_ceiling=0.05,
    ) as session:
        for _ in range(300):
            here.step(session)
    assert bench.reports[-1].sampling.reports_skipped > 20
    evaluated = 0
    for report in bench.reports:
        assert report.run.HasField("held_out_loss") == (report.step // 30 > evaluated // 30)
        evaluated = report.step if report.run.HasField("held_out_loss") else evaluated
    assert evaluated


@pytest.mark.parametrize("ceiling", [0, -0.1, 1.5, float("nan")])
def test_a_ceiling_is_a_share(case, bench, ceiling):
    here = case("mlp")
    with pytest.raises(ValueError, match="overhead_ceiling must be above 0 and at most 1"):
        kasmina.connect(bench.link, here.model, here.optimizer, run="r", overhead_ceiling=ceiling)
