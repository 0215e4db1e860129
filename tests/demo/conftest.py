"""A demo's story, written by hand in the contract's own messages."""

from __future__ import annotations

import math

import pytest
import torch

from esperml.client.events import new_event
from esperml.demo.story import ROLES, DemoStory, HostStory, Role, RunStory
from esperml.trainer.arena.hosts import HostSpec
from esperml.trainer.arena.twins import Progress, Score, TwinResult
from esperml.v1 import decision_pb2, experience_pb2, graph_pb2, health_pb2, run_pb2

torch.set_num_threads(1)

FORWARD = graph_pb2.EDGE_KIND_FORWARD
LINEAR = graph_pb2.LAYER_TYPE_LINEAR


def host_graph(version: int = 1) -> graph_pb2.HostGraph:
    """A chain of four linear layers with a narrow third one; places of span one and two."""
    widths = (40, 64, 6, 64, 10)
    return graph_pb2.HostGraph(
        structure_version=version,
        layers=[
            graph_pb2.LayerSpec(name=name, type=LINEAR, parameters=a * b + b, input_shape=[a], output_shape=[b])
            for name, a, b in zip(("hidden1", "hidden2", "hidden3", "output"), widths[:-1], widths[1:], strict=True)
        ],
        edges=graph_pb2.EdgeTable(sources=[0, 1, 2], targets=[1, 2, 3], kinds=[FORWARD] * 3),
        blueprints=["low_rank", "conv"],
        places=graph_pb2.PlaceTable(sources=[0, 1, 0, 1], targets=[0, 1, 1, 2], blueprints=[3] * 4),
    )


def state(step: int, healths: list[float], seeds: list[health_pb2.SeedSignal]) -> graph_pb2.ModelGraphState:
    columns = graph_pb2.LayerColumns(health=graph_pb2.Column(values=healths, absent=[3]))
    return graph_pb2.ModelGraphState(run_id="run", step=step, graph=host_graph(), layers=columns, seeds=seeds)


def seed_signal(stage: health_pb2.SeedStage.ValueType, alpha: float, steps: int) -> health_pb2.SeedSignal:
    return health_pb2.SeedSignal(
        seed_id="seed-1", place=2, stage=stage, blueprint="conv", alpha=alpha, steps_in_stage=steps, parameters=792
    )


def germinate(decision_id: str, step: int) -> decision_pb2.AdaptationDecision:
    return decision_pb2.AdaptationDecision(
        decision_id=decision_id,
        run_id="run",
        step=step,
        policy="shipped",
        policy_version="0123456789abcdef",
        target=decision_pb2.Target(source_layer="hidden1", target_layer="hidden2"),
        action=decision_pb2.Action(germinate=decision_pb2.Germinate(blueprint="conv", parameter_budget=800)),
        confidence=0.81,
        reason="hidden2 <expresses> little of what the loss asks of it",
        disposition=decision_pb2.DISPOSITION_SENT,
    )


def settle(decision_id: str, step: int) -> decision_pb2.AdaptationDecision:
    return decision_pb2.AdaptationDecision(
        decision_id=decision_id,
        step=step,
        policy="lifecycle",
        target=decision_pb2.Target(source_layer="hidden1", target_layer="hidden2", seed_id="seed-1"),
        action=decision_pb2.Action(fossilise=decision_pb2.Fossilise()),
        reason="without it the held-out loss would be higher",
        disposition=decision_pb2.DISPOSITION_SENT,
    )


def applied(decision_id: str, step: int, status: decision_pb2.CommandStatus.ValueType) -> decision_pb2.Applied:
    return decision_pb2.Applied(
        decision_id=decision_id,
        step=step,
        status=status,
        seed_id="seed-1" if status == decision_pb2.COMMAND_STATUS_APPLIED else "",
        reason="" if status == decision_pb2.COMMAND_STATUS_APPLIED else "the place is taken",
        parameters_added=792,
        structure_version=2,
    )


def adapted_run() -> RunStory:
    """A run in which a seed is planted, refused once, measured and kept."""
    done, refused = decision_pb2.COMMAND_STATUS_APPLIED, decision_pb2.COMMAND_STATUS_REFUSED
    nothing = decision_pb2.AdaptationDecision(
        decision_id="d0", step=100, policy="shipped", action=decision_pb2.Action(none=decision_pb2.NoAction()),
        disposition=decision_pb2.DISPOSITION_NONE,
    )  # fmt: skip
    holding = seed_signal(health_pb2.SEED_STAGE_HOLDING, 1, 25)
    blending = seed_signal(health_pb2.SEED_STAGE_BLENDING, 0.8, 19)
    effect = decision_pb2.Effect(decision_id="d1", step=275, basis=decision_pb2.BASIS_ABLATION, loss_reduction=0.2)
    fossil = seed_signal(health_pb2.SEED_STAGE_FOSSILISED, 1, 500)
    payloads = [
        {"run_started": run_pb2.RunStarted(graph=host_graph())},
        {"decision": nothing},
        {"health_report": health_pb2.HealthReport(step=25, run=health_pb2.RunMeasures(overhead=0.02))},
        {"decision": germinate("d1", 175)},
        {"applied": applied("d1", 180, done)},
        {"structure_changed": run_pb2.StructureChanged(step=180, decision_id="d1", graph=host_graph(2))},
        {
            "health_report": health_pb2.HealthReport(
                step=200, run=health_pb2.RunMeasures(overhead=0.04), seeds=[blending]
            )
        },
        {"health_report": health_pb2.HealthReport(step=250, seeds=[holding])},
        {"decision": germinate("d2", 250)},
        {"applied": applied("d2", 252, refused)},
        {"effect": effect},
        {"decision": settle("d3", 275)},
        {"applied": applied("d3", 280, done)},
        {
            "experience": experience_pb2.TrainingExperience(
                decision=germinate("d1", 175),
                state=state(175, [0.9, 0.1, 0.6, 0.0], []),
                next_state=state(800, [0.9, 0.8, 0.7, 0.0], [fossil]),
                reward=experience_pb2.Reward(total=0.31, basis=decision_pb2.BASIS_PAIRED_BRANCH),
                done=True,
            )
        },
        {"run_ended": run_pb2.RunEnded(step=800, end=run_pb2.RUN_END_COMPLETED)},
    ]
    story = RunStory()
    for payload in payloads:
        story.take(new_event("run", **payload))
    return story


def twin(role: Role, end: float) -> TwinResult:
    curve = tuple(
        Progress(f"run-{role}", step, 1.0, end + (2.2 - end) * math.exp(-step / 150)) for step in range(25, 801, 25)
    )
    return TwinResult(
        run=f"run-{role}",
        curve=curve,
        validation=Score(end, 0.7),
        test=Score(end + 0.01, 0.69),
        host_parameters=4112,
        parameters=4112 if role == "static" else 4904,
        seconds=2.0,
        summary="",
    )


@pytest.fixture
def host_story() -> HostStory:
    """One host: adapted best, chance in the middle."""
    ends: dict[Role, float] = {"static": 1.3, "adapted": 0.9, "random": 1.1}
    runs = {"static": RunStory(), "adapted": adapted_run(), "random": adapted_run()}
    return HostStory(
        "mnist1d", HostSpec("mnist1d", (64, 6, 64)), twins={role: twin(role, ends[role]) for role in ROLES}, runs=runs
    )


@pytest.fixture
def story(host_story: HostStory) -> DemoStory:
    """One repeat with one host."""
    return DemoStory(repeats=[[host_story]], seeds=[0], seconds=12.0)
