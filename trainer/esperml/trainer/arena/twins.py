"""Twins: one host trained again and again from the same weights, data order and seeds.

The twin that is only observed comes first; the others name it as their paired run and are evaluated at the same steps,
so that what a decision was worth is the difference between two curves and nothing else. The same code trains in
process (``LocalLink``) and against a server (its address).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from esperml import kasmina
from esperml.client.credentials import NO_CREDENTIALS
from esperml.trainer.arena.hosts import HostSpec, build
from esperml.trainer.arena.tasks import Split, Task, load_task
from esperml.v1 import graph_pb2

EvaluationMode = Literal["observe", "act"]
_EVALUATION_BATCH: Final = 2048
_STEPS: Final = (
    "steps",
    "report_every",
    "warmup_steps",
    "decision_interval_steps",
    "blend_steps",
    "hold_steps",
    "last_germination_step",
)
BLUEPRINTS: Final = ("low_rank", "mlp", "conv", "gate")
"""What twins can grow: what the shipped policy was trained on, so that every policy chooses among the same."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a host trains, how often it reports and what may be done to it. All intervals in optimizer steps.

    Every graft has the same budget, whatever its blueprint: otherwise the largest blueprint would win by size.
    """

    steps: int = 900
    report_every: int = 50
    warmup_steps: int = 150
    decision_interval_steps: int = 100
    blend_steps: int = 50
    hold_steps: int = 50
    last_germination_step: int = 675
    graft_parameter_budget: int = 800
    parameter_budget: int = 1600
    max_live_seeds: int = 1

    def stretched(self, factor: float) -> Plan:
        """The same plan with every number of steps multiplied by ``factor``, reports included.

        Raises:
            ValueError: nothing would be left of an interval.
        """
        stretched = {name: round(getattr(self, name) * factor) for name in _STEPS}
        if min(stretched.values()) < 1:
            raise ValueError(f"factor: {factor:g} leaves nothing of an interval")
        return replace(self, **stretched)

    def limits(self) -> graph_pb2.RunLimits:
        """What a run under this plan allows."""
        return graph_pb2.RunLimits(
            parameter_budget=self.parameter_budget,
            graft_parameter_budget=self.graft_parameter_budget,
            max_live_seeds=self.max_live_seeds,
            warmup_steps=self.warmup_steps,
            decision_interval_steps=self.decision_interval_steps,
            blend_steps=self.blend_steps,
            hold_steps=self.hold_steps,
            last_germination_step=self.last_germination_step,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """How good a host is on one split: mean cross-entropy in nats, and accuracy from 0 to 1."""

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a twin's training.

    Attributes:
        run: name of the run.
        step: optimizer steps done.
        train_loss: mean loss of the training batches since the last such moment.
        validation_loss: held-out loss at this step.
    """

    run: str
    step: int
    train_loss: float
    validation_loss: float


@dataclass(frozen=True, slots=True)
class TwinResult:
    """What became of one twin.

    Attributes:
        run: name of its run.
        curve: one entry every ``Plan.report_every`` steps.
        validation: its last score on the validation split.
        test: its score on the test split, which nothing before saw.
        host_parameters: before anything grew.
        parameters: at the end, seeds included.
        seconds: of training, evaluation included.
        summary: the session's own account of what was done and why.
        failure: why the session stopped working, if it did; training went on without it.
    """

    run: str
    curve: tuple[Progress, ...]
    validation: Score
    test: Score
    host_parameters: int
    parameters: int
    seconds: float
    summary: str
    failure: str = ""


def train_twin(
    spec: HostSpec,
    plan: Plan,
    link: str | kasmina.Link,
    *,
    run: str,
    mode: EvaluationMode = "act",
    policy: str = "",
    paired_run: str = "",
    labels: dict[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TwinResult:
    """Train one host under a session, from the weights and in the data order that ``spec.seed`` draws.

    Args:
        spec: the host.
        plan: length, cadence and limits.
        link: address of a server, or a link in process.
        run: name of the run; unique on the bus.
        mode: ``observe`` for the static twin.
        policy: who decides; empty for the server's default.
        paired_run: the static twin's run, trained before. Empty where there is none.
        labels: more labels than those of the spec.
        on_progress: called every ``plan.report_every`` steps, from this thread; its time is not counted as training.
    """
    task = load_task(spec.task)
    host = build(spec, task)
    host_parameters = _parameters(host)
    curve: list[Progress] = []
    measured: list[float] = []

    def evaluate(model: nn.Module) -> float:
        measured.append(score(model, task.validation).loss)
        return measured[-1]

    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        host = kasmina.wrap(host, task.train.inputs[: spec.batch_size], blueprints=BLUEPRINTS)
        optimizer = torch.optim.AdamW(host.parameters(), lr=spec.learning_rate)
        with kasmina.connect(
            link,
            host,
            optimizer,
            run=run,
            mode=mode,
            evaluate=evaluate,
            limits=plan.limits(),
            policy=policy,
            paired_run=paired_run,
            labels={**spec.labels(), **(labels or {})},
            report_every=plan.report_every,
            # The same reports every time, however busy the machine: decisions rest on them.
            overhead_ceiling=None,
            # The server is of our own making: what the environment says of another's must not hold for it.
            credentials=NO_CREDENTIALS,
        ) as session:
            recent: list[Tensor] = []
            for step, epoch, inputs, targets in batches(task, spec, plan.steps):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(host(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                recent.append(loss.detach())
                session.step(loss=loss, epoch=epoch)
                if step % plan.report_every == 0:
                    # Asked for the loss of the host as it is, then for that without seeds whose trial is over.
                    held_out = measured[0] if measured else evaluate(host)
                    measured.clear()
                    moment = Progress(run, step, float(torch.stack(recent).mean()), held_out)
                    recent.clear()
                    curve.append(moment)
                    if on_progress:
                        with session.untimed():
                            on_progress(moment)
        summary = str(session.summary())
    return TwinResult(
        run=run,
        curve=tuple(curve),
        validation=score(host, task.validation),
        test=score(host, task.test),
        host_parameters=host_parameters,
        parameters=_parameters(host),
        seconds=time.perf_counter() - began,
        summary=summary,
        failure=session.failure,
    )


def batches(task: Task, spec: HostSpec, steps: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Full batches in the order that ``spec.seed`` draws, as (step from 1, epoch from 0, inputs, targets).

    The last, smaller batch of an epoch is left out. Raises ``ValueError`` where not even one batch is full.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    full = len(task.train) // spec.batch_size
    if full == 0:
        raise ValueError(f"batch_size: {spec.batch_size} exceeds the {len(task.train)} training samples of {task.name}")
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        epoch, index = divmod(step - 1, full)
        if index == 0:
            order = torch.randperm(len(task.train), generator=generator)
        chosen = order[index * spec.batch_size : (index + 1) * spec.batch_size]
        yield step, epoch, task.train.inputs[chosen], task.train.targets[chosen]


def score(host: nn.Module, split: Split) -> Score:
    """Mean cross-entropy and accuracy of ``host`` on ``split``. The host's training mode is put back afterwards."""
    was_training = host.training
    host.eval()
    total, right = 0.0, 0
    try:
        with torch.no_grad():
            for start in range(0, len(split), _EVALUATION_BATCH):
                inputs = split.inputs[start : start + _EVALUATION_BATCH]
                targets = split.targets[start : start + _EVALUATION_BATCH]
                outputs = host(inputs)
                total += float(F.cross_entropy(outputs, targets, reduction="sum"))
                right += int((outputs.argmax(dim=1) == targets).sum())
    finally:
        host.train(was_training)
    return Score(total / len(split), right / len(split))


def _parameters(host: nn.Module) -> int:
    return sum(parameter.numel() for parameter in host.parameters())
