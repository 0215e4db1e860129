"""Fills a log in a process of its own, says what memory that takes, and waits to be killed."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from collections import deque
from pathlib import Path

from esperml.client import new_event
from esperml.oona.log import EncodedEvents, Log
from esperml.oona.sqlite.log import SqliteLog
from esperml.v1 import event_pb2, run_pb2

FRAME_EVENTS = 256
EVENT_BYTES = 256
IN_FLIGHT = 8


def make_frame() -> EncodedEvents:
    """A frame of events of the size that is measured everywhere."""
    event = new_event("run", run_ended=run_pb2.RunEnded())
    event.run_ended.error = "x" * (EVENT_BYTES - event.ByteSize() - 4)
    return EncodedEvents.of([event] * FRAME_EVENTS)


async def append_frames(log: Log, client_id: str, first_frame: int, frames: int, frame: EncodedEvents) -> None:
    """Append frames of one publisher, a few at a time as a client does. ``first_frame`` counts from 0."""
    under_way: deque[asyncio.Future[object]] = deque()
    for number in range(first_frame, first_frame + frames):
        if len(under_way) == IN_FLIGHT:
            await under_way.popleft()
        under_way.append(log.append(event_pb2.KIND_TELEMETRY, client_id, number * FRAME_EVENTS + 1, frame))
    await asyncio.gather(*under_way)


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


async def main(path: Path, events: int) -> None:
    log = SqliteLog(path)
    frame = make_frame()
    # The first report is at 10,000 events.
    done, step = 0, 40
    while done * FRAME_EVENTS < events:
        await append_frames(log, "filler", done, step, frame)
        done += step
        sys.stdout.write(f"{resident_bytes()}\n")
        sys.stdout.flush()
        step = max(events // FRAME_EVENTS // 50, 1)
    sys.stdout.write("filled\n")
    sys.stdout.flush()
    os.kill(os.getpid(), 9)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
