"""Sending what earlier sessions left on disk; see :mod:`esperml.kasmina.spool`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from esperml.client.errors import (
    ClientIdConflictError,
    ForbiddenError,
    FrameTooLargeError,
    RecordingError,
    RejectedError,
    TruncatedRecordingError,
)
from esperml.client.oona import OonaClient
from esperml.client.recording import Recorded, read, read_labels
from esperml.contract import kind_name
from esperml.kasmina.outbox import FRAME_EVENTS
from esperml.kasmina.spool import SUFFIX, UNFINISHED, Begun, SpoolOptions, lock, publisher_of

if TYPE_CHECKING:
    from esperml.client.credentials import Credentials

_log = structlog.get_logger(__name__)


async def send_leftovers(options: SpoolOptions, target: str, credentials: Credentials) -> None:
    """Send what earlier sessions left for this server, oldest file first, each event once; then delete the file.

    Files that another process has locked belong to a session that lives. One that cannot be read, or whose events the
    token may not publish, stays where it is, and the log says so.

    Raises:
        OonaError: the server cannot be talked to at all.
    """
    try:
        paths = sorted(options.resolved().iterdir(), key=_changed_ns)
    except (OSError, RuntimeError):
        return  # There is no folder, or none that may be read, and so nothing in it.
    for path in paths:
        try:
            if path.suffix in (SUFFIX, UNFINISHED):
                with _claimed(path, target) as claim:
                    if claim is not None:
                        events = await _send(path, claim.begun, credentials)
                        claim.sent = True
                        _log.info("leftover_sent", path=str(path), run_id=claim.begun.run_id, events=events)
        except (OSError, RecordingError, ForbiddenError, ClientIdConflictError) as error:
            _log.warning("leftover_stays", path=str(path), error=str(error))


@dataclass(slots=True)
class _Claim:
    """A file that is locked here.

    Attributes:
        begun: what it says of itself.
        sent: whether all of it is stored, and the file is to be deleted.
    """

    begun: Begun
    sent: bool = False


@contextmanager
def _claimed(path: Path, target: str) -> Iterator[_Claim | None]:
    """Lock a file, unless it is another's, or for another server."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # Its session has sent it meanwhile.
        yield None
        return
    try:
        claim = None
        # Whoever had it before may have deleted it.
        if lock(descriptor) and path.exists():
            if path.suffix == UNFINISHED:  # Its session ended before anything in it counted.
                path.unlink()
            elif (begun := Begun.from_labels(read_labels(path))) is not None and begun.target == target:
                claim = _Claim(begun)
        yield claim
        if claim is not None and claim.sent:
            path.unlink()
    finally:
        os.close(descriptor)


async def _send(path: Path, begun: Begun, credentials: Credentials) -> int:
    """Publish what of a file is not stored yet. How many events that was."""
    events = _whole(path)
    count = 0
    under_way = list(islice(events, begun.under_way))
    if under_way:
        async with OonaClient(begun.target, client_id=begun.client_id, credentials=credentials) as oona:
            await oona.connected()
            if oona.next_sequence <= begun.first_sequence:
                count += await _publish(oona, under_way)
    async with OonaClient(begun.target, client_id=publisher_of(path.stem), credentials=credentials) as oona:
        await oona.connected()
        rest = islice(events, oona.next_sequence - 1, None)
        for _, alike in groupby(rest, key=lambda recorded: recorded.kind):
            while frame := list(islice(alike, FRAME_EVENTS)):
                count += await _publish(oona, frame)
    return count


async def _publish(oona: OonaClient, frame: list[Recorded]) -> int:
    kind = frame[0].kind
    try:
        await oona.publish(kind, [recorded.event for recorded in frame])
    except ForbiddenError:
        raise
    except (RejectedError, FrameTooLargeError) as error:
        _log.warning("events_refused", kind=kind_name(kind), events=len(frame), error=str(error))
        return 0
    return len(frame)


def _whole(path: Path) -> Iterator[Recorded]:
    """The events of a file as far as it is whole: its session may have been killed."""
    try:
        yield from read(path)
    except TruncatedRecordingError:
        return


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
