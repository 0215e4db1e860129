"""The bus for programs without asyncio: the same client, whose calls wait instead of being awaited."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Self

from esperml.client.background import background_loop
from esperml.client.credentials import NO_CREDENTIALS, Credentials
from esperml.client.errors import ClientClosedError
from esperml.client.oona import OonaClient
from esperml.client.subscribing import CREDIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from datetime import timedelta
    from types import TracebackType
    from typing import Any, TypeVar

    from esperml.client.background import BackgroundLoop
    from esperml.client.retry import Backoff
    from esperml.client.subscription import Subscription
    from esperml.v1 import event_pb2, oona_pb2

    _T = TypeVar("_T")


class SyncOonaClient:
    """Publishes to and subscribes from the bus without asyncio; a context manager.

    Everything is as with :class:`~esperml.client.OonaClient`, arguments and errors included, but that calls wait. It
    may be used from several threads. The network's work is done in a thread in the background, one for all such clients
    of a process.

    A call that is interrupted, by Ctrl-C for example, is given up: what it was to publish may still be stored. A
    process that is forked cannot use its parent's clients: calls raise :class:`ForkedClientError`. When the interpreter
    ends, clients that are still open are closed as by :meth:`close`.

    >>> from esperml.client import SyncOonaClient, new_event
    >>> from esperml.v1 import event_pb2
    >>> def follow(run_id):
    ...     with SyncOonaClient("localhost:50051", client_id="example-2") as oona:
    ...         with oona.subscribe(event_pb2.KIND_EVENTS, run_ids=[run_id], group="example") as records:
    ...             for record in records:
    ...                 print(record.event)
    ...                 records.ack(record)
    """

    def __init__(
        self,
        target: str,
        *,
        client_id: str,
        credentials: Credentials = NO_CREDENTIALS,
        backoff: Backoff | None = None,
    ) -> None:
        self._oona = OonaClient(target, client_id=client_id, credentials=credentials, backoff=backoff)
        self._loop = background_loop()
        self._entered = False

    def __enter__(self) -> Self:
        self._loop.acquire()
        self._entered = True
        try:
            self._call(self._oona.__aenter__())
        except BaseException:
            self._entered = False
            self._loop.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream at once. What is unconfirmed fails with :class:`ClientClosedError`. :meth:`drain` waits."""
        if self._entered:
            try:
                self._call(self._oona.close())
            finally:
                self._leave()

    def drain(self, *, timeout_s: float | None = 30.0) -> None:
        """Finish in good order, then close; see :meth:`OonaClient.drain`.

        Call it from a thread that iterates over no subscription of this client.
        """
        try:
            self._call(self._oona.drain(timeout_s=timeout_s))
        finally:
            self._leave()

    @property
    def is_connected(self) -> bool:
        """Whether there is a stream now."""
        return self._oona.is_connected

    @property
    def next_sequence(self) -> int:
        """Sequence of the next event to be sent; see :attr:`OonaClient.next_sequence`."""
        return self._oona.next_sequence

    def connected(self) -> None:
        """Wait until there is a stream; see :meth:`OonaClient.connected`."""
        self._call(self._oona.connected())

    def publish(
        self, kind: event_pb2.Kind.ValueType, events: Sequence[event_pb2.Event], *, timeout_s: float | None = None
    ) -> oona_pb2.Published:
        """Store events, all or none. Returns when they are stored and synced; see :meth:`OonaClient.publish`."""
        return self._call(self._oona.publish(kind, events, timeout_s=timeout_s))

    def publish_soon(
        self, kind: event_pb2.Kind.ValueType, events: Sequence[event_pb2.Event], *, timeout_s: float | None = None
    ) -> Future[oona_pb2.Published]:
        """Begin to store events, all or none, and return what stands for the confirmation.

        Events are stored in the order of the calls, many frames at a time, which is what makes a publisher fast. They
        must not be changed before the future is done. Arguments, and errors of the future: as for :meth:`publish`.
        """
        return self._loop.start(self._oona.publish(kind, events, timeout_s=timeout_s))

    def subscribe(
        self,
        kind: event_pb2.Kind.ValueType,
        *,
        run_ids: Iterable[str] = (),
        group: str = "",
        start: oona_pb2.StartAt | None = None,
        end_offset: int | None = None,
        ack_deadline: timedelta | None = None,
        redelivery: oona_pb2.Redelivery | None = None,
        credit: int = 1024,
        credit_bytes: int = CREDIT_BYTES,
    ) -> SyncSubscription:
        """Ask for records of ``kind``. Enter what is returned with ``with``, and iterate over it.

        Arguments as for :meth:`OonaClient.subscribe`.
        """
        subscription = self._oona.subscribe(
            kind,
            run_ids=run_ids,
            group=group,
            start=start,
            end_offset=end_offset,
            ack_deadline=ack_deadline,
            redelivery=redelivery,
            credit=credit,
            credit_bytes=credit_bytes,
        )
        return SyncSubscription(subscription, self._loop)

    def topics(self) -> list[oona_pb2.Topic]:
        """The topics, one a kind. Raises :class:`CallFailedError`."""
        return self._call(self._oona.topics())

    def describe(self, kind: event_pb2.Kind.ValueType) -> oona_pb2.DescribeTopicResponse:
        """One topic, with its groups and their lag. Raises :class:`CallFailedError`."""
        return self._call(self._oona.describe(kind))

    def purge(self, kind: event_pb2.Kind.ValueType, before: int) -> int:
        """Delete records below offset ``before``; see :meth:`OonaClient.purge`."""
        return self._call(self._oona.purge(kind, before))

    def dead_letters(
        self, kind: event_pb2.Kind.ValueType, group: str, *, from_offset: int = 0
    ) -> Iterator[oona_pb2.DeadLetter]:
        """What a group gave up on, by offset; see :meth:`OonaClient.dead_letters`."""
        found = self._oona.dead_letters(kind, group, from_offset=from_offset)

        async def following() -> oona_pb2.DeadLetter | None:
            return await anext(found, None)

        while (dead_letter := self._call(following())) is not None:
            yield dead_letter

    def replay_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Iterable[int] = ()) -> int:
        """Give dead letters back to their group; see :meth:`OonaClient.replay_dead_letters`."""
        return self._call(self._oona.replay_dead_letters(kind, group, offsets))

    def purge_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Iterable[int] = ()) -> int:
        """Delete dead letters; see :meth:`OonaClient.purge_dead_letters`."""
        return self._call(self._oona.purge_dead_letters(kind, group, offsets))

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self._loop.call(work)

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._loop.release()


class SyncSubscription:
    """Records of one kind: a context manager and an iterator; see :class:`~esperml.client.Subscription`.

    One thread iterates; any other may call :meth:`drain`, after which iteration ends behind what has arrived.
    """

    def __init__(self, subscription: Subscription, loop: BackgroundLoop) -> None:
        self._subscription = subscription
        self._loop = loop
        # Records are fetched as many at a time as there are: each change of threads costs as much as dozens of them.
        self._fetched: deque[event_pb2.Record] = deque()

    @property
    def start_offset(self) -> int:
        """Offset from which it reads, as the server said when it last took the subscription."""
        return self._subscription.start_offset

    @property
    def high_watermark(self) -> int:
        """Offset of the next record to be stored, as far as the server has told."""
        return self._subscription.high_watermark

    def __enter__(self) -> Self:
        self._loop.call(self._subscription.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unsubscribe()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> event_pb2.Record:
        if not self._fetched:
            self._fetched.extend(self._loop.call(self._fetch()))
        if not self._fetched:
            raise StopIteration
        return self._fetched.popleft()

    def batches(self) -> Iterator[list[event_pb2.Record]]:
        """Iterate over whatever has arrived, at least one record at a time."""
        for record in self:
            batch = [record, *self._fetched]
            self._fetched.clear()
            yield batch

    def caught_up(self) -> None:
        """Wait until the server has sent everything there was, or the subscription has ended."""
        self._loop.call(self._subscription.caught_up())

    def ack(self, *records: event_pb2.Record) -> int | None:
        """Say that records are done with, and wait until the server has stored it; see :meth:`Subscription.ack`."""
        return self._loop.call(self._subscription.ack(*records))

    def nack(self, record: event_pb2.Record) -> None:
        """Give a record back, to be delivered again with the later ones of its run; see :meth:`Subscription.nack`."""
        run_id, offset = record.event.run_id, record.offset
        self._fetched = deque(r for r in self._fetched if r.event.run_id != run_id or r.offset < offset)
        self._loop.call(self._subscription.nack(record))

    def extend(self, *records: event_pb2.Record) -> None:
        """Say that records are still being worked on: their deadline starts anew."""
        self._loop.call(self._subscription.extend(*records))

    def drain(self) -> None:
        """Take nothing more in. What has arrived can still be iterated over and acknowledged; then iteration ends."""

        async def drain() -> None:
            self._subscription.drain()

        self._loop.call(drain())

    def unsubscribe(self) -> None:
        """End the subscription and forget what has arrived."""
        self._fetched.clear()
        try:
            self._loop.call(self._subscription.unsubscribe())
        except ClientClosedError:
            return  # The client was closed first, and the subscription ended with it.

    async def _fetch(self) -> list[event_pb2.Record]:
        batches = self._subscription.batches()
        try:
            return await anext(batches, [])
        finally:
            await batches.aclose()
