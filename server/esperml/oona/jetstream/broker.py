"""The bus of one gateway of a cluster: every gateway serves every client, and groups span them all."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from typing import TYPE_CHECKING, Final

import structlog

from esperml.oona.broker import Broker
from esperml.oona.jetstream.calls import GroupCall, answer_call, call_coordinator
from esperml.oona.jetstream.conversation import Conversation
from esperml.oona.jetstream.coordination import Coordination
from esperml.oona.jetstream.groups import GroupMovedError, GroupRecord
from esperml.oona.jetstream.log import JetStreamLog
from esperml.oona.jetstream.members import ForwardedMember, decode_opening, serve_member
from esperml.oona.jetstream.tasks import Tasks, say_if_failed
from esperml.oona.log import LogUnavailableError
from esperml.oona.members import MemberReader, SharedGroup
from esperml.oona.rejection import from_log_error
from esperml.oona.validation import check_group, check_kind, check_subscribe
from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine

    from nats.aio.msg import Msg

    from esperml.oona.jetstream.groups import GroupKey
    from esperml.oona.log import DeadLetter
    from esperml.oona.subscriptions import Emit, ServedSubscription
    from esperml.settings import OonaSettings

_log = structlog.get_logger(__name__)

# Runs of a group whose member is noted in the cluster: those that went on last.
_MAX_OWNERS: Final = 2000
_OWNERS_INTERVAL_S: Final = 0.5


class _Gathering:
    """Members that a group had when its last coordinator went; who comes waits a while for the others.

    Without that, the first of them would be given the others' runs.
    """

    def __init__(self, names: Collection[str], patience_s: float) -> None:
        self._missing = set(names)
        self._complete = asyncio.Event()
        self._ends_s = asyncio.get_running_loop().time() + patience_s

    async def arrive(self, name: str) -> None:
        self._missing.discard(name)
        if not self._missing:
            self._complete.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._ends_s):
                await self._complete.wait()


class ClusterBroker(Broker):
    """The bus on a cluster. Made by :func:`open_cluster_broker`.

    Private readers and publishers are served here. Each group is coordinated by one gateway at a time; members that
    come to another are served through it.

    Args:
        log: the engine.
        settings: the bus's settings.
    """

    def __init__(self, log: JetStreamLog, settings: OonaSettings) -> None:
        super().__init__(log, settings)
        self._groups.clear()  # Each comes with its claim.
        self._cluster_log = log
        self._link = log.link
        self._store = log.groups_store
        self._store.claimed_only = True
        self._store.lost = self._let_go
        self._gateway = log.gateway
        self._lease_s = settings.jetstream.lease_s
        self._members_root = f"{settings.jetstream.prefix}._member"
        self._calls_root = f"{settings.jetstream.prefix}._call"
        alive_root = f"{settings.jetstream.prefix}._gateway"
        self._alive_root = alive_root
        self._coordination = Coordination(
            log.link, self._store, alive_root, log.gateway, self._lease_s, self._let_all_go
        )
        self._locks: dict[GroupKey, asyncio.Lock] = {}
        self._gatherings: dict[GroupKey, _Gathering] = {}
        self._members_here: dict[GroupKey, weakref.WeakSet[MemberReader]] = {}
        self._saved_owners: dict[GroupKey, dict[str, str]] = {}
        self._kept = Tasks()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part in the cluster while the context lasts."""
        await self._link.subscribe(f"{self._alive_root}.*", self._coordination.heard)
        await self._link.subscribe(f"{self._members_root}.{self._gateway}", self._on_member)
        await self._link.subscribe(f"{self._calls_root}.{self._gateway}", self._on_call)
        self._kept.keep("oona-heartbeat", self._coordination.run)
        self._kept.keep("oona-owners", self._note_owners)
        try:
            yield
        finally:
            await self._coordination.say_goodbye()
            self._let_all_go()
            await self._kept.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def problem(self) -> str:
        """What keeps this gateway from its work now, in words; empty where nothing does."""
        return "; ".join(filter(None, (self._cluster_log.problem, self._kept.problem)))

    def on_publisher_moved(self, moved: Callable[[str], None]) -> None:
        """Have ``moved(client_id)`` called when a publisher has gone to another gateway."""
        self._cluster_log.publisher_moved = moved

    async def subscribe(self, subscribe: oona_pb2.Subscribe, emit: Emit, reader: str = "") -> ServedSubscription:
        """Make a subscription; see :meth:`Broker.subscribe`.

        Raises:
            RequestRejectedError: it cannot be had as asked.
            LogUnavailableError: which gateway coordinates the group cannot be settled now.
        """
        if not subscribe.group:
            return await super().subscribe(subscribe, emit, reader)
        check_subscribe(subscribe)
        coordinator = await self._coordination.coordinator((subscribe.kind, subscribe.group))
        if coordinator == self._gateway:
            return await self._join_here(subscribe, emit, reader)
        return await ForwardedMember.join(
            self._link, self._members_root, coordinator, reader, subscribe, emit, self._lease_s, self._spawn
        )

    def groups(self, kind: event_pb2.Kind.ValueType) -> list[oona_pb2.Group]:
        """The groups of one log; of those that other gateways coordinate, as they were last saved."""
        here = {group.name: group for group in super().groups(kind)}
        end = self.topic(kind).next_offset
        for (of_kind, name), record in self._store.records.items():
            if of_kind == kind and name not in here and record.progress is not None:
                committed = record.progress.committed
                here[name] = oona_pb2.Group(
                    name=name,
                    committed_offset=committed,
                    lag=max(end - committed, 0),
                    members=len(set(record.owners.values())),
                    dead_letters=len(record.letters),
                )
        return [here[name] for name in sorted(here)]

    async def dead_letters(
        self, kind: event_pb2.Kind.ValueType, group: str, first: int, limit: int
    ) -> tuple[list[DeadLetter], int | None]:
        """Records that a group gave up on; see :meth:`Broker.dead_letters`."""
        self._check_known(kind, group)
        try:
            letters = await self._log.dead_letters(kind, group, first, limit + 1)
        except LogUnavailableError as error:
            raise from_log_error(error) from error
        return letters[:limit], letters[limit].offset if len(letters) > limit else None

    async def replay_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Collection[int]) -> int:
        """Give dead letters back to their group; see :meth:`Broker.replay_dead_letters`."""
        return await self._call(GroupCall("replay", kind, group, tuple(offsets)))

    async def purge_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Collection[int]) -> int:
        """Delete dead letters; see :meth:`Broker.purge_dead_letters`."""
        return await self._call(GroupCall("purge", kind, group, tuple(offsets)))

    # Groups that are coordinated here.

    async def _join_here(self, subscribe: oona_pb2.Subscribe, emit: Emit, name: str) -> ServedSubscription:
        key = (subscribe.kind, subscribe.group)
        # One at a time: of two that find a group new, the second must see what the first has founded.
        async with self._lock(key):
            await self._take(key)
            member = await super().subscribe(subscribe, emit, name)
        if not isinstance(member, MemberReader):
            raise TypeError("a member of a group is a MemberReader")
        try:
            self._members_here.setdefault(key, weakref.WeakSet()).add(member)
            if (gathering := self._gatherings.get(key)) is not None:
                await gathering.arrive(name)
                self._gatherings.pop(key, None)
        except asyncio.CancelledError:
            member.close()
            raise
        return member

    async def _take(self, key: GroupKey) -> None:
        """Have a group that this gateway has claimed ready for members."""
        if key in self._groups:
            return
        await self._store.catch_up()
        record = self._store.records.get(key, GroupRecord())
        if record.gateway != self._gateway:
            raise GroupMovedError(key[1])
        if record.progress is None:
            return  # New: who joins first founds it.
        kind, name = key
        group = SharedGroup(name, self._topics[kind], self._log, record.progress)
        group.state.claims = dict(record.owners)
        self._gatherings[key] = _Gathering(set(record.owners.values()), self._lease_s / 2)
        self._groups[key] = group

    def _lock(self, key: GroupKey) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _let_go(self, key: GroupKey) -> None:
        """Coordinate a group no longer: its members, wherever they are, come again and find its new coordinator."""
        if (group := self._groups.pop(key, None)) is not None:
            group.server_ends()
        self._gatherings.pop(key, None)
        self._saved_owners.pop(key, None)
        for member in list(self._members_here.pop(key, ())):
            member.fail(GroupMovedError(key[1]))

    def _let_all_go(self) -> None:
        for key in list(self._groups):
            self._let_go(key)
        self._store.forget_claims()

    async def _note_owners(self) -> None:
        """Note in the cluster which member has which runs, so that it survives this gateway."""
        while True:
            await asyncio.sleep(_OWNERS_INTERVAL_S)
            for key, group in list(self._groups.items()):
                owners = group.state.owners(_MAX_OWNERS)
                if owners != self._saved_owners.get(key, {}) and key not in self._gatherings:
                    try:
                        await self._store.save_owners(key, owners)
                    except LogUnavailableError as error:
                        _log.debug("owners_not_noted", group=key[1], detail=str(error))
                    else:
                        self._saved_owners[key] = owners

    # Members and calls from other gateways.

    async def _on_member(self, message: Msg) -> None:
        self._spawn(self._coordinate(message.data, message.reply))

    async def _coordinate(self, opening: bytes, peer: str) -> None:
        name, subscribe = decode_opening(opening)
        key = (subscribe.kind, subscribe.group)

        async def join(emit: Emit) -> ServedSubscription:
            record = self._store.records.get(key)
            if record is None or record.gateway != self._gateway:
                raise GroupMovedError(subscribe.group)
            return await self._join_here(subscribe, emit, name)

        conversation = await Conversation.open(self._link, f"{self._members_root}.{self._gateway}", peer, self._lease_s)
        try:
            await serve_member(conversation, join)
        finally:
            await conversation.close()

    async def _on_call(self, message: Msg) -> None:
        self._spawn(answer_call(self._link, message, self._call_here))

    async def _call(self, call: GroupCall) -> int:
        self._check_known(call.kind, call.group)
        try:
            coordinator = await self._coordination.coordinator((call.kind, call.group))
            if coordinator == self._gateway:
                return await self._call_here(call)
            return await call_coordinator(self._link, f"{self._calls_root}.{coordinator}", call)
        except LogUnavailableError as error:
            raise from_log_error(error) from error

    async def _call_here(self, call: GroupCall) -> int:
        key = (call.kind, call.group)
        async with self._lock(key):
            await self._take(key)
        work = super().replay_dead_letters if call.name == "replay" else super().purge_dead_letters
        return await work(call.kind, call.group, call.offsets)

    def _check_known(self, kind: event_pb2.Kind.ValueType, group: str) -> None:
        check_kind("kind", kind)
        check_group("group", group)
        record = self._store.records.get((kind, group))
        if record is None or record.progress is None:
            self._group(kind, group)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Have something done that nobody waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(say_if_failed)


@contextlib.asynccontextmanager
async def open_cluster_broker(settings: OonaSettings) -> AsyncIterator[ClusterBroker]:
    """The bus of one more gateway, for as long as the context lasts.

    Raises:
        LogUnavailableError: no cluster answers, or it has no room, or is too old.
        LogDamagedError: the streams hold what no bus wrote.
    """
    log = await JetStreamLog.open(settings)
    try:
        broker = ClusterBroker(log, settings)
        async with broker.running():
            yield broker
    finally:
        await log.close()
