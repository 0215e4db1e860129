"""What the controller remembers of one run."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from esperml.settings import TamiyoSettings
from esperml.tamiyo import limits
from esperml.tamiyo.analyzer import Analyzer
from esperml.tamiyo.experience import OpenExperience
from esperml.tamiyo.policies import Policy
from esperml.tamiyo.rewards import LossCurve
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, run_pb2, runs_pb2

MAX_SEEN: Final = 4096
"""Event ids that are remembered to know a duplicate by: far more than a bus delivers twice."""

MAX_AHEAD: Final = 64
"""Reports that wait for the structure that they were measured on."""

MAX_DECISIONS: Final = 1024
"""Decisions that an outcome can still be matched with."""

_NAMESPACE: Final = uuid.UUID("6f1c4d0e-5a6b-5c57-9a55-7d1f0f2b6a11")


Outgoing = list[tuple[event_pb2.Kind.ValueType, event_pb2.Event]]
"""Events to publish, each with its kind, in order."""


class NotPendingError(ValueError):
    """A decision does not wait for approval, or not any more.

    Attributes:
        decision_id: the decision that was asked for.
    """

    def __init__(self, decision_id: str, why: str) -> None:
        super().__init__(f"decision {decision_id!r} is not pending: {why}")
        self.decision_id = decision_id


@dataclass(slots=True)
class Flight:
    """A germination that the host was asked for, or may be.

    Attributes:
        names: source and target layer of its place.
        budget: parameters that it may take.
        applied_at: step at which the host applied it; ``None`` before it answered.
    """

    names: tuple[str, str]
    budget: int
    applied_at: int | None = None


@dataclass
class RunState:
    """One run.

    Attributes:
        run_id: its name.
        origin: id of the event that started it; decision ids derive from it.
        session_id: session that started it; empty where it did not say.
        superseded: earlier sessions of the run, and whether they were found still reporting.
        started: what it said of itself at the start.
        policy: who decides.
        analyzer: its host.
        settings: the server's.
        started_at: when it started, by its own clock.
        heard_s: when the latest event of it was stored, in s since 1970.
        reported_at: when it last reported.
        status: where it is.
        step: last step reported.
        last_decision_step: step of the last policy decision; ``None`` before the first.
        curve: its held-out losses.
        decisions: decisions by id, latest last.
        pending: ids of those that wait for approval, oldest first.
        in_flight: germinations by decision id, until a report shows the seed or there will be none.
        embargo: places that must rest, by the names of their layers, and until which step.
        settling: seeds for which a settlement was sent or proposed, and at which step.
        open_experience: the last policy decision.
        experiences: number of policy decisions.
        taken: decisions other than "none".
        applied: commands that the host applied.
        refused: commands that the host refused.
        ahead: reports that wait for their structure.
        cause: trace context of the event that is being handled; empty where it has none.
        causes: trace context of what caused each decision, by its id.
    """

    run_id: str
    origin: str
    started: run_pb2.RunStarted
    policy: Policy
    analyzer: Analyzer
    settings: TamiyoSettings
    started_at: Timestamp
    session_id: str = ""
    superseded: dict[str, bool] = field(default_factory=dict)
    heard_s: float = 0.0
    reported_at: Timestamp | None = None
    status: runs_pb2.RunStatus.ValueType = runs_pb2.RUN_STATUS_RUNNING
    step: int = 0
    last_decision_step: int | None = None
    curve: LossCurve = field(default_factory=LossCurve)
    decisions: OrderedDict[str, decision_pb2.AdaptationDecision] = field(default_factory=OrderedDict)
    pending: list[str] = field(default_factory=list)
    in_flight: dict[str, Flight] = field(default_factory=dict)
    embargo: dict[tuple[str, str], int] = field(default_factory=dict)
    settling: dict[str, int] = field(default_factory=dict)
    open_experience: OpenExperience | None = None
    experiences: int = 0
    taken: int = 0
    applied: int = 0
    refused: int = 0
    ahead: list[event_pb2.Event] = field(default_factory=list)
    cause: str = ""
    causes: dict[str, str] = field(default_factory=dict)
    _seen: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.status in (runs_pb2.RUN_STATUS_COMPLETED, runs_pb2.RUN_STATUS_FAILED)

    @property
    def mode(self) -> decision_pb2.Mode.ValueType:
        """How far Tamiyo may go; not stated means observe."""
        return self.started.mode or decision_pb2.MODE_OBSERVE

    @property
    def host_parameters(self) -> int:
        """Parameters of the host before anything grew, at least 1."""
        stated = self.started.parameters
        return stated or max(1, sum(layer.parameters for layer in self.started.graph.layers))

    @property
    def limits(self) -> graph_pb2.RunLimits:
        """What the run allows, defaults filled in."""
        return limits.resolve(self.started.limits, self.settings, self.host_parameters)

    def is_new(self, event_id: str) -> bool:
        """Whether an event was not seen before; it counts as seen from now on."""
        if event_id in self._seen:
            return False
        self._seen[event_id] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return True

    def new_id(self, step: int, what: str) -> str:
        """The id of what is made of this run at a step: the same whenever the same report is handled again."""
        return uuid.uuid5(_NAMESPACE, f"{self.origin}/{self.run_id}/{step}/{what}").hex

    def event(self, what: str, at: Timestamp, decision_id: str = "") -> event_pb2.Event:
        """An event for this run's session, whose payload is still to come; the same ``what`` gives the same id.

        It carries the trace context of what caused the decision that it is about, or of what is being handled.
        """
        return event_pb2.Event(
            event_id=self.new_id(0, what),
            run_id=self.run_id,
            traceparent=self.causes.get(decision_id, self.cause) if decision_id else self.cause,
            created_at=at,
            session_id=self.session_id,
        )

    def state(self) -> graph_pb2.ModelGraphState:
        """Its state now, without a mask."""
        return self.analyzer.state(self.limits)

    def remember(self, decision: decision_pb2.AdaptationDecision) -> None:
        """Keep a decision, so that its outcome can be matched with it."""
        self.decisions[decision.decision_id] = decision
        self.causes[decision.decision_id] = self.cause
        while len(self.decisions) > MAX_DECISIONS:
            oldest, _ = self.decisions.popitem(last=False)
            self.causes.pop(oldest, None)
            self.in_flight.pop(oldest, None)
            if oldest in self.pending:
                self.pending.remove(oldest)

    def place_index(self) -> dict[tuple[str, str], int]:
        """Index of each place by the names of its source and target layers."""
        return {self.analyzer.place_names(place): place for place in range(len(self.analyzer.graph.places.sources))}

    def release_stale(self) -> None:
        """Stop waiting for what this report shows, and for answers to what has expired.

        A report that was measured after a seed was planted lists it; one that was measured before, but comes later
        than the answer, does not.
        """
        for decision_id, flight in list(self.in_flight.items()):
            shown = flight.applied_at is not None and self.step >= flight.applied_at
            if shown or self.is_expired(self.decisions[decision_id]):
                del self.in_flight[decision_id]
        self.pending = [name for name in self.pending if not self.is_expired(self.decisions[name])]

    def is_expired(self, decision: decision_pb2.AdaptationDecision) -> bool:
        """Whether a decision must not be applied any more."""
        return bool(decision.expires_after_step) and self.step > decision.expires_after_step

    def take_pending(self, decision_id: str) -> decision_pb2.AdaptationDecision:
        """A decision that waits for approval, which it then does no more. Raises :class:`NotPendingError`."""
        decision = self.decisions.get(decision_id)
        if decision is None:
            raise NotPendingError(decision_id, "the run has no such decision")
        if decision_id not in self.pending:
            state = decision_pb2.Disposition.Name(decision.disposition).removeprefix("DISPOSITION_").lower()
            raise NotPendingError(decision_id, "it expired" if self.is_expired(decision) else f"it is {state}")
        self.pending.remove(decision_id)
        return decision

    def summary(self) -> runs_pb2.Run:
        """The run in short."""
        return runs_pb2.Run(
            run_id=self.run_id,
            status=self.status,
            mode=self.mode,
            policy=self.policy.facts.name,
            step=self.step,
            measures=self.analyzer.run_measures,
            decisions=self.taken,
            applied=self.applied,
            refused=self.refused,
            started_at=self.started_at,
            reported_at=self.reported_at,
            labels=self.started.labels,
        )
