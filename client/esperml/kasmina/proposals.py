"""What Tamiyo decided in a run that it may not act in by itself, as the session has heard of it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from esperml.v1 import decision_pb2

_REMEMBERED: Final = 1000

_FATES: Final = {
    decision_pb2.DISPOSITION_SUPPRESSED: "held back",
    decision_pb2.DISPOSITION_SHADOWED: "recorded only",
    decision_pb2.DISPOSITION_PENDING: "waits for approval",
    decision_pb2.DISPOSITION_VETOED: "vetoed",
    decision_pb2.DISPOSITION_SENT: "approved",
}


@dataclass(frozen=True, slots=True)
class Proposal:
    """One decision to do something.

    Attributes:
        decision_id: by which it is approved or vetoed.
        step: of the state that it was decided on.
        reason: what would be done and why.
        fate: what became of it.
        pending: whether it still waits for approval.
    """

    decision_id: str
    step: int
    reason: str
    fate: str
    pending: bool


class Proposals:
    """Remembers what was proposed, the last thousand of it."""

    def __init__(self) -> None:
        self._abandoned = False
        self._latest: OrderedDict[str, decision_pb2.AdaptationDecision] = OrderedDict()

    def take(self, decision: decision_pb2.AdaptationDecision) -> None:
        """Note a decision, or what has become of one since."""
        self._latest[decision.decision_id] = decision
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)

    def approve(self, decision_id: str) -> None:
        """Note that a decision was sent as a command; nothing where it never was a proposal."""
        if decision_id in self._latest:
            self._latest[decision_id].disposition = decision_pb2.DISPOSITION_SENT

    def abandon(self) -> None:
        """Note that another session has taken over: what still waits can be approved no more."""
        self._abandoned = True

    def at(self, step: int) -> tuple[Proposal, ...]:
        """The proposals and how they stand at ``step``, oldest first."""
        return tuple(_proposal(decision, step, self._abandoned) for decision in self._latest.values())


def _proposal(decision: decision_pb2.AdaptationDecision, step: int, is_abandoned: bool) -> Proposal:
    fate = _FATES.get(decision.disposition, "not known")
    pending = decision.disposition == decision_pb2.DISPOSITION_PENDING
    last = decision.expires_after_step
    if pending and last:
        pending = step <= last
        fate = f"{fate} until step {last}" if pending else f"expired after step {last}"
    if pending and is_abandoned:
        pending, fate = False, "another session took over before it was approved"
    return Proposal(decision.decision_id, decision.step, decision.reason, fate, pending)
