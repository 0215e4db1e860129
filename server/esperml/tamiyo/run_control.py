"""The control of one run: its events in; decisions, commands and experience out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from esperml.contract import InvalidFieldError
from esperml.settings import TamiyoSettings
from esperml.tamiyo import lifecycle, rules, validate
from esperml.tamiyo.engine import Options, decide
from esperml.tamiyo.experience import OpenExperience
from esperml.tamiyo.rewards import LossCurve, paired_reward
from esperml.tamiyo.run_state import MAX_AHEAD, Flight, Outgoing, RunState
from esperml.tamiyo.sessions import stale_reports
from esperml.tamiyo.telling import tell
from esperml.tamiyo.view import StateView
from esperml.v1 import decision_pb2, event_pb2, experience_pb2, graph_pb2, health_pb2, run_pb2, runs_pb2

LIFECYCLE: Final = "lifecycle"
"""Name that stands for a policy in the decisions that settle seeds."""

LIFECYCLE_VERSION: Final = "1"

log = structlog.get_logger(__name__)


class RunControl:
    """Takes in the events of one run.

    Args:
        run: what is remembered of it.
        settings: how to decide.
        seed: of all draws.
        curve_of: held-out curve of another run; ``None`` where it is not known.
    """

    def __init__(
        self, run: RunState, settings: TamiyoSettings, seed: int, curve_of: Callable[[str], LossCurve | None]
    ) -> None:
        self.run = run
        self._settings = settings
        self._seed = seed
        self._curve_of = curve_of
        self._recorded: Mapping[str, decision_pb2.AdaptationDecision] = {}
        self._replaying = False

    def recall(self, recorded: Mapping[str, decision_pb2.AdaptationDecision]) -> None:
        """Replay: take decisions from a record, by id, and none that is not in it.

        Args:
            recorded: decisions of this run that are on the bus already.
        """
        self._recorded = recorded
        self._replaying = True

    def go_live(self) -> None:
        """Decide again. What is recorded still stands: a report that comes once more is not decided on anew."""
        self._replaying = False

    def handle(self, event: event_pb2.Event, *, stale: bool = False) -> Outgoing:
        """Take in one event; a duplicate changes nothing.

        Args:
            event: the event.
            stale: whether a later report is known to follow. No decision is taken on this one, unless it is on record.

        Returns:
            What is to be published, in order.

        Raises:
            InvalidFieldError: the event breaks the contract; nothing of it was taken in.
        """
        self._check(event)
        if not self.run.is_new(event.event_id):
            return []
        self.run.cause = event.traceparent
        match event.WhichOneof("payload"):
            case "health_report":
                return self._report(event, stale=stale)
            case "structure_changed":
                return self._restructure(event.structure_changed)
            case "epoch_completed":
                self._note_loss(event.epoch_completed.step, event.epoch_completed.run)
            case "applied":
                self._answered(event.applied)
            case "effect":
                self._measured(event.effect)
            case "run_ended":
                return self._end(event)
        return []

    def _check(self, event: event_pb2.Event) -> None:
        graph = self.run.analyzer.graph
        match event.WhichOneof("payload"):
            case "health_report":
                validate.check_report(event.health_report, graph)
            case "structure_changed":
                validate.check_graph(event.structure_changed.graph, "event.structure_changed.graph")
            case "epoch_completed":
                validate.check_run(event.epoch_completed.run, "event.epoch_completed.run")
            case "run_ended":
                validate.check_run(event.run_ended.run, "event.run_ended.run")
            case "effect" if not math.isfinite(event.effect.loss_reduction):
                raise InvalidFieldError("event.effect.loss_reduction", f"is {event.effect.loss_reduction}")

    # What the host says.

    def _report(self, event: event_pb2.Event, *, stale: bool) -> Outgoing:
        run, report = self.run, event.health_report
        self._note_loss(report.step, report.run)
        if run.ended:
            return []
        if report.structure_version > run.analyzer.graph.structure_version:
            # Telemetry and structure travel on logs of their own: this one overtook the structure it was measured on.
            run.ahead = [*run.ahead, event][-MAX_AHEAD:]
            return []
        if report.step <= run.step:
            log.debug("report_late", run_id=run.run_id, step=report.step, latest=run.step)
            return []
        run.analyzer.observe(report)
        run.step = report.step
        run.reported_at = event.created_at
        run.release_stale()
        if run.status == runs_pb2.RUN_STATUS_PAUSED:
            return []
        at = event.created_at
        return [*self._settle_seeds(at, stale=stale), *self._decide(at, stale=stale)]

    def _restructure(self, changed: run_pb2.StructureChanged) -> Outgoing:
        run = self.run
        if changed.graph.structure_version <= run.analyzer.graph.structure_version:
            return []
        run.analyzer.restructure(changed.graph)
        waiting, run.ahead = run.ahead, []
        outgoing: Outgoing = []
        for event, stale in zip(waiting, stale_reports(waiting), strict=True):
            try:
                self._check(event)
            except InvalidFieldError as error:
                log.warning("report_refused", run_id=run.run_id, field=error.field, problem=error.problem)
                continue
            run.cause = event.traceparent
            outgoing += self._report(event, stale=stale)
        return outgoing

    def _note_loss(self, step: int, measures: health_pb2.RunMeasures) -> None:
        if measures.HasField("held_out_loss"):
            self.run.curve.add(step, measures.held_out_loss)

    def _answered(self, applied: decision_pb2.Applied) -> None:
        run = self.run
        decision = run.decisions.get(applied.decision_id)
        if decision is None:
            log.warning("outcome_unknown", run_id=run.run_id, decision_id=applied.decision_id)
            return
        flight = run.in_flight.pop(applied.decision_id, None)
        run.settling.pop(decision.target.seed_id, None)
        names = (decision.target.source_layer, decision.target.target_layer)
        verb = decision.action.WhichOneof("kind") or "none"
        rest = run.limits.embargo_steps
        if applied.status == decision_pb2.COMMAND_STATUS_UNDONE:
            # It was carried out, and what came of it is experience; the place rests as after a cull.
            if verb == "germinate":
                run.embargo[names] = applied.step + rest
            return
        if run.open_experience and run.open_experience.decision.decision_id == applied.decision_id:
            run.open_experience.applied = applied
        if applied.status != decision_pb2.COMMAND_STATUS_APPLIED:
            run.refused += 1
            if verb == "germinate" and applied.status == decision_pb2.COMMAND_STATUS_REFUSED:
                run.embargo[names] = applied.step + rest
            return
        run.applied += 1
        if flight is not None and run.step < applied.step:
            flight.applied_at = applied.step
            run.in_flight[applied.decision_id] = flight
        if verb == "cull":
            run.embargo[names] = applied.step + rest
        place = run.place_index().get(names)
        if place is not None:
            run.analyzer.record(
                graph_pb2.AdaptationRecord(
                    decision_id=applied.decision_id,
                    step=applied.step,
                    place=place,
                    action=verb,
                    blueprint=self._blueprint(decision),
                    parameters_added=applied.parameters_added,
                )
            )

    def _measured(self, effect: decision_pb2.Effect) -> None:
        self.run.analyzer.record_effect(effect.decision_id, effect.loss_reduction)

    def _blueprint(self, decision: decision_pb2.AdaptationDecision) -> str:
        if decision.action.WhichOneof("kind") == "germinate":
            return decision.action.germinate.blueprint
        blueprints = {seed.seed_id: seed.blueprint for seed in self.run.analyzer.seeds}
        return blueprints.get(decision.target.seed_id, "")

    def _end(self, event: event_pb2.Event) -> Outgoing:
        run, ended = self.run, event.run_ended
        self._note_loss(ended.step, ended.run)
        run.step = max(run.step, ended.step)
        outgoing = self.finish(event.created_at)
        failed = ended.end == run_pb2.RUN_END_FAILED
        run.status = runs_pb2.RUN_STATUS_FAILED if failed else runs_pb2.RUN_STATUS_COMPLETED
        run.pending.clear()
        run.in_flight.clear()
        run.ahead.clear()
        return outgoing

    def finish(self, at: Timestamp) -> Outgoing:
        """Close the last experience: nothing more is to come."""
        return self._close(self.run.state(), at, done=True)

    # What Tamiyo makes of it.

    def _settle_seeds(self, at: Timestamp, *, stale: bool) -> Outgoing:
        run = self.run
        outgoing: Outgoing = []
        for seed in run.analyzer.seeds:
            asked = run.settling.get(seed.seed_id)
            if asked is not None and run.step < asked + max(1, run.limits.decision_interval_steps):
                continue
            settlement = lifecycle.settle(seed, run.analyzer.run_measures, run.limits, self._settings.cull_below)
            if settlement is None:
                continue
            decision = self._settlement(settlement)
            if not self._is_open(decision.decision_id, stale=stale):
                continue
            recorded = self._as_recorded(decision)
            if recorded is not None:
                run.settling[seed.seed_id] = run.step
                outgoing += self._issue(recorded, at)
        return outgoing

    def _settlement(self, settlement: lifecycle.Settlement) -> decision_pb2.AdaptationDecision:
        run, seed = self.run, settlement.seed
        source, target = run.analyzer.place_names(seed.place)
        decision = decision_pb2.AdaptationDecision(
            decision_id=run.new_id(run.step, f"settle/{seed.seed_id}"),
            run_id=run.run_id,
            step=run.step,
            structure_version=run.analyzer.graph.structure_version,
            policy=LIFECYCLE,
            policy_version=LIFECYCLE_VERSION,
            target=decision_pb2.Target(source_layer=source, target_layer=target, seed_id=seed.seed_id),
            action=settlement.action,
            reason=settlement.reason,
            mode=run.mode,
        )
        self._set_expiry(decision)
        return decision

    def _set_expiry(self, decision: decision_pb2.AdaptationDecision) -> None:
        if self._settings.command_ttl_steps:
            decision.expires_after_step = decision.step + self._settings.command_ttl_steps

    def _is_due(self) -> bool:
        run = self.run
        if run.step < run.limits.warmup_steps:
            return False
        last = run.last_decision_step
        return last is None or run.step >= last + run.limits.decision_interval_steps

    def _is_open(self, decision_id: str, *, stale: bool) -> bool:
        """Whether a decision can be taken now.

        After a backlog the host is long past a stale report, and would be sent at once what was meant for one step
        after the other. What is on record was decided then and still stands.
        """
        return not stale or decision_id in self._recorded

    def _decide(self, at: Timestamp, *, stale: bool) -> Outgoing:
        run = self.run
        if not self._is_due():
            return []
        options = Options(
            sample=self._settings.sample,
            confidence_threshold=self._settings.confidence_threshold,
            mode=run.mode,
            ttl_steps=self._settings.command_ttl_steps,
        )
        decision_id = run.new_id(run.step, "policy")
        if not self._is_open(decision_id, stale=stale):
            return []
        verdict = decide(self._situation(), run.policy, options, decision_id, self._generator(run.step))
        decision = self._as_recorded(verdict.decision)
        if decision is None:
            return []
        run.last_decision_step = run.step
        outgoing = self._close(verdict.state, at, done=False)
        run.open_experience = OpenExperience(run.experiences, verdict.state, decision)
        run.experiences += 1
        return outgoing + self._issue(decision, at)

    def _as_recorded(self, decision: decision_pb2.AdaptationDecision) -> decision_pb2.AdaptationDecision | None:
        return self._recorded.get(decision.decision_id, None if self._replaying else decision)

    def _situation(self) -> rules.Situation:
        run = self.run
        places = run.place_index()
        return rules.Situation(
            view=StateView(run.state()),
            vocabulary=run.policy.facts.vocabulary,
            health_threshold=self._settings.health_threshold,
            embargo={places[names]: until for names, until in run.embargo.items() if names in places},
            waiting=frozenset(places[flight.names] for flight in run.in_flight.values() if flight.names in places),
            reserved=sum(flight.budget for flight in run.in_flight.values()),
        )

    def _generator(self, step: int) -> np.random.Generator:
        """A generator that depends on the seed, the run and the step alone, however often the run is rebuilt."""
        digest = hashlib.sha256(self.run.run_id.encode()).digest()[:8]
        return np.random.default_rng([self._seed, int.from_bytes(digest, "big"), step])

    def _close(self, state: graph_pb2.ModelGraphState, at: Timestamp, *, done: bool) -> Outgoing:
        run, opened = self.run, self.run.open_experience
        if opened is None:
            return []
        run.open_experience = None
        experience = opened.close(state, self._reward(opened), step=run.step, done=done)
        event = run.event(f"{opened.decision.decision_id}/experience", at)
        event.experience.CopyFrom(experience)
        return [(event_pb2.KIND_EXPERIENCE, event)]

    def _reward(self, opened: OpenExperience) -> experience_pb2.Reward | None:
        run = self.run
        twin = self._curve_of(run.started.paired_run) if run.started.paired_run else None
        if twin is None:
            return None
        added = 0
        if opened.applied is not None and opened.applied.status == decision_pb2.COMMAND_STATUS_APPLIED:
            added = opened.applied.parameters_added
        growth = added / run.host_parameters
        return paired_reward(run.curve, twin, opened.decision.step, run.step, growth, self._settings.parameter_price)

    # What goes out.

    def _issue(self, decision: decision_pb2.AdaptationDecision, at: Timestamp) -> Outgoing:
        run = self.run
        if not decision.disposition:
            decision.disposition = _DISPOSITIONS[decision.mode]
        run.remember(decision)
        if decision.disposition != decision_pb2.DISPOSITION_NONE:
            run.taken += 1
        if decision.disposition == decision_pb2.DISPOSITION_PENDING:
            run.pending.append(decision.decision_id)
        waits = decision.disposition in (decision_pb2.DISPOSITION_PENDING, decision_pb2.DISPOSITION_SENT)
        if waits and decision.action.WhichOneof("kind") == "germinate":
            names = (decision.target.source_layer, decision.target.target_layer)
            run.in_flight[decision.decision_id] = Flight(names, decision.action.germinate.parameter_budget)
        return tell(self.run, decision, at)

    # What a person says.

    def approve(self, decision_id: str, at: Timestamp) -> Outgoing:
        """Send a pending decision. Raises :class:`NotPendingError` where it does not wait (any more)."""
        decision = self.run.take_pending(decision_id)
        decision.disposition = decision_pb2.DISPOSITION_SENT
        return tell(self.run, decision, at)

    def veto(self, decision_id: str, reason: str, at: Timestamp) -> Outgoing:
        """Refuse a pending decision. Raises :class:`NotPendingError` where it does not wait (any more)."""
        decision = self.run.take_pending(decision_id)
        decision.disposition = decision_pb2.DISPOSITION_VETOED
        if reason:
            decision.reason = f"{decision.reason} Vetoed: {reason}"
        self.run.in_flight.pop(decision_id, None)
        return tell(self.run, decision, at)


_DISPOSITIONS: Final = {
    decision_pb2.MODE_OBSERVE: decision_pb2.DISPOSITION_SHADOWED,
    decision_pb2.MODE_ADVISE: decision_pb2.DISPOSITION_PENDING,
    decision_pb2.MODE_ACT: decision_pb2.DISPOSITION_SENT,
}
