"""What the controller has done, as figures for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from esperml.contract import kind_name
from esperml.v1 import decision_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from esperml.contract import KindValue
    from esperml.tamiyo.controller import Outgoing

_BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)


class Work:
    """Counts events, and the decisions that came of them with the time they took."""

    def __init__(self) -> None:
        self._events = Counter("tamiyo_events", "Events handled.", ["kind"], registry=None)
        self._decisions = Counter(
            "tamiyo_decisions", "Decisions, by what became of them first.", ["action", "disposition"], registry=None
        )
        self._decision_s = Histogram(
            "tamiyo_decision_seconds",
            "Time to handle an event that led to a decision.",
            buckets=_BOUNDS_S,
            registry=None,
        )

    def handled(self, kind: KindValue, outgoing: Outgoing, took_s: float) -> None:
        """Count an event of ``kind`` that was handled in ``took_s`` and led to ``outgoing``."""
        self._events.labels(kind_name(kind)).inc()
        if self.decided(outgoing):
            self._decision_s.observe(took_s)

    def decided(self, outgoing: Outgoing) -> bool:
        """Count the decisions in ``outgoing``. Returns whether there are any."""
        decisions = [event.decision for _, event in outgoing if event.HasField("decision")]
        for decision in decisions:
            disposition = decision_pb2.Disposition.Name(decision.disposition).removeprefix("DISPOSITION_").lower()
            self._decisions.labels(decision.action.WhichOneof("kind") or "none", disposition).inc()
        return bool(decisions)

    def metrics(self) -> Iterator[Metric]:
        """The figures as they are now."""
        for collector in (self._events, self._decisions, self._decision_s):
            yield from collector.collect()
