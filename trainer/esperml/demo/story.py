"""What happened in the demo: twins, and what the bus said about them. Plain data, from which all output is made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Literal

from esperml.tamiyo.run_control import LIFECYCLE
from esperml.trainer.arena.hosts import HostSpec
from esperml.trainer.arena.twins import TwinResult
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, health_pb2

Role = Literal["static", "adapted", "random"]

ROLES: Final[tuple[Role, ...]] = ("static", "adapted", "random")

TITLES: Final[dict[Role, str]] = {"static": "left alone", "adapted": "under Tamiyo", "random": "masked chance"}


@dataclass(slots=True)
class RunStory:
    """What the bus said about one run.

    Attributes:
        graphs: its structures, oldest first.
        reports: what it reported, oldest first.
        states: states that were decided on, and the last one, oldest first. Their health is Tamiyo's.
        decisions: all of them, oldest first.
        applied: what the host did with those that were sent, by decision.
        effects: what they were measured to do, by decision.
        rewards: what they were worth, by decision.
        ended: True once the session said that the run ended.
        finished: True once its last experience was seen.
    """

    graphs: list[graph_pb2.HostGraph] = field(default_factory=list)
    reports: list[health_pb2.HealthReport] = field(default_factory=list)
    states: list[graph_pb2.ModelGraphState] = field(default_factory=list)
    decisions: list[decision_pb2.AdaptationDecision] = field(default_factory=list)
    applied: dict[str, decision_pb2.Applied] = field(default_factory=dict)
    effects: dict[str, decision_pb2.Effect] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    ended: bool = False
    finished: bool = False

    def take(self, event: event_pb2.Event) -> None:
        """Remember what ``event`` says."""
        match event.WhichOneof("payload"):
            case "run_started":
                self.graphs.append(event.run_started.graph)
            case "structure_changed":
                self.graphs.append(event.structure_changed.graph)
            case "health_report":
                self.reports.append(event.health_report)
            case "decision":
                self.decisions.append(event.decision)
            case "applied":
                self.applied[event.applied.decision_id] = event.applied
            case "effect":
                self.effects[event.effect.decision_id] = event.effect
            case "experience":
                experience = event.experience
                self.states.append(experience.state)
                if experience.HasField("reward"):
                    self.rewards[experience.decision.decision_id] = experience.reward.total
                if experience.done:
                    self.states.append(experience.next_state)
                    self.finished = True
            case "run_ended":
                self.ended = True
            case _:
                pass

    @property
    def actions(self) -> list[decision_pb2.AdaptationDecision]:
        """Decisions to do something, oldest first, those that were held back included."""
        return [decision for decision in self.decisions if decision.action.WhichOneof("kind") not in (None, "none")]

    @property
    def decided_at(self) -> int:
        """Step on which the policy last decided, doing nothing included; 0 before the first."""
        return next((decision.step for decision in reversed(self.decisions) if decision.policy != LIFECYCLE), 0)

    def counts(self) -> Counter[str]:
        """How many decisions were ``sent``, ``applied`` and ``refused`` (expired ones included)."""
        counts: Counter[str] = Counter(sent=0, applied=0, refused=0)
        for decision in self.decisions:
            counts["sent"] += decision.disposition == decision_pb2.DISPOSITION_SENT
        for applied in self.applied.values():
            counts["applied" if applied.status == decision_pb2.COMMAND_STATUS_APPLIED else "refused"] += 1
        return counts

    def overhead(self) -> float | None:
        """Mean share of the time that was Esper's own, 0 to 1, over all reports. None where none said."""
        shares = [report.run.overhead for report in self.reports if report.run.HasField("overhead")]
        return sum(shares) / len(shares) if shares else None


@dataclass(slots=True)
class HostStory:
    """One host's three twins.

    Attributes:
        name: of the host.
        spec: the host.
        twins: how each was trained and scored.
        runs: what the bus said of each.
    """

    name: str
    spec: HostSpec
    twins: dict[Role, TwinResult] = field(default_factory=dict)
    runs: dict[Role, RunStory] = field(default_factory=dict)


@dataclass(slots=True)
class DemoStory:
    """The whole demo.

    Attributes:
        repeats: the hosts of each repeat, in order.
        seeds: the seed of each repeat.
        server_lost: where the server was found dead, in words. Empty where it lived.
        seconds: that it took.
    """

    repeats: list[list[HostStory]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    server_lost: str = ""
    seconds: float = 0.0

    @property
    def hosts(self) -> list[HostStory]:
        """Those of the first repeat, which the report shows in full."""
        return self.repeats[0] if self.repeats else []
