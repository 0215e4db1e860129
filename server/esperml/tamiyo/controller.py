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
from esperml.tamiyo.sessions import contest, forget_contests, not_followed, stale_reports, superseded_by
from esperml.tamiyo.store import PolicyStore, UnknownPolicyError
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, runs_pb2

__all__ = ["Controller", "NotPendingError", "Outgoing", "UnknownRunError"]

MAX_HELD_EVENTS: Final = 256
"""Events that are held for one run until it is known."""

MAX_HELD: Final = 2**16
"""Events that are held for all runs together; those of the run that has waited longest go first."""

MAX_REFUSED: Final = 256
"""Refused runs that are remembered."""

MAX_CURVES: Final = 4096
"""Held-out curves of runs that are gone from memory, kept for twins that are still to come."""

log = structlog.get_logger(__name__)

_V = TypeVar("_V")
_Held = tuple[event_pb2.Kind.ValueType, event_pb2.Event, bool]  # The last: whether it is known to be stale.


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
        self._held: OrderedDict[str, list[_Held]] = OrderedDict()
        self._held_count = 0
        self._now_s = 0.0  # When the latest event of all was stored.
        self._curves: OrderedDict[str, LossCurve] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()

    # Events.

    def handle(
        self, kind: event_pb2.Kind.ValueType, event: event_pb2.Event, *, stale: bool = False, at_s: float = 0.0
    ) -> Outgoing:
        """Take in one event.

        Events of a run or session that is not known yet are held, a bounded number of them, until it starts; those of
        one whose start was refused are dropped. A second start of a run begins it anew, and what another session of it
        says from then on is left out. Duplicates, by event id, change nothing. A start that finds no place among the
        runs that are followed is answered with a notice; events of that run are held like those of an unknown one.

        Args:
            kind: telemetry, events or outcomes; the payloads of other kinds are ignored.
            event: the event.
            stale: whether a later report of the session is known to follow. Only the latest is decided on.
            at_s: when it was stored, in s since 1970, which tells the runs that are heard from and those that are idle.

        Returns:
            What is to be published, in order.

        Raises:
            InvalidFieldError: the event breaks the contract; nothing of it was taken in.
        """
        check_event(kind, event)
        if event.WhichOneof("payload") == "run_started":
            return self._start(event, at_s)
        self._now_s = max(self._now_s, at_s)
        control = self._runs.get(event.run_id)
        if control is None:
            if event.run_id not in self._refused:
                self._hold(kind, event, stale=stale)
            return []
        run = control.run
        run.heard_s = max(run.heard_s, at_s)
        if event.session_id in run.superseded:
            return contest(run, event)
        if run.session_id and event.session_id not in ("", run.session_id):
            self._hold(kind, event, stale=stale)
            return []
        return control.handle(event, stale=stale)

    def rebuild(
        self, events: Iterable[tuple[event_pb2.Kind.ValueType, event_pb2.Event]], *, at_s: float = 0.0
    ) -> Outgoing:
        """Take in what was recorded of a run before, decisions included, without deciding anything anew.

        Args:
            events: of telemetry, events, outcomes and decisions, each kind in its order. What breaks the contract is
                logged and left out, as it was when it first came.
            at_s: when the latest of them was stored, in s since 1970.

        Returns:
            What is to be published for events of the run that were held meanwhile. Those count as new, whether or not
            they are among ``events``.
        """
        # Each kind stays in its order, however the clocks of those who made the events differ.
        latest: dict[event_pb2.Kind.ValueType, int] = {}
        timed = []
        for kind, event in events:
            latest[kind] = max(latest.get(kind, 0), event.created_at.ToNanoseconds())
            timed.append((latest[kind], kind, event))
        timed.sort(key=lambda item: (item[0], _REBUILD_ORDER[item[1]]))
        run_ids = {event.run_id for _, _, event in timed}
        waiting = {run_id: self._unhold(run_id) for run_id in run_ids - self._runs.keys()}
        new = {event.event_id for held in waiting.values() for _, event, _ in held}
        ordered = [(kind, event) for _, kind, event in timed if event.event_id not in new]
        recorded: dict[str, decision_pb2.AdaptationDecision] = {}
        for _, event in ordered:
            if event.WhichOneof("payload") == "decision":
                recorded[event.decision.decision_id] = event.decision
        try:
            for kind, event in ordered:
                if kind != event_pb2.KIND_DECISIONS:
                    self._handle_again(kind, event, recorded, at_s)
        finally:
            for run_id in run_ids & self._runs.keys():
                self._runs[run_id].go_live()
                forget_contests(self._runs[run_id].run)
        outgoing: Outgoing = []
        for held in waiting.values():
            outgoing += self._release(held)
        return outgoing

    def _handle_again(
        self,
        kind: event_pb2.Kind.ValueType,
        event: event_pb2.Event,
        recorded: dict[str, decision_pb2.AdaptationDecision],
        at_s: float,
    ) -> None:
        try:
            self.handle(kind, event, at_s=at_s)
        except InvalidFieldError as error:
            log.warning("event_refused", run_id=event.run_id, field=error.field, problem=error.problem)
        if event.WhichOneof("payload") == "run_started" and event.run_id in self._runs:
            self._runs[event.run_id].recall(recorded)

    def knows(self, run_id: str) -> bool:
        """Whether a run was started, or its start refused."""
        return run_id in self._runs or run_id in self._refused

    def follows(self, run_id: str) -> bool:
        """Whether a run was started and has not ended."""
        control = self._runs.get(run_id)
        return control is not None and not control.run.ended

    @property
    def has_room(self) -> bool:
        """Whether another run would find a place."""
        return len(self._runs) < self.settings.max_runs or self._dispensable() is not None

    def _start(self, event: event_pb2.Event, at_s: float) -> Outgoing:
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
            _trim(self._refused, MAX_REFUSED)
            self._unhold(run_id)
            raise
        self._refused.pop(run_id, None)
        self._now_s = max(self._now_s, at_s)
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
            heard_s=at_s,
        )
        if before is None and not self._make_room():
            return not_followed(run, event)
        outgoing = before.finish(event.created_at) if before is not None and not before.run.ended else []
        control = RunControl(run, self.settings, self._seed, self._curve)
        self._runs.pop(run_id, None)
        self._runs[run_id] = control
        self._curves.pop(run_id, None)
        log.info("run_started", run_id=run_id, policy=policy.facts.name, layers=len(started.graph.layers))
        return outgoing + self._release(self._unhold(run_id))

    def _hold(self, kind: event_pb2.Kind.ValueType, event: event_pb2.Event, *, stale: bool) -> None:
        held = self._held.setdefault(event.run_id, [])
        held.append((kind, event, stale))
        self._held_count += 1
        while len(held) > MAX_HELD_EVENTS:
            del held[0]
            self._held_count -= 1
        while self._held_count > MAX_HELD:
            self._unhold(next(iter(self._held)))

    def _unhold(self, run_id: str) -> list[_Held]:
        """Hold the events of a run no longer. Returns them."""
        held = self._held.pop(run_id, [])
        self._held_count -= len(held)
        return held

    def _release(self, held: list[_Held]) -> Outgoing:
        """Take in the events of one run that were held."""
        outgoing: Outgoing = []
        overtaken = stale_reports([event for _, event, _ in held])
        for (kind, event, stale), is_overtaken in zip(held, overtaken, strict=True):
            try:
                outgoing += self.handle(kind, event, stale=stale or is_overtaken, at_s=self._now_s)
            except InvalidFieldError as error:
                log.warning("event_refused", run_id=event.run_id, field=error.field, problem=error.problem)
        return outgoing

    def _curve(self, run_id: str) -> LossCurve | None:
        control = self._runs.get(run_id)
        return control.run.curve if control is not None else self._curves.get(run_id)

    def _make_room(self) -> bool:
        """Find a place for another run, letting go of one that is over or idle. Returns whether there is one."""
        if len(self._runs) < self.settings.max_runs:
            return True
        if (run_id := self._dispensable()) is None:
            return False
        gone = self._runs.pop(run_id).run
        if len(gone.curve):
            self._curves[run_id] = gone.curve
            _trim(self._curves, MAX_CURVES)
        if not gone.ended:
            log.warning("run_evicted", run_id=run_id, step=gone.step, max_runs=self.settings.max_runs)
        return True

    def _dispensable(self) -> str | None:
        """The run that makes room: the first that has ended, else the one that has been idle for longest."""
        for run_id, control in self._runs.items():
            if control.run.ended:
                return run_id
        heard_s, run_id = min((control.run.heard_s, run_id) for run_id, control in self._runs.items())
        return run_id if heard_s < self._now_s - self.settings.idle_run_s else None

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
