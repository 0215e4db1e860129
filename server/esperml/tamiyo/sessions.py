"""Sessions of a run: which of their reports are stale, and what happens where two go under one name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from esperml.tamiyo.run_state import Outgoing, RunState
from esperml.v1 import event_pb2, run_pb2

MAX_SUPERSEDED: Final = 64
"""Earlier sessions of a run that are remembered."""

log = structlog.get_logger(__name__)


def stale_reports(events: Sequence[event_pb2.Event]) -> list[bool]:
    """Which of ``events`` are reports that a later one of the same session follows.

    Args:
        events: of any runs, in the order in which they will be handled.
    """
    later: set[tuple[str, str]] = set()
    stale = [False] * len(events)
    for index in range(len(events) - 1, -1, -1):
        event = events[index]
        if event.HasField("health_report"):
            session = (event.run_id, event.session_id)
            stale[index] = session in later
            later.add(session)
    return stale


def superseded_by(session_id: str, before: RunState | None) -> dict[str, bool]:
    """The sessions that a new one supersedes, latest last, and which of them were found still reporting.

    Args:
        session_id: the new session.
        before: the run as it was until now; ``None`` where it is new.
    """
    if before is None:
        return {}
    superseded = dict(before.superseded)
    if before.session_id not in ("", session_id):
        superseded[before.session_id] = False
    return dict(list(superseded.items())[-MAX_SUPERSEDED:])


def contest(run: RunState, event: event_pb2.Event) -> Outgoing:
    """Leave out what a superseded session says, and tell both, once, where it is found to be still at work.

    What it said before the present session began, and that it ends, is no sign of that.

    Args:
        run: the run; ``event.session_id`` is one that it has superseded.
        event: what the superseded session says.

    Returns:
        The notices to both sessions, or nothing.
    """
    other = event.session_id
    before = event.created_at.ToNanoseconds() <= run.started_at.ToNanoseconds()
    if before or event.HasField("run_ended") or run.superseded[other]:
        return []
    run.superseded[other] = True
    log.warning("run_contended", run_id=run.run_id, session_id=run.session_id, superseded=other)
    advice = "Give each run a name of its own."
    return [
        _notice(
            run,
            event,
            other,
            run_pb2.NOTICE_CODE_SUPERSEDED,
            f"another session began under run {run.run_id!r}, and Tamiyo follows that one now: nothing more is "
            f"reported or carried out here. {advice}",
        ),
        _notice(
            run,
            event,
            run.session_id,
            run_pb2.NOTICE_CODE_CONTENDED,
            f"an earlier session was still at work under run {run.run_id!r}; what it reports is left out since this "
            f"one began. {advice}",
        ),
    ]


def forget_contests(run: RunState) -> None:
    """Forget which sessions were found still at work: one that lives on is told the next time it is heard from.

    The record does not say who was told, and to be told twice does no harm.
    """
    run.superseded = dict.fromkeys(run.superseded, False)


def not_followed(run: RunState, start: event_pb2.Event) -> Outgoing:
    """The notice to a run that finds no place.

    Args:
        run: the run as it would have been.
        start: the event that started it.
    """
    most = run.settings.max_runs
    log.warning("run_not_followed", run_id=run.run_id, max_runs=most)
    text = (
        f"Tamiyo follows {most} runs, as many as it may at a time, and not run {run.run_id!r}: no decisions are taken "
        "until another ends or falls silent. Raise tamiyo.max_runs on the server, or end runs that need no decisions."
    )
    return [_notice(run, start, start.session_id, run_pb2.NOTICE_CODE_NOT_FOLLOWED, text)]


def _notice(
    run: RunState, cause: event_pb2.Event, session_id: str, code: run_pb2.NoticeCode.ValueType, text: str
) -> tuple[event_pb2.Kind.ValueType, event_pb2.Event]:
    event = run.event(f"notice/{code}/{cause.session_id}", cause.created_at)
    event.session_id = session_id
    event.notice.CopyFrom(run_pb2.Notice(code=code, text=text))
    return event_pb2.KIND_COMMANDS, event
