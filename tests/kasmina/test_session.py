"""The session: what a training loop sees of Esper, and what Esper sees of it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from esperml import kasmina
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, run_pb2

APPLIED, REFUSED, EXPIRED = (
    decision_pb2.COMMAND_STATUS_APPLIED,
    decision_pb2.COMMAND_STATUS_REFUSED,
    decision_pb2.COMMAND_STATUS_EXPIRED,
)


def connect(here, bench, **kwargs):
    kwargs = {"run": "r", "mode": "act", "report_every": 5, "overhead_ceiling": None, **kwargs}
    return kasmina.connect(bench.link, here.model, here.optimizer, **kwargs)


def train(here, session, steps, **told):
    return [here.step(session, **told) for _ in range(steps)]


def test_a_run_tells_its_story_in_order(case, bench):
    here = case("mlp")
    limits = graph_pb2.RunLimits(parameter_budget=100)
    with connect(here, bench, limits=limits, policy="gcn", paired_run="twin", labels={"a": "b"}) as session:
        for epoch in range(2):
            train(here, session, 10, epoch=epoch)
    names = [event.WhichOneof("payload") for _, event in bench.events]
    assert names[0] == "run_started"
    assert names[-1] == "run_ended"
    assert names.count("health_report") == 4
    assert [e.epoch for e in bench.payloads("epoch_completed")] == [0]
    started = bench.payloads("run_started")[0]
    assert (started.policy, started.paired_run, dict(started.labels)) == ("gcn", "twin", {"a": "b"})
    assert started.mode == decision_pb2.MODE_ACT
    assert started.limits == limits
    assert started.parameters == sum(p.numel() for p in here.model.parameters())
    assert [layer.name for layer in started.graph.layers] == ["0", "2", "4", "6"]
    ended = bench.payloads("run_ended")[0]
    assert (ended.end, ended.step, ended.error) == (run_pb2.RUN_END_COMPLETED, 20, "")
    assert all(event.run_id == "r" for _, event in bench.events)


def test_reports_carry_the_measures_of_the_run(case, bench):
    here = case("mlp")
    with connect(here, bench, evaluate=here.evaluate) as session:
        losses = train(here, session, 5, epoch=3)
        held_out = here.evaluate(here.model)
    report = bench.reports[0]
    assert (report.step, report.epoch, report.structure_version) == (5, 3, 1)
    assert report.run.train_loss == pytest.approx(losses[-1])
    assert report.run.held_out_loss == pytest.approx(held_out)
    assert report.run.learning_rate == pytest.approx(1e-2)
    assert report.run.step_seconds > 0
    assert 0 <= report.run.overhead <= 1
    assert report.run.parameters == sum(p.numel() for p in here.model.parameters())
    assert len(report.layers) == 4


def test_what_the_user_does_not_tell_is_absent(case, bench):
    here = case("mlp")
    session = connect(here, bench)
    for _ in range(5):
        here.loss().backward()
        session.step()
    report = bench.reports[0]
    assert not report.HasField("epoch")
    assert not report.run.HasField("train_loss")
    assert not report.run.HasField("held_out_loss")


def test_evaluation_may_be_rarer_than_reports(case, bench):
    here = case("mlp")
    with connect(here, bench, evaluate=here.evaluate, evaluate_every=10) as session:
        train(here, session, 20)
    assert [report.run.HasField("held_out_loss") for report in bench.reports] == [False, True, False, True]


def test_an_observed_run_is_bit_identical_to_a_plain_one(case, any_host, bench):
    plain, observed = case(any_host, wrapped=False), case(any_host)

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3), random.random()
        return observed.evaluate(model)

    with connect(observed, bench, evaluate=evaluate, report_every=2) as session:
        torch.manual_seed(7)
        expected = train(plain, None, 9)
        torch.manual_seed(7)
        assert train(observed, session, 9) == expected
    for a, b in zip(observed.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(module.training for module in observed.model.modules())


def test_a_held_out_loss_that_is_no_number_is_absent(case, bench):
    here = case("mlp")
    with connect(here, bench, evaluate=lambda model: math.nan) as session:
        train(here, session, 5)
    assert not bench.reports[0].run.HasField("held_out_loss")
    assert session.failure == ""


def test_a_loop_that_raises_ends_the_run_as_failed_and_is_not_hushed_up(case, bench):
    here = case("mlp")

    def loop():
        with connect(here, bench) as session:
            train(here, session, 2)
            raise ZeroDivisionError("division by zero")

    with pytest.raises(ZeroDivisionError):
        loop()
    ended = bench.payloads("run_ended")[0]
    assert (ended.end, ended.error) == (run_pb2.RUN_END_FAILED, "ZeroDivisionError: division by zero")


def test_a_closed_session_is_silent(case, bench):
    here = case("mlp")
    session = connect(here, bench)
    session.close()
    session.close()
    train(here, session, 10)
    assert len(bench.payloads("run_ended")) == 1
    assert not bench.reports
    assert not any(m._forward_hooks for m in here.model.modules())


class BrokenLink:
    """A link whose other side raises on one sort of payload."""

    def __init__(self, payload: str) -> None:
        self.payload = payload

    def publish(self, kind, event):
        if event.WhichOneof("payload") == self.payload:
            raise OSError("the disk is full")

    def received(self):
        return []

    def statistics(self):
        return kasmina.LinkStatistics()

    def close(self, timeout_s):
        pass


@pytest.mark.parametrize(("payload", "step"), [("run_started", 0), ("health_report", 5), ("run_ended", 20)])
def test_a_failure_of_our_own_ends_the_session_and_never_the_training(case, payload, step, capsys):
    here, plain = case("mlp"), case("mlp", wrapped=False)
    with kasmina.connect(BrokenLink(payload), here.model, here.optimizer, run="r", report_every=5) as session:
        losses = train(here, session, 20)
    assert losses == train(plain, None, 20)
    assert session.failure == f"step {step}: OSError: the disk is full"
    assert "training went on without it" in str(session.summary())
    assert capsys.readouterr().out.count("session_failed") == 1
    assert not any(m._forward_hooks for m in here.model.modules())


def test_an_evaluator_that_raises_ends_the_session_only(case, bench):
    here = case("mlp")

    def evaluate(model):
        raise LookupError("no data")

    with connect(here, bench, evaluate=evaluate) as session:
        train(here, session, 10)
    assert session.failure == "step 5: LookupError: no data"
    assert here.model.training


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"run": ""}, "run must have 1 to 128 characters, not 0"),
        ({"run": "x" * 129}, "not 129"),
        ({"mode": "obey"}, "mode must be one of observe, advise, act"),
        ({"report_every": 0}, "report_every must be at least 1"),
        ({"evaluate_every": 7}, "evaluate_every must be a multiple of report_every"),
        ({"evaluate_every": 0}, "evaluate_every must be a multiple of report_every"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(case, bench, settings, error):
    with pytest.raises(ValueError, match=error):
        connect(case("mlp"), bench, **settings)


def test_a_plain_model_is_refused(bench):
    model = nn.Linear(2, 2)
    with pytest.raises(kasmina.KasminaError, match="not wrapped"):
        kasmina.connect(bench.link, model, torch.optim.SGD(model.parameters()), run="r")


def test_a_sink_sees_both_sides_in_order(case, germination):
    here, seen = case("mlp"), []

    def handle(kind, event):
        if kind != event_pb2.KIND_TELEMETRY:
            return []
        return [(event_pb2.KIND_COMMANDS, event_pb2.Event(run_id="r", command=germination("0", "2")))]

    link = kasmina.LocalLink(handle, lambda kind, event: seen.append(event.WhichOneof("payload")))
    with kasmina.connect(link, here.model, here.optimizer, run="r", mode="act", report_every=5) as session:
        train(here, session, 5)
    assert seen == ["run_started", "health_report", "command", "applied", "structure_changed", "run_ended"]
    assert isinstance(link, kasmina.Link)


def test_commands_of_other_runs_are_not_ours(case, germination):
    here = case("mlp")
    link = kasmina.LocalLink(
        lambda kind, event: [(event_pb2.KIND_COMMANDS, event_pb2.Event(run_id="other", command=germination("0", "2")))]
    )
    with kasmina.connect(link, here.model, here.optimizer, run="r", mode="act", report_every=5) as session:
        train(here, session, 5)
    assert session.decisions_applied == 0


def test_the_summary_tells_what_was_seen(case, bench):
    here = case("mlp")
    with connect(here, bench, evaluate=here.evaluate) as session:
        assert "nothing was done." in str(session.summary())
        train(here, session, 5)
        with torch.no_grad():
            here.model[0].bias.fill_(-100)
        train(here, session, 40)
    text = str(session.summary())
    assert "run r (act): 45 steps, 9 reports" in text
    assert "0: 100% of its units never respond" in text
    assert "held-out loss" in text
    assert "overhead" in text
