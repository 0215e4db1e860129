"""The bus without the network: topics, groups, publishing and subscribing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from esperml.contract import KINDS, kind_name
from esperml.oona.log import Appended, GroupProgress, LogError, LogUnavailableError
from esperml.oona.members import MemberReader, SharedGroup
from esperml.oona.ranges import RangeSet
from esperml.oona.rejection import RequestRejectedError, from_log_error, invalid
from esperml.oona.retention import limits_of, retention
from esperml.oona.subscriptions import PrivateReader
from esperml.oona.topic import Topic
from esperml.oona.validation import (
    ack_deadline_s,
    check_group,
    check_kind,
    check_publish,
    check_subscribe,
    redelivery,
    time_ns,
)
from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from esperml.oona.log import DeadLetter, Log
    from esperml.oona.subscriptions import Emit, ServedSubscription
    from esperml.oona.traffic import Traffic
    from esperml.settings import OonaSettings

# What a log's 64-bit columns hold.
_MAX_OFFSET: Final = 2**63 - 1


class Broker:
    """The bus on one log engine. All methods are called on one event loop, which they never block.

    Args:
        log: the engine.
        settings: the bus's settings.

    Attributes:
        settings: the bus's settings.
        rejections: requests that were rejected since the process began, by reason.
    """

    def __init__(self, log: Log, settings: OonaSettings) -> None:
        self.settings = settings
        self.rejections: Counter[oona_pb2.RejectReason.ValueType] = Counter()
        self._log = log
        share = settings.cache_bytes // len(KINDS)
        self._topics: dict[int, Topic] = {kind: Topic(kind, log, share) for kind in KINDS}
        self._groups = {
            (kind, name): SharedGroup(name, self._topics[kind], log, progress)
            for (kind, name), progress in log.groups().items()
        }
        log.listen(self._changed)
        # One at a time: of two that found a group at once, the second must see that it is there.
        self._joining = asyncio.Lock()

    @property
    def durability(self) -> str:
        """What a confirmed event survives: ``fsync`` means loss of power."""
        return self._log.durability

    @property
    def problem(self) -> str:
        """What keeps the bus from its work now, beside what requests are told, in words; empty where nothing does."""
        return ""

    def on_publisher_moved(self, moved: Callable[[str], None]) -> None:
        """Have ``moved(client_id)`` called when a publisher has gone to another server of the same bus.

        What comes from it here afterwards is refused. A bus of one server never calls it.
        """

    async def next_sequence(self, client_id: str) -> int:
        """The sequence that the next event of a publisher must have, behind all that it published before this call.

        Raises:
            LogUnavailableError: the log cannot be asked now.
        """
        return await self._log.next_sequence(client_id)

    def publish(
        self,
        client_id: str,
        publish: oona_pb2.Publish,
        permit: Callable[[Sequence[str]], None] | None = None,
    ) -> asyncio.Future[Appended]:
        """Store events. They must not change afterwards.

        Args:
            client_id: who publishes.
            publish: the events.
            permit: looks at the run of each event, and raises where one may not be published.

        Returns:
            A future that is done when they are stored as durably as :attr:`durability` says. It may raise
            ``SequenceGapError`` or ``LogUnavailableError``.

        Raises:
            RequestRejectedError: a field or an event is not as it must be.
        """
        events = check_publish(publish)
        if permit is not None:
            permit(events.run_ids)
        topic = self._topics[publish.kind]
        came_s = time.perf_counter()
        stored = self._log.append(publish.kind, client_id, publish.first_sequence, events)

        def keep(future: asyncio.Future[Appended]) -> None:
            if future.exception() is None:
                topic.appended(future.result(), events)
                topic.traffic.frame_stored(future.result(), events.size, time.perf_counter() - came_s)

        stored.add_done_callback(keep)
        # A publisher that goes away must not cancel what the log is about to store and readers are to be told of. If
        # it fails then, that is no error nobody handled.
        confirmed = asyncio.shield(stored)
        confirmed.add_done_callback(lambda future: future.cancelled() or future.exception())
        return confirmed

    async def subscribe(self, subscribe: oona_pb2.Subscribe, emit: Emit, reader: str = "") -> ServedSubscription:
        """Make a subscription; its :meth:`ServedSubscription.run` sends frames through ``emit``.

        ``reader`` names who asks, by the name that it has when it comes again.

        Raises:
            RequestRejectedError: it cannot be had as asked.
        """
        check_subscribe(subscribe)
        if subscribe.group:
            async with self._joining:
                return await self._join(subscribe, emit, reader)
        topic = self._topics[subscribe.kind]
        start = await self._start(subscribe, default=topic.bounds.next)
        return PrivateReader(
            subscribe.subscription_id,
            topic,
            emit,
            self.settings.delivery_records,
            start=start,
            end=subscribe.end_offset if subscribe.HasField("end_offset") else None,
            run_ids=frozenset(subscribe.run_ids),
        )

    def topic(self, kind: event_pb2.Kind.ValueType) -> oona_pb2.Topic:
        """The extent of one log. Raises :class:`RequestRejectedError` for what is no kind."""
        check_kind("kind", kind)
        bounds = self._topics[kind].bounds
        return oona_pb2.Topic(
            kind=kind,
            earliest_offset=bounds.earliest,
            next_offset=bounds.next,
            bytes=bounds.bytes,
            retention=retention(limits_of(self.settings.retention, kind)),
        )

    def traffic(self, kind: event_pb2.Kind.ValueType) -> Traffic:
        """Counts of what went through one log. Raises :class:`RequestRejectedError` for what is no kind."""
        check_kind("kind", kind)
        return self._topics[kind].traffic

    def groups(self, kind: event_pb2.Kind.ValueType) -> list[oona_pb2.Group]:
        """The groups of one log, by name. Raises :class:`RequestRejectedError` for what is no kind."""
        end = self.topic(kind).next_offset
        return [
            oona_pb2.Group(
                name=name,
                committed_offset=group.state.committed,
                # Where others store as well, they may be done with more than is known here to be stored.
                lag=max(end - group.state.committed, 0),
                members=len(group.state.members),
                dead_letters=len(group.letters),
            )
            for (of_kind, name), group in sorted(self._groups.items())
            if of_kind == kind
        ]

    def waiting(self, kind: event_pb2.Kind.ValueType) -> Mapping[str, int]:
        """Spans of records that wait for the members of each group that is served here, by its name."""
        return {name: group.state.waiting for (of_kind, name), group in self._groups.items() if of_kind == kind}

    async def purge(self, kind: event_pb2.Kind.ValueType, before: int) -> int:
        """Delete records below an offset, as far as they fill whole frames. Returns the first that is still there.

        Raises:
            RequestRejectedError: no such kind, or the log cannot store now.
        """
        check_kind("kind", kind)
        topic = self._topics[kind]
        try:
            earliest = await self._log.purge(kind, min(before, topic.bounds.next))
        except LogUnavailableError as error:
            raise RequestRejectedError(oona_pb2.REJECT_REASON_STORAGE, str(error)) from error
        return earliest

    async def dead_letters(
        self, kind: event_pb2.Kind.ValueType, group: str, first: int, limit: int
    ) -> tuple[list[DeadLetter], int | None]:
        """Records that a group gave up on, from an offset on, and where the next page begins, or None at the end.

        Raises:
            RequestRejectedError: no such kind or group, or the log cannot be asked now.
        """
        letters = self._group(kind, group).letters
        if first > _MAX_OFFSET:
            return [], None
        try:
            return await letters.page(first, limit)
        except LogError as error:
            raise from_log_error(error) from error

    async def replay_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Collection[int]) -> int:
        """Give dead letters (none named: all) back to their group. Returns how many.

        Raises:
            RequestRejectedError: no such kind or group, or the log cannot store now.
        """
        letters = self._group(kind, group).letters
        try:
            return await letters.replay(offsets)
        except LogError as error:
            raise from_log_error(error) from error

    async def purge_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Collection[int]) -> int:
        """Delete dead letters (none named: all) of a group. Returns how many.

        Raises:
            RequestRejectedError: no such kind or group, or the log cannot store now.
        """
        letters = self._group(kind, group).letters
        try:
            return await letters.purge(offsets)
        except LogError as error:
            raise from_log_error(error) from error

    def server_ends(self) -> None:
        """Note that streams end from now on because the server does: no delivery under way counts as an attempt."""
        for group in self._groups.values():
            group.server_ends()

    def _group(self, kind: event_pb2.Kind.ValueType, name: str) -> SharedGroup:
        check_kind("kind", kind)
        check_group("group", name)
        if (group := self._groups.get((kind, name))) is None:
            raise invalid("group", f"{kind_name(kind)} has no group {name!r}")
        return group

    def _changed(self, kind: int) -> None:
        """The log of a kind is longer now, or its old records are gone."""
        topic = self._topics[kind]
        if topic.forget_purged():
            for (of_kind, _), group in self._groups.items():
                if of_kind == kind:
                    group.purged(topic.bounds.earliest)
        topic.wake()

    async def _join(self, subscribe: oona_pb2.Subscribe, emit: Emit, reader: str) -> MemberReader:
        deadline_s = ack_deadline_s(subscribe, self.settings.ack_deadline_s)
        again = redelivery(subscribe, self.settings.redelivery)
        run_ids = frozenset(subscribe.run_ids)
        key = (subscribe.kind, subscribe.group)
        topic = self._topics[subscribe.kind]
        moves = subscribe.start.WhichOneof("at") in {"offset", "time"}
        start = await self._start(subscribe, default=topic.bounds.earliest)
        group = self._groups.get(key)
        if group is not None and group.state.members and group.run_ids != run_ids:
            raise RequestRejectedError(
                oona_pb2.REJECT_REASON_GROUP_MISMATCH,
                f"subscribe.run_ids: the members of group {subscribe.group!r} on {kind_name(subscribe.kind)} "
                "must all ask for the same runs",
            )
        if group is None or moves:
            progress = GroupProgress(start, RangeSet())
            await self._store_start(subscribe, progress)
            if group is None:
                group = self._groups[key] = SharedGroup(subscribe.group, topic, self._log, progress)
            else:
                group.move(progress)
                # Once more: members may have acknowledged what lay at the old place while this was being stored.
                await self._store_start(subscribe, progress)
        return MemberReader(
            subscribe.subscription_id,
            topic,
            emit,
            self.settings.delivery_records,
            group=group,
            run_ids=run_ids,
            ack_deadline_s=deadline_s,
            redelivery=again,
            name=reader,
        )

    async def _store_start(self, subscribe: oona_pb2.Subscribe, progress: GroupProgress) -> None:
        try:
            await self._log.save_group(subscribe.kind, subscribe.group, progress)
        except LogUnavailableError as error:
            raise RequestRejectedError(oona_pb2.REJECT_REASON_STORAGE, str(error)) from error

    async def _start(self, subscribe: oona_pb2.Subscribe, default: int) -> int:
        """The offset that a subscription asks to start from."""
        topic = self._topics[subscribe.kind]
        bounds = topic.bounds
        start = subscribe.start
        match start.WhichOneof("at"):
            case "offset" if start.offset < bounds.earliest:
                raise RequestRejectedError(
                    oona_pb2.REJECT_REASON_BELOW_FLOOR,
                    f"subscribe.start.offset: {start.offset} was purged; the first that is still there is "
                    f"{bounds.earliest}",
                    earliest_offset=bounds.earliest,
                )
            case "offset" if start.offset > bounds.next:
                raise invalid("subscribe.start.offset", f"{start.offset} is beyond the end of the log, {bounds.next}")
            case "offset":
                return start.offset
            case "time":
                return await self._log.offset_at(subscribe.kind, time_ns("subscribe.start.time", start.time))
            case "anchor" if start.anchor == oona_pb2.ANCHOR_EARLIEST:
                return bounds.earliest
            case "anchor" if start.anchor == oona_pb2.ANCHOR_LATEST:
                return bounds.next
            case _:
                return default
