"""The log on a NATS JetStream cluster: one replicated stream per kind, and any number of gateways that share it.

A gateway keeps nothing of its own. What it knows of the streams it has read from them or been told by the other
gateways, and every batch that it stores says what it was worked out from; see :mod:`esperml.oona.jetstream.writer`.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Final, TypeVar, cast

import structlog

from esperml.contract import KINDS, KindValue, kind_name
from esperml.oona.jetstream.groups import GroupStore
from esperml.oona.jetstream.link import Link, new_id
from esperml.oona.jetstream.names import TopicNames
from esperml.oona.jetstream.records import split
from esperml.oona.jetstream.streams import create_streams, declare_durability
from esperml.oona.jetstream.tasks import Tasks
from esperml.oona.jetstream.topic import TopicStream, decode_notice
from esperml.oona.jetstream.writer import PublisherMovedError, Request, TopicWriter, fail
from esperml.oona.log import NO_LETTERS, LogDamagedError, LogFullError, LogUnavailableError, TopicBounds
from esperml.oona.retention import limits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nats.aio.msg import Msg

    from esperml.oona.jetstream.records import FramePart
    from esperml.oona.jetstream.writer import Draft
    from esperml.oona.log import Appended, DeadLetter, EncodedEvents, GroupProgress, StoredFrame
    from esperml.settings import OonaSettings

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")

# How often to look whether something was stored that nobody told this gateway of.
_LOOK_INTERVAL_S: Final = 1.0
# One look in so many asks the leader, who knows whether the stream still ends where it did.
_LEADER_LOOKS: Final = 5
# Looks in a row that may find no cluster before that is trouble: it may be choosing a leader.
_TOLERATED_LOOKS: Final = 3
# How often to look whether something is too old or too much.
_RETENTION_INTERVAL_S: Final = 10.0
_FULL_RETRY_S: Final = 5.0
_START_RETRY_S: Final = 0.1
# Moves of one publisher between gateways, while it opens a stream here, before it is told to come again.
_ACQUIRE_TRIES: Final = 3


class JetStreamLog:
    """The log engine on JetStream; implements :class:`esperml.oona.log.Log`. Made by :meth:`open`.

    Attributes:
        durability: what is survived once a call has finished, for example ``replicated×3, fsync``.
        gateway: this gateway's name, made anew each time.
        groups_store: the groups, which gateways share out among them.
        publisher_moved: called with a publisher that has opened a stream at another gateway.
    """

    def __init__(self, link: Link, settings: OonaSettings, durability: str) -> None:
        self.durability: Final = durability
        self.gateway = new_id()
        self.link = link
        self.publisher_moved: Callable[[str], None] = lambda _: None
        self._settings = settings
        self._timeout_s = settings.jetstream.timeout_s
        self._changed: Callable[[int], None] = lambda _: None
        prefix = settings.jetstream.prefix
        self.groups_store = GroupStore(link, prefix, self.gateway, self._timeout_s)
        self._streams: dict[int, TopicStream] = {}
        self._writers: dict[int, TopicWriter] = {}
        for kind in KINDS:
            stream = TopicStream(
                TopicNames.of(prefix, kind), link, partial(self._on_change, kind), partial(self._on_owner, kind)
            )
            self._streams[kind] = stream
            self._writers[kind] = TopicWriter(stream, link, self.gateway, self._last_sequence)
        # Publishers for which this gateway stores, and those that it has lost to another.
        self._owned: set[str] = set()
        self._moved: set[str] = set()
        # Publishers that are being acquired, and for each kind the gateway that was the last to do so.
        self._acquiring: dict[str, dict[int, str]] = {}
        # The last request of each publisher that is not done, and its kind.
        self._under_way: dict[str, tuple[int, asyncio.Future[object]]] = {}
        self._tasks = Tasks()
        self._closed = False

    @classmethod
    async def open(cls, settings: OonaSettings) -> JetStreamLog:
        """Connect to the cluster, make the streams that are missing, and read what is known.

        Raises:
            LogUnavailableError: no cluster answers, or it has no room, or is too old.
            LogDamagedError: the streams hold what no bus wrote.
        """
        link = await Link.open(settings.jetstream)
        try:
            replicas = await create_streams(link, settings.jetstream)
            durability = await declare_durability(settings.jetstream, replicas)
            log = cls(link, settings, durability)
            await log._start()
        except BaseException:
            await link.close()
            raise
        return log

    async def _start(self) -> None:
        for kind, stream in self._streams.items():
            await self.link.subscribe(stream.names.notices, partial(self._on_notice, kind))
        await self._learn()
        for kind in KINDS:
            self._tasks.keep(f"oona-writer-{kind_name(kind)}", self._writers[kind].run)
        self._tasks.keep("oona-look", self._look)
        self._tasks.keep("oona-retention", self._retain)

    async def _learn(self) -> None:
        """Read what the streams say now. Servers that have just been given a stream need a moment to answer for it."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        while True:
            try:
                for stream in self._streams.values():
                    await stream.catch_up_with_leader()
                await self.groups_store.catch_up()
            except LogUnavailableError:
                if loop.time() > deadline_s:
                    raise
                await asyncio.sleep(_START_RETRY_S)
            else:
                return

    # What the broker calls.

    @property
    def problem(self) -> str:
        """What keeps this gateway from its work now, in words; empty where nothing does."""
        return self._tasks.problem

    def bounds(self, kind: int) -> TopicBounds:
        """The extent of the log of ``kind``, as far as this gateway knows it."""
        return self._streams[kind].bounds if kind in self._streams else TopicBounds()

    def listen(self, changed: Callable[[int], None]) -> None:
        """Have ``changed(kind)`` called whenever the bounds of ``kind`` have changed, whoever changed them."""
        self._changed = changed

    def groups(self) -> Mapping[tuple[int, str], GroupProgress]:
        """Progress of each (kind, group), as far as this gateway knows it."""
        records = self.groups_store.records.items()
        return {key: record.progress for key, record in records if record.progress is not None}

    def letters(self) -> Mapping[tuple[int, str], Mapping[int, bool]]:
        """Dead letters of each (kind, group), by offset: whether each is being replayed."""
        return {key: dict(record.letters) for key, record in self.groups_store.records.items() if record.letters}

    async def next_sequence(self, client_id: str) -> int:
        """The sequence that the publisher's next event must have. From now on only this gateway stores for it.

        What another gateway still had under way for it is stored by then, or refused.
        """
        self._moved.discard(client_id)
        # Anew for each stream: what this gateway knows may be from before another stored for the publisher.
        self._owned.discard(client_id)
        while (under_way := self._under_way.get(client_id)) is not None:
            await asyncio.wait([under_way[1]])
        for _ in range(_ACQUIRE_TRIES):
            if client_id not in self._owned:
                await self._acquire(client_id)
            if client_id in self._owned:
                return self._last_sequence(client_id) + 1
        raise PublisherMovedError(client_id)

    def append(self, kind: int, client_id: str, first_sequence: int, events: EncodedEvents) -> asyncio.Future[Appended]:
        """Store events, and the publisher's sequence with them; see :class:`esperml.oona.log.Log`."""
        parts = split(events, 0, self.link.max_message_bytes)

        def work(draft: Draft) -> Appended:
            if client_id in self._moved:
                raise PublisherMovedError(client_id)
            return draft.append(client_id, first_sequence, events, parts)

        limit = self._settings.max_log_bytes
        if limit and sum(stream.bounds.bytes for stream in self._streams.values()) + events.size > limit:
            future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
            fail(future, LogFullError(f"the log has reached its limit of {limit} bytes", _FULL_RETRY_S))
            return future
        return self._ask(kind, work, client_id, len(parts), events.size)

    async def read(self, kind: int, offset: int, max_bytes: int) -> list[StoredFrame]:
        """Frames from the one that holds ``offset``, or the next that is there, in order."""
        return await self._streams[kind].read(offset, max_bytes)

    async def offset_at(self, kind: int, time_ns: int) -> int:
        """Offset of the first record stored at or after a time (ns since 1970), or of the next to be stored."""
        return await self._streams[kind].offset_at(time_ns)

    def save_group(
        self, kind: int, group: str, progress: GroupProgress, letters: Mapping[int, DeadLetter | None] = NO_LETTERS
    ) -> asyncio.Future[None]:
        """Store a group's progress and what became of dead letters of it, both or neither."""
        if self._closed:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            fail(future, self._closed_error())
            return future
        return self.groups_store.save((kind, group), progress, letters)

    async def dead_letters(self, kind: int, group: str, first: int, limit: int) -> list[DeadLetter]:
        """Dead letters of a group from offset ``first`` on, at most ``limit``, ascending."""
        return await self.groups_store.dead_letters((kind, group), first, limit)

    async def purge(self, kind: int, before: int) -> int:
        """Delete the frames that lie below offset ``before`` as a whole. Returns the earliest offset then."""
        stream = self._streams[kind]
        state = stream.state
        end = stream.last_sequence + 1
        if before <= state.earliest:
            return state.earliest
        found = await stream.first(lambda part: part.end > before)
        lags = before < state.next if found is None else found[1].first_offset > max(before, state.earliest)
        if lags:
            # What it does not show is there, and must not be deleted with what is to go.
            raise LogUnavailableError(f"{stream.names.stream}: the replica that was asked lags; try again")
        if found is None:
            sequence, earliest, earliest_bytes = end, state.next, state.next_bytes
        else:
            sequence, part = found
            earliest, earliest_bytes = part.first_offset, part.bytes_before
        # The floor first: a gateway that reads meanwhile must not find records missing that it believes to be there.
        earliest = await self._ask(kind, lambda draft: draft.move_floor(earliest, earliest_bytes))
        await self.link.api(f"STREAM.PURGE.{stream.names.stream}", {"seq": sequence, "filter": stream.names.runs})
        return earliest

    async def close(self) -> None:
        """Finish what was asked for, and let go of the cluster."""
        if self._closed:
            return
        self._closed = True
        for writer in self._writers.values():
            await writer.drain()
        await self.groups_store.drain()
        await self._tasks.close()
        await self.link.close()

    # Inside.

    def _ask(
        self, kind: int, work: Callable[[Draft], _T], client_id: str = "", messages: int = 0, size: int = 0
    ) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        if self._closed:
            fail(future, self._closed_error())
            return future
        request = Request(work, messages, size, client_id, loop.time() + self._timeout_s, future)
        if client_id:
            # A publisher's sequence counts over all kinds: what it asks for in one waits for the other.
            before = self._under_way.get(client_id)
            if before is not None and before[0] != kind:
                request.after = before[1]
            under_way = cast("asyncio.Future[object]", future)
            self._under_way[client_id] = (kind, under_way)
            under_way.add_done_callback(partial(self._done, client_id))
        self._writers[kind].ask(cast("Request[object]", request))
        return future

    def _done(self, client_id: str, future: asyncio.Future[object]) -> None:
        if (last := self._under_way.get(client_id)) is not None and last[1] is future:
            del self._under_way[client_id]

    async def _acquire(self, client_id: str) -> None:
        """Be the gateway that stores for a publisher, in all kinds."""
        last = self._acquiring.setdefault(client_id, {})
        try:
            await asyncio.gather(
                *(self._ask(kind, lambda draft: draft.acquire(client_id), messages=1) for kind in KINDS)
            )
            if all(last.get(kind) == self.gateway for kind in KINDS):
                self._owned.add(client_id)
        finally:
            self._acquiring.pop(client_id, None)

    def _last_sequence(self, client_id: str) -> int:
        return max(stream.sequences.get(client_id, 0) for stream in self._streams.values())

    def _on_owner(self, kind: int, client_id: str, gateway: str) -> None:
        if (last := self._acquiring.get(client_id)) is not None:
            last[kind] = gateway
        if gateway != self.gateway and client_id in self._owned:
            self._owned.discard(client_id)
            self._moved.add(client_id)
            self.publisher_moved(client_id)

    def _on_change(self, kind: int) -> None:
        self._changed(kind)

    async def _on_notice(self, kind: int, message: Msg) -> None:
        with suppress(ValueError):
            self._streams[kind].apply_batch(*decode_notice(message.data))

    async def _look(self) -> None:
        out_of_reach = 0
        for number in count(1):
            await asyncio.sleep(_LOOK_INTERVAL_S)
            try:
                for stream in self._streams.values():
                    if number % _LEADER_LOOKS:
                        await stream.catch_up()
                    else:
                        await stream.catch_up_with_leader()
                await self.groups_store.catch_up()
                out_of_reach = 0
            except LogUnavailableError as error:
                out_of_reach += 1
                _log.debug("cluster_out_of_reach", detail=str(error))
                if out_of_reach >= _TOLERATED_LOOKS:
                    self._tasks.note("oona-look", str(error))
            except LogDamagedError as error:
                self._tasks.note("oona-look", str(error))

    async def _retain(self) -> None:
        """Let go what is too old or too much. Every gateway does, and none minds another that was faster."""
        while True:
            await asyncio.sleep(_RETENTION_INTERVAL_S * random.uniform(0.5, 1.5))
            for kind in KINDS:
                try:
                    await self._retain_kind(kind)
                except LogUnavailableError as error:
                    _log.debug("retention_waits", detail=str(error))
                except LogDamagedError as error:
                    self._tasks.note("oona-retention", str(error))

    async def _retain_kind(self, kind: KindValue) -> None:
        limits = limits_of(self._settings.retention, kind)
        stream = self._streams[kind]
        state, bounds = stream.state, stream.bounds

        def stays(part: FramePart) -> bool:
            """As far as number and bytes go: the last frame stays, so that who reads at the end finds something."""
            fits = not limits.records or bounds.next - part.first_offset <= limits.records
            fits = fits and (not limits.bytes or state.next_bytes - part.bytes_before <= limits.bytes)
            return fits or part.end >= bounds.next

        before = bounds.earliest
        too_many = 0 < limits.records < bounds.next - bounds.earliest
        if (too_many or 0 < limits.bytes < bounds.bytes) and (kept := await stream.first(stays)) is not None:
            before = max(before, kept[1].first_offset)
        if limits.age_s and bounds.earliest < bounds.next:
            before = max(before, await stream.offset_at(time.time_ns() - int(limits.age_s * 1e9)))
        if before > bounds.earliest:
            await self.purge(kind, before)

    def _closed_error(self) -> LogUnavailableError:
        return LogUnavailableError("the log is closed")
