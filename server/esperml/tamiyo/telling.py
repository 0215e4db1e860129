"""What goes on the bus for a decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esperml.v1 import decision_pb2, event_pb2, run_pb2

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from esperml.tamiyo.run_state import Outgoing, RunState


def tell(run: RunState, decision: decision_pb2.AdaptationDecision, at: Timestamp) -> Outgoing:
    """The decision as it stands, and the command where it is sent, or where it may not be, the notice of it.

    Args:
        run: the run that it is about.
        decision: the decision, its disposition set.
        at: the time of what is told.
    """
    told = run.event(f"{decision.decision_id}/{decision.disposition}", at, decision.decision_id)
    told.decision.CopyFrom(decision)
    outgoing: Outgoing = [(event_pb2.KIND_DECISIONS, told)]
    if decision.disposition == decision_pb2.DISPOSITION_SENT:
        sent = run.event(f"{decision.decision_id}/command", at, decision.decision_id)
        sent.command.CopyFrom(
            decision_pb2.Command(
                decision_id=decision.decision_id,
                target=decision.target,
                action=decision.action,
                decided_at_step=decision.step,
                expires_after_step=decision.expires_after_step,
                reason=decision.reason,
            )
        )
        outgoing.append((event_pb2.KIND_COMMANDS, sent))
    elif decision.mode != decision_pb2.MODE_ACT and decision.disposition != decision_pb2.DISPOSITION_NONE:
        what = f"{decision.decision_id}/{decision.disposition}/notice"
        proposed = run.event(what, at, decision.decision_id)
        proposed.notice.CopyFrom(
            run_pb2.Notice(code=run_pb2.NOTICE_CODE_PROPOSED, text=decision.reason, decision=decision)
        )
        outgoing.append((event_pb2.KIND_COMMANDS, proposed))
    return outgoing
