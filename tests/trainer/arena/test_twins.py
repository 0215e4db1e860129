from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from esperml.kasmina import LocalLink
from esperml.settings import TamiyoSettings
from esperml.tamiyo.controller import Controller
from esperml.tamiyo.store import PolicyStore
from esperml.trainer.arena.hosts import HostSpec, build, sample_hosts
from esperml.trainer.arena.tasks import load_task
from esperml.trainer.arena.twins import Plan, Progress, TwinResult, batches, score, train_twin
from esperml.v1 import event_pb2

SPEC = HostSpec("digits", (16, 3), batch_size=32, learning_rate=3e-3)
Events = list[event_pb2.Event]


def controller(policy: str = "explore") -> Controller:
    # In runs as short as these a seed has no time to be leant on; it shall stay all the same.
    settings = TamiyoSettings(policy=policy, confidence_threshold=0.0, cull_below=-1.0, random_seed=1)
    return Controller(PolicyStore.from_settings(settings), settings)


def run_pair(plan: Plan, spec: HostSpec = SPEC, policy: str = "chance") -> tuple[TwinResult, TwinResult, Events]:
    deciding, events = controller(), []

    def link() -> LocalLink:
        return LocalLink(deciding.handle, sink=lambda _, event: events.append(event))

    static = train_twin(spec, plan, link(), run="static", mode="observe", policy="nothing")
    grown = train_twin(spec, plan, link(), run="grown", policy=policy, paired_run="static")
    return static, grown, events


def of(events: Events, run: str, payload: str) -> list[object]:
    return [getattr(event, payload) for event in events if event.run_id == run and event.HasField(payload)]


def test_twins_share_every_loss_until_something_is_planted(short_plan: Plan) -> None:
    static, grown, events = run_pair(short_plan)
    planted = min(applied.step for applied in of(events, "grown", "applied") if applied.parameters_added > 0)
    for ours, theirs in zip(grown.curve, static.curve, strict=True):
        if ours.step <= planted:
            assert (ours.train_loss, ours.validation_loss) == (theirs.train_loss, theirs.validation_loss)
    assert grown.curve[-1].validation_loss != static.curve[-1].validation_loss
    assert grown.parameters > grown.host_parameters == static.parameters


def test_a_twin_under_a_policy_that_does_nothing_is_the_static_twin(short_plan: Plan) -> None:
    static, other, _ = run_pair(short_plan, policy="nothing")
    assert (static.validation, static.test) == (other.validation, other.test)
    assert [moment.validation_loss for moment in static.curve] == [moment.validation_loss for moment in other.curve]


def test_a_run_under_a_session_trains_as_one_without(short_plan: Plan) -> None:
    static, _, _ = run_pair(short_plan, policy="nothing")
    task, host = load_task("digits"), build(SPEC)
    optimizer = torch.optim.AdamW(host.parameters(), lr=SPEC.learning_rate)
    for _, _, inputs, targets in batches(task, SPEC, short_plan.steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(host(inputs), targets).backward()
        optimizer.step()
    assert score(host, task.test) == static.test


def test_rewards_are_measured_against_the_twin_and_sum_to_the_final_advantage(short_plan: Plan) -> None:
    static, grown, events = run_pair(short_plan)
    experiences = of(events, "grown", "experience")
    gains = [term.value for experience in experiences for term in experience.reward.terms if term.name == "gain"]
    assert experiences[-1].done
    advantage = torch.log(torch.tensor(static.curve[-1].validation_loss / grown.curve[-1].validation_loss))
    assert sum(gains) == pytest.approx(float(advantage), abs=1e-4)


def test_reports_and_progress_come_at_the_same_steps_with_the_same_loss(short_plan: Plan) -> None:
    seen: list[Progress] = []
    deciding, events = controller("nothing"), []
    link = LocalLink(deciding.handle, sink=lambda _, event: events.append(event))
    result = train_twin(SPEC, short_plan, link, run="static", mode="observe", on_progress=seen.append)
    reports = of(events, "static", "health_report")
    assert tuple(seen) == result.curve
    assert [report.step for report in reports] == [moment.step for moment in seen] == list(range(10, 121, 10))
    for report, moment in zip(reports, seen, strict=True):
        assert report.run.held_out_loss == pytest.approx(moment.validation_loss)


def test_the_run_says_what_host_it_was_and_what_it_allows(short_plan: Plan) -> None:
    _, _, events = run_pair(short_plan)
    [started] = of(events, "grown", "run_started")
    assert started.labels["task"] == "digits"
    assert started.labels["widths"] == "(16, 3)"
    assert started.paired_run == "static"
    assert started.limits == short_plan.limits()


def test_training_finishes_when_the_controller_fails(short_plan: Plan) -> None:
    def fail(kind: object, event: event_pb2.Event) -> list[object]:
        if event.HasField("health_report") and event.health_report.step == 60:
            raise RuntimeError("gone")
        return []

    result = train_twin(SPEC, short_plan, LocalLink(fail), run="static", mode="observe")
    assert result.failure == "step 60: RuntimeError: gone"
    assert len(result.curve) == 12


def test_the_global_generator_is_left_as_it_was(short_plan: Plan) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run_pair(replace(short_plan, steps=30))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("shape", ["residual", "branch", "convolution"])
def test_every_shape_of_host_grows(shape: str, short_plan: Plan) -> None:
    spec = HostSpec("digits", (8, 4, 6), shape=shape, batch_size=32)
    _, grown, events = run_pair(short_plan, spec)
    assert grown.failure == ""
    assert grown.parameters > grown.host_parameters
    assert [applied.reason for applied in of(events, "grown", "applied")] == [""] * len(of(events, "grown", "applied"))


@pytest.mark.slow
@pytest.mark.parametrize("spec", sample_hosts(12, 2), ids=lambda spec: spec.name)
def test_sampled_hosts_train_under_a_session(spec: HostSpec, short_plan: Plan) -> None:
    static, grown, _ = run_pair(replace(short_plan, steps=60), spec)
    assert static.failure == grown.failure == ""


def test_batches_are_full_follow_the_seed_and_see_each_sample_once_an_epoch() -> None:
    task = load_task("digits")
    full = len(task.train) // 32
    drawn = list(batches(task, SPEC, 2 * full + 1))
    assert {len(inputs) for _, _, inputs, _ in drawn} == {32}
    assert [step for step, _, _, _ in drawn] == list(range(1, 2 * full + 2))
    assert [epoch for _, epoch, _, _ in drawn] == [0] * full + [1] * full + [2]
    first = torch.cat([inputs for _, epoch, inputs, _ in drawn if epoch == 0])
    assert len(torch.unique(first, dim=0)) == len(first)
    again = list(batches(task, SPEC, 3))
    other = list(batches(task, replace(SPEC, seed=1), 3))
    assert torch.equal(again[2][2], drawn[2][2])
    assert not torch.equal(again[2][2], other[2][2])


def test_a_batch_larger_than_the_data_is_refused_by_field() -> None:
    with pytest.raises(ValueError, match=r"^batch_size: 5000 exceeds the 1078 training samples of digits"):
        next(batches(load_task("digits"), replace(SPEC, batch_size=5000), 1))


def test_scores_are_means_over_the_split_and_leave_the_mode_alone() -> None:
    task, host = load_task("mnist1d"), build(HostSpec("mnist1d", (8,)))
    host.train()
    result = score(host, task.train)
    assert host.training
    with torch.no_grad():
        outputs = host(task.train.inputs)
    assert result.loss == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, task.train.targets)), rel=1e-5)
    assert result.accuracy == pytest.approx(float((outputs.argmax(1) == task.train.targets).float().mean()))


def test_a_stretched_plan_keeps_its_proportions() -> None:
    plan = Plan()
    slow = plan.stretched(2)
    assert (slow.steps, slow.report_every, slow.hold_steps) == (1800, 100, 100)
    assert slow.parameter_budget == plan.parameter_budget
    with pytest.raises(ValueError, match=r"^factor: 0.001"):
        plan.stretched(0.001)
    decisions = range(plan.warmup_steps, plan.steps, plan.decision_interval_steps)
    assert 6 <= len(decisions) <= 10
    assert all(step % plan.report_every == 0 for step in decisions)
    assert all(b - a == plan.decision_interval_steps for a, b in pairwise(decisions))
