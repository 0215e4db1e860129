"""What the tests of the spool share: events that tell themselves apart, and what is on the disk and on the bus."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from esperml.client import OonaClient, new_event
from esperml.client.errors import TruncatedRecordingError
from esperml.client.recording import read
from esperml.kasmina.outbox import Entry
from esperml.kasmina.spool import Begun
from esperml.v1 import event_pb2, oona_pb2, run_pb2

EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
EVENTS, OUTCOMES, TELEMETRY = event_pb2.KIND_EVENTS, event_pb2.KIND_OUTCOMES, event_pb2.KIND_TELEMETRY
_times = itertools.count(1)


def ended(step: int, run: str = "r") -> event_pb2.Event:
    return new_event(run, run_ended=run_pb2.RunEnded(step=step))


def entry(kind, event: event_pb2.Event) -> Entry:
    return Entry(next(_times), kind, event)


def entries(*steps: int) -> list[Entry]:
    return [entry(EVENTS, ended(step)) for step in steps]


def begun(target: str = "t", *, client_id: str = "session-1", first: int = 1, under_way: int = 0) -> Begun:
    return Begun(target, "r", client_id, first, under_way)


def steps_in(path: Path) -> list[int]:
    steps = []
    with contextlib.suppress(TruncatedRecordingError):
        for recorded in read(path):
            steps.append(recorded.event.run_ended.step)  # noqa: PERF401 - what came before the end counts
    return steps


async def stored(bus, kind=EVENTS) -> list[event_pb2.Event]:
    async with OonaClient(bus.target, client_id="reader") as oona:
        end = (await oona.describe(kind)).topic.next_offset
        if end == 0:
            return []
        async with oona.subscribe(kind, start=EARLIEST, end_offset=end) as subscription:
            return [record.event async for record in subscription]


async def stored_steps(bus) -> list[int]:
    return [event.run_ended.step for event in await stored(bus)]
