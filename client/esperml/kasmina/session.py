"""The session: what a training loop calls once per optimizer step, and all that it does then."""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import structlog
from torch import Tensor, nn
from torch.optim import Optimizer

from esperml.client.events import new_event
from esperml.kasmina.budgets import Budgets
from esperml.kasmina.clock import StepClock
from esperml.kasmina.commands import Commander
from esperml.kasmina.errors import CheckpointError
from esperml.kasmina.evaluation import Evaluator
from esperml.kasmina.figures import as_epoch, seed_signal
from esperml.kasmina.governor import Governor, GovernorOptions, Intervention
from esperml.kasmina.grafting import Grafter
from esperml.kasmina.host import host_of
from esperml.kasmina.link import Link
from esperml.kasmina.proposals import Proposals
from esperml.kasmina.reporting import Reporter
from esperml.kasmina.summary import Summary
from esperml.kasmina.training_state import TrainingState
from esperml.settings import TamiyoSettings
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, run_pb2

_log = structlog.get_logger(__name__)

CLOSE_TIMEOUT_S: Final = 5.0
_ACTIONS_KEPT: Final = 1000
_EVENTS_A_STEP: Final = 32
"""Most commands and notices that are taken up between two optimizer steps: a storm of them must not stop training."""
_EVENTS_WAITING: Final = 10_000
_HOLD_STEPS: Final = TamiyoSettings().hold_steps


class Session:
    """A connected run; a context manager. :func:`~esperml.kasmina.connect` makes it.

    Call :meth:`step` once per optimizer step, after it and before gradients are set to zero. Nothing that happens in
    there reaches the training loop: a failure in Esper's own code, or in the evaluator, ends the session's work, is
    logged once with its traceback, and stands in :meth:`summary`.

    Attributes:
        run: name of the run.
        session_id: tells this session from any other of the run.
        steps: optimizer steps so far.
        decisions_applied: commands that were carried out.
        decisions_refused: commands that were refused or had expired.
        failure: why the session stopped working; empty while it works.
    """

    def __init__(
        self,
        link: Link,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        run: str,
        started: run_pb2.RunStarted,
        scheduler: object | None,
        evaluate: Evaluator | None,
        report_every: int,
        evaluate_every: int,
        overhead_ceiling: float | None,
        governor: GovernorOptions | None,
    ) -> None:
        self.run = run
        self.session_id = uuid.uuid4().hex
        self.steps = 0
        self.decisions_applied = 0
        self.decisions_refused = 0
        self.failure = ""
        self._host = host_of(model)
        self._link = link
        self._report_every = report_every
        self._mode = started.mode
        limits = started.limits
        self._graft_budget = limits.graft_parameter_budget if limits.HasField("graft_parameter_budget") else None
        self._grafter = Grafter(self._host, optimizer, scheduler)
        self._training = TrainingState(self._grafter, optimizer, scheduler)
        may_act = started.mode != decision_pb2.MODE_OBSERVE
        self._governor = (
            None if governor is None else Governor(self._training, self._grafter, optimizer, governor, may_act=may_act)
        )
        self._clock = StepClock()
        self._budgets = Budgets(self._grafter, optimizer, limits, self._clock)
        self._commander = Commander(self._grafter, limits, started.mode, self._governor, self._budgets)
        self._reporter = Reporter(
            model,
            optimizer,
            self._clock,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            hold_steps=limits.hold_steps if limits.HasField("hold_steps") else _HOLD_STEPS,
            overhead_ceiling=overhead_ceiling,
        )
        self._traceparent = os.environ.get("TRACEPARENT", "")
        self._traceparents: dict[str, str] = {}  # Of the commands that came with one, by decision.
        self._proposals = Proposals()
        self._remarks: dict[str, str] = {}
        self._waiting: deque[event_pb2.Event] = deque(maxlen=_EVENTS_WAITING)
        self._superseded = False
        self._sender_seconds = 0.0
        self._epoch: int | None = None
        self._epochs_ended: list[tuple[int, int]] = []  # Each with the step at its end, until the next report.
        self._actions: deque[tuple[int, str]] = deque(maxlen=_ACTIONS_KEPT)
        self._closed = False
        started.graph.CopyFrom(self._graph())
        started.parameters = self._host.host_parameters
        self._guard(self._start, started)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._guard(self._close, run_pb2.RUN_END_FAILED, f"{type(error).__name__}: {error}")

    def step(self, *, loss: Tensor | float | None = None, epoch: int | None = None) -> None:
        """One optimizer step is done. Telemetry leaves here, and commands are carried out here.

        Args:
            loss: the training loss of the step's batch.
            epoch: the epoch, from 0.
        """
        if self.failure or self._closed:
            return
        start, left_out = time.perf_counter(), self._clock.total_left_out
        self._guard(self._step, loss, epoch)
        self._clock.spend(time.perf_counter() - start - (self._clock.total_left_out - left_out))

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens in here is no part of training: a checkpoint, a validation of your own, a wait.

        Neither the time of a step nor Esper's share of the time counts it.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._clock.leave_out(time.perf_counter() - start)

    def close(self) -> None:
        """The run is completed: say so, send what is left for at most 5 s, and let go of the model."""
        self._guard(self._close, run_pb2.RUN_END_COMPLETED, "")

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs: host, seeds, optimizer, scheduler, random number generators, and the session.

        ``torch.save`` it between optimizer steps; ``torch.load(weights_only=True)`` reads it. It is a copy.

        Raises:
            CheckpointError: the optimizer or the scheduler keeps what cannot be written so; the message names it.
        """
        with self.untimed():
            own = {"steps": self.steps, "epoch": self._epoch, "handled": self._commander.handled}
            return {
                **self._training.capture(),
                "session": own,
                "governor": None if self._governor is None else self._governor.state_dict(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from where :meth:`state_dict` was called, here or in another process.

        The model must be wrapped anew by the same code, with the same blueprints registered; optimizer and scheduler
        must be of the same kinds over the same groups. Seeds are planted again.

        Raises:
            CheckpointError: the state does not fit; the message names what. Nothing was changed.
        """
        with self.untimed():
            if "session" not in state:
                raise CheckpointError("session is missing: the state is none of Session.state_dict()")
            restructured = self._training.restore(state)
            self.steps, self._epoch = state["session"]["steps"], state["session"]["epoch"]
            self._commander.handled = state["session"]["handled"]
            if self._governor is not None and state["governor"] is not None:
                self._governor.load_state_dict(state["governor"])
            self._reporter.disarm()
            if restructured:
                self._guard(self._tell_structure)
            self._guard(self._arm_if_due)

    def summary(self) -> Summary:
        """What was seen, what was done and why."""
        statistics = self._link.statistics()
        return Summary(
            run=self.run,
            mode=decision_pb2.Mode.Name(self._mode).removeprefix("MODE_").lower(),
            steps=self.steps,
            reports=self._reporter.reports,
            reports_dropped=statistics.reports_dropped,
            connected=statistics.connected,
            overhead=self._clock.share() if self.steps else None,
            sampling=self._reporter.sampling(),
            host_parameters=self._host.host_parameters,
            parameters=self._host.host_parameters + self._host.seed_parameters,
            train_loss=self._reporter.train_loss,
            held_out_loss=self._reporter.held_out_loss,
            seeds=tuple(seed_signal(seed, None) for seed in self._host.seeds.values()),
            actions=tuple(self._actions),
            layers=tuple(self._reporter.layers.values()),
            decisions_applied=self.decisions_applied,
            decisions_refused=self.decisions_refused,
            proposals=self._proposals.at(self.steps),
            remarks=tuple(self._remarks.values()),
            failure=self.failure,
        )

    def _guard(self, work: Callable[..., None], *args: Any) -> None:
        """Do ``work``, and let nothing that goes wrong in it reach the training loop."""
        # The one broad catch: hours of the user's training must not end because of us. It is not passed over: the
        # session stops for good, says so once with the traceback, and tells it again in its summary.
        try:
            work(*args)
        except Exception as error:  # noqa: BLE001
            self.failure = f"step {self.steps}: {type(error).__name__}: {error}"
            self._reporter.disarm()
            trace = "".join(traceback.format_exception(error))
            _log.error("session_failed", run_id=self.run, step=self.steps, error=self.failure, traceback=trace)

    def _start(self, started: run_pb2.RunStarted) -> None:
        self._publish(event_pb2.KIND_EVENTS, run_started=started)
        self._arm_if_due()

    def _step(self, loss: Tensor | float | None, epoch: int | None) -> None:
        self.steps += 1
        if epoch is not None and epoch != self._epoch:
            self._begin_epoch(epoch)
        self._grafter.advance()
        if self._reporter.armed and not self._superseded:
            self._report(loss)
        self._govern(loss)
        if self._superseded:
            return
        if self._may_change:
            self._receive()
        self._arm_if_due()

    @property
    def _may_change(self) -> bool:
        """Whether the host may be changed at this step."""
        return True

    def _receive(self) -> None:
        for event in self._link.received():
            if event.session_id in ("", self.session_id):
                if len(self._waiting) == _EVENTS_WAITING:
                    self._remark("storm", f"more than {_EVENTS_WAITING} commands wait: the oldest are left out")
                self._waiting.append(event)
        for _ in range(min(len(self._waiting), _EVENTS_A_STEP)):
            self._take(self._waiting.popleft())

    def _govern(self, loss: Tensor | float | None) -> None:
        """Undo what did harm or costs more than is allowed, and say so."""
        at_report = self.steps % self._report_every == 0
        if self._governor is not None:
            self._governor.note(self.steps, loss)
        if not self._may_change:
            return
        if self._governor is not None:
            self._tell(self._governor.check(self.steps, at_report=at_report))
            for about, words in self._governor.remarks.items():
                self._remark(about, words)
        if at_report:
            self._tell(self._budgets.check(self.steps))

    def _tell(self, intervention: Intervention | None) -> None:
        if intervention is None:
            return
        self._actions.append((self.steps, intervention.words))
        _log.warning("governor_intervened", run_id=self.run, step=self.steps, reason=intervention.words)
        for change in intervention.undone:
            if change.decision_id:
                undone = decision_pb2.Applied(
                    decision_id=change.decision_id,
                    status=decision_pb2.COMMAND_STATUS_UNDONE,
                    reason=intervention.words,
                    step=self.steps,
                    seed_id=change.seed_id,
                    parameters_added=-change.parameters_added,
                    structure_version=self._host.structure_version,
                )
                self._publish(event_pb2.KIND_OUTCOMES, change.decision_id, applied=undone)
        if intervention.restructured:
            self._tell_structure()

    def _begin_epoch(self, epoch: int) -> None:
        known = as_epoch(epoch)
        if known is None:
            self._remark("epoch", f"epoch {epoch!r} is left out: epochs are counted from 0")
            return
        if self._epoch is not None:
            self._epochs_ended.append((self._epoch, self.steps - 1))
        self._epoch = known

    def _take(self, event: event_pb2.Event) -> None:
        """Do what was sent to this session."""
        if event.HasField("command"):
            self._proposals.approve(event.command.decision_id)
            self._carry_out(event)
        elif event.notice.code == run_pb2.NOTICE_CODE_PROPOSED:
            self._proposals.take(event.notice.decision)
        elif event.HasField("notice"):
            self._remark(f"notice {event.notice.code}", event.notice.text)
            if event.notice.code == run_pb2.NOTICE_CODE_SUPERSEDED:
                self._superseded = True
                self._proposals.abandon()
                self._reporter.disarm()

    def _remark(self, about: str, words: str) -> None:
        """Say ``words`` once, in the log and in the summary."""
        if about not in self._remarks:
            self._remarks[about] = words
            _log.warning("session_remark", run_id=self.run, step=self.steps, remark=words)

    def _arm_if_due(self) -> None:
        if not self._superseded and (self.steps + 1) % self._report_every == 0:
            self._spend_sender_time()
            self._reporter.arm()

    def _tell_epochs(self) -> None:
        """Say which epochs ended since the last report, whose measures still stand.

        Not at their ends: epochs of a few short steps would cost more than all else.
        """
        for epoch, step in self._epochs_ended:
            ended = run_pb2.EpochCompleted(epoch=epoch, step=step, run=self._reporter.latest.run)
            self._publish(event_pb2.KIND_EVENTS, epoch_completed=ended)
        self._epochs_ended.clear()

    def _report(self, loss: Tensor | float | None) -> None:
        self._tell_epochs()
        self._spend_sender_time()
        dropped = self._link.statistics().reports_dropped
        report, effects = self._reporter.report(self.steps, self._epoch, loss, dropped)
        for effect in effects:
            self._publish(event_pb2.KIND_OUTCOMES, effect.decision_id, effect=effect)
        self._publish(event_pb2.KIND_TELEMETRY, health_report=report)

    def _carry_out(self, event: event_pb2.Event) -> None:
        command = event.command
        if event.traceparent:
            self._traceparents[command.decision_id] = event.traceparent
        carried = self._commander.carry_out(command, self.steps)
        if carried is None:
            return
        self._actions.append((self.steps, carried.words))
        if carried.applied.status == decision_pb2.COMMAND_STATUS_APPLIED:
            self.decisions_applied += 1
        else:
            self.decisions_refused += 1
        _log.info("command_handled", run_id=self.run, step=self.steps, outcome=carried.words)
        self._publish(event_pb2.KIND_OUTCOMES, command.decision_id, applied=carried.applied)
        if carried.structure_changed:
            self._tell_structure(command.decision_id)

    def _tell_structure(self, decision_id: str = "") -> None:
        changed = run_pb2.StructureChanged(step=self.steps, decision_id=decision_id, graph=self._graph())
        self._publish(event_pb2.KIND_EVENTS, decision_id, structure_changed=changed)

    def _graph(self) -> graph_pb2.HostGraph:
        return self._host.graph(self._graft_budget)

    def _spend_sender_time(self) -> None:
        seconds = self._link.statistics().sender_seconds
        self._clock.spend(seconds - self._sender_seconds)
        self._sender_seconds = seconds

    def _publish(self, kind: event_pb2.Kind.ValueType, decision_id: str = "", **payload: Any) -> None:
        """Publish an event, in the trace context of the decision that it is about, or of this process."""
        traceparent = self._traceparents.get(decision_id, self._traceparent)
        event = new_event(self.run, session_id=self.session_id, traceparent=traceparent, **payload)
        self._link.publish(kind, event)

    def _close(self, end: run_pb2.RunEnd.ValueType, error: str) -> None:
        if self._closed:
            return
        start = time.perf_counter()
        self._closed = True
        self._reporter.disarm()
        if self._governor is not None:
            self._governor.close()
        # The run is another session's where that one has superseded this, and has not ended.
        if not self._superseded:
            self._tell_epochs()
            ended = run_pb2.RunEnded(step=self.steps, end=end, error=error, run=self._reporter.latest.run)
            self._publish(event_pb2.KIND_EVENTS, run_ended=ended)
        self._clock.spend(time.perf_counter() - start)
        self._clock.stop()
        self._link.close(CLOSE_TIMEOUT_S)
        self._spend_sender_time()
