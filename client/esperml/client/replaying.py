"""Putting a recording back on a bus: at the pace of then, faster, or as fast as it goes.

What a replay stores, it stores once: the publisher's id derives from the file's content and from what was asked of it,
and the bus keeps the publisher's sequence for ever. Said again, or after a crash, the same replay goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from esperml.client.credentials import NO_CREDENTIALS, Credentials
from esperml.client.errors import AmbiguousRunError, NotARecordingError, TruncatedRecordingError
from esperml.client.oona import OonaClient
from esperml.client.recording import read
from esperml.contract import KINDS, InvalidFieldError, KindValue, check_event, kind_name
from esperml.contract.kinds import MAX_RUN_ID_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from esperml.client.recording import Recorded
    from esperml.v1 import event_pb2

# A frame is published when it holds as much, or when the next event is not due yet.
_FRAME_EVENTS: Final = 256
_FRAME_BYTES: Final = 256 * 2**10
# Events taken from the file at once. Kinds are no further apart than this, so that a run starts before it reports.
_BLOCK_EVENTS: Final = 1024
# Frames of one kind that wait for the one before them to be confirmed.
_WAITING_FRAMES: Final = 4


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay did.

    Attributes:
        events: events that were chosen of the recording; the bus holds all of them now.
        stored_before: how many of them an earlier go of the same replay had stored.
        runs: events of each run, by the id under which they were published.
        truncated: whether the end of the recording is missing.
    """

    events: int
    stored_before: int
    runs: Counter[str]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a recording to replay, and under which runs.

    Attributes:
        kinds: only events of these.
        run_ids: only events of these runs. Empty: of all.
        run_prefix: put before the id of every run.
        as_run: id in place of that of the only run chosen. None: runs keep theirs, behind the prefix.
    """

    kinds: frozenset[KindValue] = frozenset(KINDS)
    run_ids: frozenset[str] = frozenset()
    run_prefix: str = ""
    as_run: str | None = None

    def takes(self, event: event_pb2.Event) -> bool:
        """Whether an event is of a run that was chosen."""
        return not self.run_ids or event.run_id in self.run_ids

    def renamed(self, run_id: str) -> str:
        """The id under which a run is published."""
        return self.run_prefix + (run_id if self.as_run is None else self.as_run)


@dataclass(slots=True)
class Survey:
    """What a replay is about to publish.

    Attributes:
        client_ids: the publisher of each kind that occurs.
        counts: events of each kind.
        runs: events of each run, by the id that it has in the recording.
        truncated: whether the end of the recording is missing.
    """

    client_ids: dict[KindValue, str] = field(default_factory=dict)
    counts: Counter[KindValue] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    truncated: bool = False


def survey(path: Path | str, selection: Selection) -> Survey:
    """Look through a recording before anything of it is published.

    Raises:
        AmbiguousRunError: more than one run is chosen, and a single id for them.
        NotARecordingError: the file is no recording, or holds an event that no bus takes.
        TruncatedRecordingError: it is cut off before its first whole event.
        ValueError: an id of a run would be empty or too long.
        OSError: the file cannot be read.
    """
    path = Path(path)
    found = Survey()
    try:
        for index, recorded in enumerate(read(path, kinds=selection.kinds)):
            if selection.takes(recorded.event):
                _check(path, index, recorded)
                found.counts[recorded.kind] += 1
                found.runs[recorded.event.run_id] += 1
    except TruncatedRecordingError as error:
        if not error.whole:
            raise
        found.truncated = True
    if selection.as_run is not None and len(found.runs) > 1:
        raise AmbiguousRunError(path, list(found.runs))
    for run_id in found.runs:
        if not 1 <= len(renamed := selection.renamed(run_id)) <= MAX_RUN_ID_LENGTH:
            raise ValueError(f"run id {renamed!r} must have 1 to {MAX_RUN_ID_LENGTH} characters")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # What says the same in other words must have the same id: all runs, and each of them by name.
    asked = [digest, sorted(found.runs), selection.run_prefix, selection.as_run]
    identity = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    found.client_ids = {kind: f"replay-{identity}-{kind_name(kind)}" for kind in found.counts}
    return found


async def replay(
    target: str,
    path: Path | str,
    selection: Selection = Selection(),
    *,
    speed: float | None = 1.0,
    credentials: Credentials = NO_CREDENTIALS,
    surveyed: Survey | None = None,
    on_stored: Callable[[int], None] | None = None,
) -> Replayed:
    """Publish the events of a recording, in order within each kind.

    Events keep their ids and the time of their making; the bus gives them new offsets and append times. A server that
    goes away is waited for.

    Args:
        target: address of the server.
        path: the recording.
        selection: what of it, and under which runs.
        speed: 1 for the pace at which the events were stored, 2 for twice that. None: as fast as it goes.
        credentials: token and TLS, where the server asks for them.
        surveyed: what :func:`survey` found, where that was asked before.
        on_stored: called with the number of events whenever some are stored, or found to be.

    Raises:
        RecordingError, ValueError, OSError: as for :func:`survey`; nothing was published.
        OonaError: publishing failed; said again, the replay goes on there.
    """
    path = Path(path)
    found = await asyncio.to_thread(survey, path, selection) if surveyed is None else surveyed
    tell = on_stored or (lambda _: None)
    async with AsyncExitStack() as stack:
        publishers: dict[KindValue, _Publisher] = {}
        for kind, client_id in found.client_ids.items():
            oona = await stack.enter_async_context(OonaClient(target, client_id=client_id, credentials=credentials))
            await oona.connected()
            publishers[kind] = _Publisher(kind, oona, tell)
        stored_before = sum(publisher.to_skip for publisher in publishers.values())
        tell(stored_before)
        try:
            async with asyncio.TaskGroup() as tasks:
                for publisher in publishers.values():
                    tasks.create_task(publisher.run())
                await _feed(path, selection, publishers, speed, frozenset(found.runs))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
    runs = Counter({selection.renamed(run_id): count for run_id, count in found.runs.items()})
    return Replayed(found.counts.total(), stored_before, runs, found.truncated)


class _Publisher:
    """Publishes the events of one kind, a frame at a time: one that is refused has none behind it.

    Attributes:
        to_skip: events at the front that are stored already.
    """

    def __init__(self, kind: KindValue, oona: OonaClient, tell: Callable[[int], None]) -> None:
        self.to_skip = oona.next_sequence - 1
        self._kind = kind
        self._oona = oona
        self._tell = tell
        self._frames: asyncio.Queue[list[event_pb2.Event]] = asyncio.Queue(_WAITING_FRAMES)
        self._pending: list[event_pb2.Event] = []
        self._pending_bytes = 0

    async def run(self) -> None:
        """Publish until an empty frame comes."""
        while frame := await self._frames.get():
            await self._oona.publish(self._kind, frame)
            self._tell(len(frame))

    async def add(self, event: event_pb2.Event) -> None:
        """Publish an event soon."""
        size = event.ByteSize()
        if self._pending and self._pending_bytes + size > _FRAME_BYTES:
            await self.flush()
        self._pending.append(event)
        self._pending_bytes += size
        if len(self._pending) >= _FRAME_EVENTS:
            await self.flush()

    async def flush(self) -> None:
        """Publish what there is."""
        if self._pending:
            frame, self._pending, self._pending_bytes = self._pending, [], 0
            await self._frames.put(frame)

    async def finish(self) -> None:
        """Publish what there is, and no more."""
        await self.flush()
        await self._frames.put([])


async def _feed(
    path: Path,
    selection: Selection,
    publishers: dict[KindValue, _Publisher],
    speed: float | None,
    runs: frozenset[str],
) -> None:
    """Hand each event to the publisher of its kind when it is due."""
    loop = asyncio.get_running_loop()
    events = _in_time_order(path, selection, publishers)
    to_skip = {kind: publisher.to_skip for kind, publisher in publishers.items()}
    start: tuple[float, int] | None = None
    while block := await asyncio.to_thread(lambda: list(islice(events, _BLOCK_EVENTS))):
        for recorded in block:
            if to_skip[recorded.kind]:
                to_skip[recorded.kind] -= 1
                continue
            if speed is not None:
                start = start or (loop.time(), recorded.log_time_ns)
                due_s = start[0] + (recorded.log_time_ns - start[1]) / (speed * 1e9)
                if due_s > loop.time():
                    await _flush(publishers)
                    await asyncio.sleep(due_s - loop.time())
            await publishers[recorded.kind].add(_renamed(recorded.event, selection, runs))
        await _flush(publishers)
    for publisher in publishers.values():
        await publisher.finish()


async def _flush(publishers: dict[KindValue, _Publisher]) -> None:
    for publisher in publishers.values():
        await publisher.flush()


def _in_time_order(path: Path, selection: Selection, kinds: Iterable[KindValue]) -> Iterator[Recorded]:
    """The chosen events: those of a kind in the order of the file, kinds among one another by time.

    A recording holds its kinds as they happened to arrive, which may be one whole log after the other.
    """

    def of_kind(kind: KindValue) -> Iterator[Recorded]:
        try:
            for recorded in read(path, kinds={kind}):
                if selection.takes(recorded.event):
                    yield recorded
        except TruncatedRecordingError:
            return  # Known from the survey, which says so.

    return heapq.merge(*map(of_kind, kinds), key=lambda recorded: recorded.log_time_ns)


def _renamed(event: event_pb2.Event, selection: Selection, runs: frozenset[str]) -> event_pb2.Event:
    """The event under the run that it is published as, wherever it names its run."""
    new = selection.renamed(event.run_id)
    if new == event.run_id:
        return event
    match event.WhichOneof("payload"):
        case "run_started" if event.run_started.paired_run in runs:
            event.run_started.paired_run = selection.renamed(event.run_started.paired_run)
        case "decision":
            event.decision.run_id = new
        case "experience":
            experience = event.experience
            if experience.episode_id == event.run_id:
                experience.episode_id = new
            for state in (experience.state, experience.next_state):
                if state.run_id:
                    state.run_id = new
            if experience.decision.run_id:
                experience.decision.run_id = new
    event.run_id = new
    return event


def _check(path: Path, index: int, recorded: Recorded) -> None:
    try:
        check_event(recorded.kind, recorded.event, f"event {index} of {kind_name(recorded.kind)}")
    except InvalidFieldError as error:
        raise NotARecordingError(path, f"holds what no bus takes: {error}") from error
