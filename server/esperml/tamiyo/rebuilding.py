"""Runs that started before this process did, or were let go, found again in what the bus has kept.

Searching the logs takes as long as they are. So that nobody who publishes under names without end can make others wait
for it, consumers never do: one search at a time goes on beside them, for all runs that were asked for until it began,
and what comes of those meanwhile is held by the controller.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from esperml.client import BehindFloorError, CallFailedError, RejectedError
from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping

    from esperml.client import OonaClient
    from esperml.contract import KindValue
    from esperml.tamiyo.controller import Controller, Outgoing

REPLAYED: Final = (
    event_pb2.KIND_EVENTS,
    event_pb2.KIND_OUTCOMES,
    event_pb2.KIND_TELEMETRY,
    event_pb2.KIND_DECISIONS,
)
"""Kinds that a run is rebuilt from."""

MAX_WANTED: Final = 4096
"""Runs that wait to be searched for. One beyond is searched for when it is heard from again and there are fewer."""

MAX_MISSING: Final = 4096
"""Runs of which no start was found, remembered so that the logs are not searched for them again."""

MAX_TOGETHER: Final = 16
"""Runs whose records are in memory at the same time, their twins not counted."""

FAILURES: Final = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What a defect in the handling of one run can raise. It must not stop the other runs."""

RETRY_S: Final = 1.0
"""Time between two tries of what the bus could not do just then, in s."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Kept:
    """What the bus has kept of one run.

    Attributes:
        events: each with its kind, each kind in its order.
        at_s: when the latest was stored, in s since 1970.
    """

    events: Outgoing = field(default_factory=list)
    at_s: float = 0.0


class Rebuilding:
    """Searches the logs for runs that the controller does not know, and has it rebuild them.

    Args:
        controller: whose runs they are.
        publish: puts on the bus what comes of events that were held meanwhile.

    Attributes:
        missing: runs of which no start was found.
    """

    def __init__(self, controller: Controller, publish: Callable[[Outgoing], Awaitable[None]]) -> None:
        self._controller = controller
        self._publish = publish
        # Run → kind → offset of the first record that comes by itself.
        self._wanted: dict[str, dict[KindValue, int]] = {}
        self._searched: dict[str, dict[KindValue, int]] = {}
        self._asked = asyncio.Event()
        self._crowded = False
        self.missing: OrderedDict[str, None] = OrderedDict()

    def want(self, run_id: str, kind: KindValue, offset: int) -> None:
        """Ask for a run that is heard from. Nothing happens where it is known, or not to be found.

        Args:
            run_id: the run.
            kind: kind of the record by which it was heard from.
            offset: offset of that record: it and what follows it in its log come by themselves.
        """
        if self._controller.knows(run_id) or run_id in self.missing or run_id in self._searched:
            return
        if not self._controller.has_room:
            if not self._crowded:
                log.warning("run_not_rebuilt", run_id=run_id, reason="as many runs as may be are being heard from")
            self._crowded = True
            return
        self._crowded = False
        if run_id in self._wanted or len(self._wanted) < MAX_WANTED:
            self._wanted.setdefault(run_id, {}).setdefault(kind, offset)
            self._asked.set()

    def started(self, run_id: str) -> None:
        """Note that a run starts now: it need not be searched for, and will be found if it ever must be."""
        for runs in (self.missing, self._wanted, self._searched):
            runs.pop(run_id, None)

    async def run(self, client: OonaClient) -> None:
        """Search for what is wanted, for ever.

        Args:
            client: a client of the bus.

        Raises:
            OonaError: the bus can be asked no more.
        """
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._searched, self._wanted = self._wanted, {}
            while True:
                try:
                    await self._rebuild(client, self._searched)
                except (CallFailedError, BehindFloorError, RejectedError) as error:
                    log.warning("replay_failed", runs=len(self._searched), problem=str(error))
                    await asyncio.sleep(RETRY_S)
                else:
                    break
            self._searched.clear()

    async def _rebuild(self, client: OonaClient, wanted: Mapping[str, Mapping[KindValue, int]]) -> None:
        """Rebuild those of ``wanted`` that are not known yet, a few at a time."""
        twins: dict[str, str] = {}
        # The start alone tells whether there is more to look for, and its log is the shortest.
        async for record in _records(client, event_pb2.KIND_EVENTS, wanted):
            if record.event.HasField("run_started"):
                twins[record.event.run_id] = record.event.run_started.paired_run
        for run_id in wanted.keys() - twins.keys():
            self.missing[run_id] = None
            if len(self.missing) > MAX_MISSING:
                self.missing.popitem(last=False)
        found = [run_id for run_id in wanted if run_id in twins]
        for index in range(0, len(found), MAX_TOGETHER):
            chosen = [run_id for run_id in found[index : index + MAX_TOGETHER] if not self._controller.knows(run_id)]
            named = {twin for run_id in chosen if (twin := twins[run_id]) and not self._controller.knows(twin)}
            # Rewards compare a run with its twin, which must therefore be there first.
            kept = {run_id: _Kept() for run_id in (*sorted(named), *chosen)}
            for kind in REPLAYED if kept else ():
                async for record in _records(client, kind, kept):
                    run_id = record.event.run_id
                    if record.offset < wanted.get(run_id, {}).get(kind, record.offset + 1):
                        kept[run_id].events.append((kind, record.event))
                        kept[run_id].at_s = max(kept[run_id].at_s, record.append_time.ToNanoseconds() / 1e9)
            for run_id, records in kept.items():
                await asyncio.sleep(0)  # One run after the other, with a turn for everybody else between.
                await self._take_in(run_id, records)

    async def _take_in(self, run_id: str, kept: _Kept) -> None:
        if self._controller.knows(run_id) or not self._controller.has_room:
            return  # It began anew meanwhile, or others took the last place.
        try:
            outgoing = self._controller.rebuild(kept.events, at_s=kept.at_s)
        except FAILURES:
            log.exception("rebuilding_failed", run_id=run_id, events=len(kept.events))
            return
        log.info("run_rebuilt", run_id=run_id, events=len(kept.events))
        await self._publish(outgoing)


async def _records(client: OonaClient, kind: KindValue, run_ids: Collection[str]) -> AsyncIterator[event_pb2.Record]:
    """What the bus has kept of some runs in one log."""
    named = tuple(run_ids)  # They may become fewer while the bus is asked, and naming none would ask for all.
    if not named:
        return
    topic = (await client.describe(kind)).topic
    if topic.next_offset <= topic.earliest_offset:
        return
    start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
    async with client.subscribe(kind, run_ids=named, start=start, end_offset=topic.next_offset) as subscription:
        async for record in subscription:
            yield record
