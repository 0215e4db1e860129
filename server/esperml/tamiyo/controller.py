"""The controller: events of all runs in, decisions, commands and experience out. Pure and synchronous.

It does no I/O, starts no threads and reads no clock, and its draws come from the seed in the settings, the run and the
step. The same events in the same order give the same answers, which is what makes redelivery and rebuilding safe.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, TypeVar

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.contract import InvalidFieldError, check_event
from esperml.settings import TamiyoSettings
from esperml.tamiyo import validate
from esperml.tamiyo.analyzer import Analyzer
from esperml.tamiyo.checkpoint import CheckpointError
from esperml.tamiyo.rewards import LossCurve
from esperml.tamiyo.run_control import RunControl
from esperml.tamiyo.run_state import NotPendingError, Outgoing, RunState
from esperml.tamiyo.sessions import contest, stale_reports, superseded_by
from esperml.tamiyo.store import PolicyStore, UnknownPolicyError
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, runs_pb2

__all__ = ["Controller", "NotPendingError", "Outgoing", "UnknownRunError"]

MAX_HELD_EVENTS: Final = 256
"""Events that are held for one run until it is known."""

MAX_HELD_RUNS: Final = 256
"""Unknown runs for which events are held, and refused runs that are remembered."""

MAX_CURVES: Final = 4096
"""Held-out curves of runs that are gone from memory, kept for twins that are still to come."""

log = structlog.get_logger(__name__)

_V = TypeVar("_V")


class UnknownRunError(LookupError):
    """There is no run of that name.

    Attributes:
        run_id: the name that was asked for.
    """

    def __init__(self, run_id: str) -> None:
        super().__init__(f"there is no run named {run_id!r}")
        self.run_id = run_id


class Controller:
    """Decides for every run that it hears of.

    Attributes:
        policies: who may decide.
        settings: how, and the limits of runs that state none.
    """

    def __init__(self, policies: PolicyStore, settings: TamiyoSettings) -> None:
        self.policies = policies
        self.settings = settings
        self._seed = settings.random_seed if settings.random_seed is not None else secrets.randbits(63)
        self._runs: OrderedDict[str, RunControl] = OrderedDict()
        self._held: OrderedDict[str, list[tuple[event_pb2.Kind.ValueType, event_pb2.Event]]] = OrderedDict()
        self._curves: OrderedDict[str, LossCurve] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()

    # Events.

    def handle(self, kind: event_pb2.Kind.ValueType, event: event_pb2.Event, *, stale: bool = False) -> Outgoing:
        """Take in one event.

        Events of a run or session that is not known yet are held, a bounded number of them, until it starts; those of
        one whose start was refused are dropped. A second start of a run begins it anew, and what another session of it
        says from then on is left out. Duplicates, by event id, change nothing.

        Args:
            kind: telemetry, events or outcomes; the payloads of other kinds are ignored.
            event: the event.
            stale: whether a later report of the session is known to follow. Only the latest is decided on.

        Returns:
            What is to be published, in order.

        Raises:
            InvalidFieldError: the event breaks the contract; nothing of it was taken in.
        """
        check_event(kind, event)
        if event.WhichOneof("payload") == "run_started":
            return self._start(event)
        control = self._runs.get(event.run_id)
        if control is None:
            if event.run_id not in self._refused:
                self._hold(kind, event)
            return []
        run = control.run
        if event.session_id in run.superseded:
            return contest(run, event)
        if run.session_id and event.session_id not in ("", run.session_id):
            self._hold(kind, event)
            return []
        return control.handle(event, stale=stale)

    def rebuild(self, events: Iterable[tuple[event_pb2.Kind.ValueType, event_pb2.Event]]) -> None:
        """Take in what was recorded of runs before, decisions included, without deciding anything anew.

        Args:
            events: of telemetry, events, outcomes and decisions, each kind in its order. What breaks the contract is
                logged and left out, as it was when it first came.
        """
        # Each kind stays in its order, however the clocks of those who made the events differ.
        latest: dict[event_pb2.Kind.ValueType, int] = {}
        timed = []
        for kind, event in events:
            latest[kind] = max(latest.get(kind, 0), event.created_at.ToNanoseconds())
            timed.append((latest[kind], kind, event))
        timed.sort(key=lambda item: (item[0], _REBUILD_ORDER[item[1]]))
        ordered = [(kind, event) for _, kind, event in timed]
        recorded: dict[str, decision_pb2.AdaptationDecision] = {}
        for _, event in ordered:
            if event.WhichOneof("payload") == "decision":
                recorded[event.decision.decision_id] = event.decision
        try:
            for kind, event in ordered:
                if kind != event_pb2.KIND_DECISIONS:
                    self._handle_again(kind, event, recorded)
        finally:
            for run_id in {event.run_id for _, event in ordered} & self._runs.keys():
                self._runs[run_id].go_live()

    def _handle_again(
        self,
        kind: event_pb2.Kind.ValueType,
        event: event_pb2.Event,
        recorded: dict[str, decision_pb2.AdaptationDecision],
    ) -> None:
        try:
            self.handle(kind, event)
        except InvalidFieldError as error:
            log.warning("event_refused", run_id=event.run_id, field=error.field, problem=error.problem)
        if event.WhichOneof("payload") == "run_started" and event.run_id in self._runs:
            self._runs[event.run_id].recall(recorded)

    def knows(self, run_id: str) -> bool:
        """Whether a run was started, or its start refused."""
        return run_id in self._runs or run_id in self._refused

    def _start(self, event: event_pb2.Event) -> Outgoing:
        run_id, started = event.run_id, event.run_started
        before = self._runs.get(run_id)
        if before is not None and (before.run.origin == event.event_id or event.session_id in before.run.superseded):
            return []
        try:
            validate.check_graph(started.graph, "event.run_started.graph")
            try:
                policy = self.policies.get(started.policy)
            except (UnknownPolicyError, CheckpointError) as error:
                raise InvalidFieldError("event.run_started.policy", str(error)) from error
        except InvalidFieldError as error:
            self._refused[run_id] = str(error)
            _trim(self._refused, MAX_HELD_RUNS)
            self._held.pop(run_id, None)
            raise
        self._refused.pop(run_id, None)
        outgoing = before.finish(event.created_at) if before is not None and not before.run.ended else []
        run = RunState(
            run_id=run_id,
            origin=event.event_id,
            started=started,
            policy=policy,
            analyzer=Analyzer(run_id, started.graph),
            settings=self.settings,
            started_at=event.created_at,
            session_id=event.session_id,
            superseded=superseded_by(event.session_id, before.run if before is not None else None),
        )
        control = RunControl(run, self.settings, self._seed, self._curve)
        self._runs.pop(run_id, None)
        self._runs[run_id] = control
        self._curves.pop(run_id, None)
        self._evict()
        log.info("run_started", run_id=run_id, policy=policy.facts.name, layers=len(started.graph.layers))
        waiting = self._held.pop(run_id, [])
        for (kind, held), stale in zip(waiting, stale_reports([held for _, held in waiting]), strict=True):
            try:
                outgoing += self.handle(kind, held, stale=stale)
            except InvalidFieldError as error:
                log.warning("event_refused", run_id=run_id, field=error.field, problem=error.problem)
        return outgoing

    def _hold(self, kind: event_pb2.Kind.ValueType, event: event_pb2.Event) -> None:
        held = self._held.setdefault(event.run_id, [])
        held.append((kind, event))
        del held[:-MAX_HELD_EVENTS]
        _trim(self._held, MAX_HELD_RUNS)

    def _curve(self, run_id: str) -> LossCurve | None:
        control = self._runs.get(run_id)
        return control.run.curve if control is not None else self._curves.get(run_id)

    def _evict(self) -> None:
        while len(self._runs) > self.settings.max_runs:
            ended = (run_id for run_id, control in self._runs.items() if control.run.ended)
            run_id = next(ended, next(iter(self._runs)))
            gone = self._runs.pop(run_id).run
            if len(gone.curve):
                self._curves[run_id] = gone.curve
                _trim(self._curves, MAX_CURVES)
            if not gone.ended:
                log.warning("run_evicted", run_id=run_id, step=gone.step, max_runs=self.settings.max_runs)

    # Questions, and a person's say.

    def runs(self) -> list[runs_pb2.Run]:
        """All runs in short, latest first."""
        return [control.run.summary() for control in reversed(self._runs.values())]

    def run(self, run_id: str) -> runs_pb2.Run:
        """One run in short. Raises :class:`UnknownRunError`."""
        return self._get(run_id).summary()

    def state(self, run_id: str) -> graph_pb2.ModelGraphState | None:
        """The state of a run now, or ``None`` before its first report. Raises :class:`UnknownRunError`."""
        run = self._get(run_id)
        return run.state() if run.reported_at is not None else None

    def pending(self, run_id: str) -> list[decision_pb2.AdaptationDecision]:
        """Decisions that wait for approval, oldest first. Raises :class:`UnknownRunError`."""
        run = self._get(run_id)
        return [run.decisions[decision_id] for decision_id in run.pending]

    def decision(self, run_id: str, decision_id: str) -> decision_pb2.AdaptationDecision:
        """A decision of a run as it stands. Raises :class:`UnknownRunError` and ``KeyError``."""
        return self._get(run_id).decisions[decision_id]

    def pause(self, run_id: str) -> runs_pb2.Run:
        """Take no decisions in a run that is under way. Raises :class:`UnknownRunError`."""
        run = self._get(run_id)
        if run.status == runs_pb2.RUN_STATUS_RUNNING:
            run.status = runs_pb2.RUN_STATUS_PAUSED
        return run.summary()

    def resume(self, run_id: str) -> runs_pb2.Run:
        """Take decisions again. Raises :class:`UnknownRunError`."""
        run = self._get(run_id)
        if run.status == runs_pb2.RUN_STATUS_PAUSED:
            run.status = runs_pb2.RUN_STATUS_RUNNING
        return run.summary()

    def set_limits(self, run_id: str, changes: graph_pb2.RunLimits) -> graph_pb2.RunLimits:
        """Change what a run allows; what ``changes`` leaves out stays. Raises :class:`UnknownRunError`.

        Returns:
            All limits in force.
        """
        run = self._get(run_id)
        run.started.limits.MergeFrom(changes)
        return run.limits

    def approve(self, run_id: str, decision_id: str, at: Timestamp) -> Outgoing:
        """Send a pending decision to the host.

        Args:
            run_id: the run.
            decision_id: the decision.
            at: the time now, for the events that come of it.

        Returns:
            What is to be published.

        Raises:
            UnknownRunError: there is no such run.
            NotPendingError: the decision does not wait (any more).
        """
        self._get(run_id)
        return self._runs[run_id].approve(decision_id, at)

    def veto(self, run_id: str, decision_id: str, reason: str, at: Timestamp) -> Outgoing:
        """Refuse a pending decision; arguments, result and errors as for :meth:`approve`."""
        self._get(run_id)
        return self._runs[run_id].veto(decision_id, reason, at)

    def _get(self, run_id: str) -> RunState:
        if run_id not in self._runs:
            raise UnknownRunError(run_id)
        return self._runs[run_id].run


_REBUILD_ORDER: Final = {
    event_pb2.KIND_EVENTS: 0,
    event_pb2.KIND_OUTCOMES: 1,
    event_pb2.KIND_TELEMETRY: 2,
    event_pb2.KIND_DECISIONS: 3,
}


def _trim(mapping: OrderedDict[str, _V], most: int) -> None:
    while len(mapping) > most:
        mapping.popitem(last=False)
