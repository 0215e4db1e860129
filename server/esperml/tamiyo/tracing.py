"""What the log says of decisions and their outcomes, each line under the trace context of what caused it.

A trace context (W3C ``traceparent``) is carried from the telemetry that led to a decision to the decision, to its
command and notice, and from there by the host to the outcome. It is passed on as it is, whether or not it is valid: the
bus is no judge of it, and what reads the log may know another form.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import structlog

from esperml.v1 import decision_pb2

if TYPE_CHECKING:
    from esperml.tamiyo.controller import Outgoing
    from esperml.v1 import event_pb2

log = structlog.get_logger(__name__)

MAX_LOGGED: Final = 128
"""Characters of a trace context that a log line takes. A valid one has 55."""


def under(event: event_pb2.Event) -> AbstractContextManager[object]:
    """While the context lasts, log lines carry the trace context of ``event``, if it has one."""
    if not event.traceparent:
        return nullcontext()
    return structlog.contextvars.bound_contextvars(traceparent=event.traceparent[:MAX_LOGGED])


def log_decisions(outgoing: Outgoing) -> None:
    """Log the decisions and commands that were put on the bus; that nothing is to be done, only for debugging."""
    for _, event in outgoing:
        with under(event):
            match event.WhichOneof("payload"):
                case "decision":
                    decision = event.decision
                    action = decision.action.WhichOneof("kind") or "none"
                    say = log.debug if action == "none" else log.info
                    say(
                        "decided",
                        run_id=event.run_id,
                        decision_id=decision.decision_id,
                        step=decision.step,
                        action=action,
                        disposition=decision_pb2.Disposition.Name(decision.disposition)
                        .removeprefix("DISPOSITION_")
                        .lower(),
                    )
                case "command":
                    log.info("command_sent", run_id=event.run_id, decision_id=event.command.decision_id)


def log_outcome(event: event_pb2.Event) -> None:
    """Log what a host said of a command, where ``event`` is that."""
    match event.WhichOneof("payload"):
        case "applied":
            applied = event.applied
            log.info(
                "outcome",
                run_id=event.run_id,
                decision_id=applied.decision_id,
                step=applied.step,
                status=decision_pb2.CommandStatus.Name(applied.status).removeprefix("COMMAND_STATUS_").lower(),
            )
        case "effect":
            effect = event.effect
            log.info(
                "effect_measured",
                run_id=event.run_id,
                decision_id=effect.decision_id,
                step=effect.step,
                loss_reduction=effect.loss_reduction,
            )
