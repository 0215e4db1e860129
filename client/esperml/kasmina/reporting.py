"""Making the reports of a session: what the sampled step showed, held-out loss, ablations, and where the time goes."""

from __future__ import annotations

import time

from torch import Tensor, nn
from torch.optim import Optimizer

from esperml.kasmina import stages
from esperml.kasmina.budget import Budget
from esperml.kasmina.clock import StepClock
from esperml.kasmina.evaluation import Evaluator, evaluate_host, evaluate_without
from esperml.kasmina.figures import learning_rate, seed_signal
from esperml.kasmina.host import host_of
from esperml.kasmina.measures import representable
from esperml.kasmina.seeds import Seed
from esperml.kasmina.telemetry import Telemetry
from esperml.v1 import decision_pb2, health_pb2


class Reporter:
    """Makes the reports of one host.

    Args:
        model: the wrapped model.
        optimizer: the optimizer that trains it.
        clock: is told what reports and evaluations cost.
        overhead_ceiling: greatest share of the time that Esper may take; ``None`` for no limit.
        evaluate: the user's held-out loss, if any.
        evaluate_every: optimizer steps from one evaluation to the next.
        hold_steps: steps that a seed holds before it is ablated.

    Attributes:
        armed: whether the next step is reported on.
        reports: number of reports made.
        latest: the last one; empty before the first.
        layers: the latest measures of each layer.
        train_loss: first and last training loss that were reported; ``None`` where none was.
        held_out_loss: first and last held-out loss; ``None`` where none was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        clock: StepClock,
        *,
        evaluate: Evaluator | None,
        evaluate_every: int,
        hold_steps: int,
        overhead_ceiling: float | None,
    ) -> None:
        self.armed = False
        self.reports = 0
        self.latest = health_pb2.HealthReport()
        self.layers: dict[str, health_pb2.EnhancedHealthSignal] = {}
        self.train_loss: tuple[float, float] | None = None
        self.held_out_loss: tuple[float, float] | None = None
        self._model = model
        self._host = host_of(model)
        self._optimizer = optimizer
        self._clock = clock
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._hold_steps = hold_steps
        self._telemetry = Telemetry(self._host)
        self._budget = Budget(overhead_ceiling, clock, len(self._host.layers))
        self._granted = (0, 0)  # Layers that are due for the next report, and how many of them it measures.
        self._reported = 0  # The step of the last report.
        self._evaluated = 0  # The step of the last evaluation.

    def arm(self) -> None:
        """A report is due on the next training pass: watch it, unless that would cost more than it may."""
        due = self._telemetry.due
        granted = self._budget.grant(due)
        self.armed = granted is not None
        if granted is not None:
            self._granted = due, granted
            self._telemetry.arm(granted)

    def disarm(self) -> None:
        """Watch no more."""
        self.armed = False
        self._telemetry.disarm()

    def sampling(self) -> health_pb2.Sampling | None:
        """How much is measured under the ceiling; ``None`` where there is none, or before the first report."""
        return self.latest.sampling if self.latest.HasField("sampling") else None

    def report(
        self, step: int, epoch: int | None, loss: Tensor | float | None, reports_dropped: int
    ) -> tuple[health_pb2.HealthReport, list[decision_pb2.Effect]]:
        """The report on the pass that was watched, and the effects that were measured on the way.

        Args:
            step: optimizer steps since the start.
            epoch: the epoch, from 0, where it is known.
            loss: the step's training loss.
            reports_dropped: reports so far that could not be sent.
        """
        start = time.perf_counter()
        sample = self._telemetry.collect(loss)
        due, granted = self._granted
        self._budget.note(granted, time.perf_counter() - start + sample.hook_seconds)
        self._clock.spend(sample.hook_seconds)
        held_out, effects = self._held_out(step)
        step_seconds, overhead = self._clock.report(step)
        run = health_pb2.RunMeasures(
            train_loss=sample.train_loss,
            held_out_loss=held_out,
            learning_rate=learning_rate(self._optimizer),
            step_seconds=step_seconds,
            overhead=overhead,
            parameters=self._host.host_parameters + self._host.seed_parameters,
        )
        report = health_pb2.HealthReport(
            step=step,
            epoch=epoch,
            structure_version=self._host.structure_version,
            run=run,
            layers=sample.layers,
            places=sample.places,
            seeds=[seed_signal(seed, sample.seed_gradient_norms.get(name)) for name, seed in self._host.seeds.items()],
            reports_dropped=reports_dropped,
            sampling=self._budget.sampling(
                interval=step - self._reported if self.reports else None, due=due, layers=granted
            ),
        )
        self.armed = False
        self._reported = step
        self.reports += 1
        self.latest = report
        self.layers.update((signal.layer, signal) for signal in sample.layers)
        self.train_loss = _first_and_last(self.train_loss, sample.train_loss)
        self.held_out_loss = _first_and_last(self.held_out_loss, held_out)
        return report, effects

    def _held_out(self, step: int) -> tuple[float | None, list[decision_pb2.Effect]]:
        """Held-out loss where it is due, and with it the ablation of seeds that have held long enough."""
        if self._evaluate is None:
            return None, []
        due = [seed for seed in self._host.seeds.values() if self._ablation_due(seed)]
        # Reports that were not made can have passed over a step on which one was due.
        if not due and step // self._evaluate_every == self._evaluated // self._evaluate_every:
            return None, []
        self._evaluated = step
        held_out = evaluate_host(self._model, self._timed_evaluate)
        for seed in due:
            without = evaluate_without(self._model, seed, self._timed_evaluate)
            if held_out is not None and without is not None and representable(without - held_out):
                seed.ablation_contribution = without - held_out
        effects = [
            decision_pb2.Effect(
                decision_id=seed.decision_id,
                step=step,
                basis=decision_pb2.BASIS_ABLATION,
                loss_reduction=seed.ablation_contribution,
            )
            for seed in due
            if seed.ablation_contribution is not None and seed.decision_id
        ]
        return held_out, effects

    def _timed_evaluate(self, model: nn.Module) -> float | Tensor:
        """What the user's evaluator says; only its own time is not ours."""
        assert self._evaluate is not None  # noqa: S101 - there is nothing to call this for without one
        start = time.perf_counter()
        try:
            return float(self._evaluate(model))
        finally:
            self._clock.leave_out(time.perf_counter() - start)

    def _ablation_due(self, seed: Seed) -> bool:
        return (
            seed.stage == stages.HOLDING
            and seed.ablation_contribution is None
            and seed.steps_in_stage >= self._hold_steps
        )


def _first_and_last(pair: tuple[float, float] | None, value: float | None) -> tuple[float, float] | None:
    if value is None:
        return pair
    return (value if pair is None else pair[0], value)
