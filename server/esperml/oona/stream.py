"""One open stream: reads requests, answers them in order, and sends what its subscriptions have."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc

from esperml.oona.log import Appended, LogDamagedError, LogError, LogMovedError, LogUnavailableError
from esperml.oona.ranges import RangeSet
from esperml.oona.rejection import RequestRejectedError, from_log_error, invalid
from esperml.oona.validation import check_ack, check_client_id, check_grant
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from esperml.oona.admission import Admission
    from esperml.oona.broker import Broker
    from esperml.oona.subscriptions import ServedSubscription

# Frames that wait for the transport; a client that reads nothing costs no more than these.
_OUTBOX_FRAMES: Final = 4
# Streams are limited in number: one whose client says nothing must not keep a place for ever.
_OPEN_TIMEOUT_S: Final = 10.0
# Requests and bytes of them that may wait for the log before no more are read.
_UNANSWERED_REQUESTS: Final = 1024
_UNANSWERED_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class UnreadableFrame:
    """What came instead of a request: bytes that are none, or too many of them.

    Attributes:
        size: how many bytes.
        problem: what is wrong with them.
    """

    size: int
    problem: str


class StreamEndedError(Exception):
    """The stream must end with a status.

    Attributes:
        code: the status.
        detail: in words.
    """

    def __init__(self, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Unanswered:
    """A request whose answer is due when the log has stored something, or at once where ``stored`` is None."""

    request_id: int
    size: int
    stored: asyncio.Future[Any] | None
    response: Callable[[Any], oona_pb2.StreamResponse]


class ClientStream:
    """Serves one client.

    Args:
        broker: the bus.
        admission: what the client may do.
        read: gives the next frame, or None when the client sends no more.
        write: sends a frame; waits while the transport is full.

    Attributes:
        client_id: under which name its sequence is kept, once the stream is open.
    """

    def __init__(
        self,
        broker: Broker,
        admission: Admission,
        read: Callable[[], Awaitable[oona_pb2.StreamRequest | UnreadableFrame | None]],
        write: Callable[[oona_pb2.StreamResponse | bytes], Awaitable[None]],
    ) -> None:
        self.client_id = ""
        self._open_request_id = 0
        self._broker = broker
        self._admission = admission
        self._read = read
        self._write = write
        self._subscriptions: dict[int, tuple[ServedSubscription, asyncio.Task[None]]] = {}
        # Those that ended unasked: the client may not know yet, and its credit for them is no mistake.
        self._ended_subscriptions = RangeSet()
        self._outbox: asyncio.Queue[oona_pb2.StreamResponse | bytes] = asyncio.Queue(_OUTBOX_FRAMES)
        # Whoever has something to send waits here: a queue alone lets those in first who come at the right moment.
        self._turn = asyncio.Lock()
        self._unanswered: asyncio.Queue[_Unanswered] = asyncio.Queue(_UNANSWERED_REQUESTS)
        self._unanswered_bytes = 0
        self._answered = asyncio.Event()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, code: grpc.StatusCode, detail: str) -> None:
        """End the stream with a status, from outside."""
        if not self._ended.done():
            self._ended.set_exception(StreamEndedError(code, detail))
            # A stream that ends of itself at this moment has no use for it.
            self._ended.exception()

    async def open(self) -> None:
        """Read the first frame.

        Raises:
            StreamEndedError: it is not a proper Open.
        """
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                request = await self._next_request()
        except TimeoutError:
            request = None
        name = "nothing" if request is None else request.WhichOneof("request") or "empty"
        if request is None or name != "open":
            raise StreamEndedError(grpc.StatusCode.INVALID_ARGUMENT, f"request: the first must be open, but is {name}")
        try:
            if not request.request_id:
                raise invalid("request_id", "must be above 0")
            check_client_id(request.open.client_id)
        except RequestRejectedError as error:
            raise StreamEndedError(grpc.StatusCode.INVALID_ARGUMENT, error.message) from error
        self.client_id = self._admission.publisher(request.open.client_id, self.end)
        self._open_request_id = request.request_id

    async def serve(self) -> None:
        """Answer Open and everything after it, until the client has finished and has got what it asked for.

        Raises:
            StreamEndedError: the stream must end with this status.
        """
        opened = await self._opened()
        await self._write(oona_pb2.StreamResponse(request_id=self._open_request_id, opened=opened))
        try:
            async with asyncio.TaskGroup() as tasks:
                helpers = [tasks.create_task(work()) for work in (self._send, self._answer, self._watch_end)]
                await self._receive(tasks)
                await self._unanswered.join()
                while self._subscriptions:
                    await asyncio.wait([task for _, task in self._subscriptions.values()])
                await self._outbox.join()
                for helper in helpers:
                    helper.cancel()
        except BaseExceptionGroup as group:
            ends, others = group.split(StreamEndedError)
            if ends is None or others is not None:
                raise
            raise _first(ends) from None
        finally:
            for subscription, _ in self._subscriptions.values():
                subscription.close()

    async def _opened(self) -> oona_pb2.Opened:
        try:
            next_sequence = await self._broker.next_sequence(self.client_id)
        except LogUnavailableError as error:
            raise StreamEndedError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        return oona_pb2.Opened(
            next_sequence=next_sequence,
            max_frame_bytes=self._broker.settings.max_frame_bytes,
            durability=self._broker.durability,
        )

    async def _watch_end(self) -> None:
        await asyncio.shield(self._ended)

    async def _put(self, response: oona_pb2.StreamResponse | bytes) -> None:
        """Send a frame behind those for which this was called before; waits while the client takes nothing."""
        async with self._turn:
            await self._outbox.put(response)

    async def _send(self) -> None:
        while True:
            await self._write(await self._outbox.get())
            self._outbox.task_done()

    async def _answer(self) -> None:
        """Answer what waits for the log, in the order in which it was asked."""
        while True:
            unanswered = await self._unanswered.get()
            try:
                outcome = None if unanswered.stored is None else await unanswered.stored
                response = unanswered.response(outcome)
            except LogMovedError as error:
                # Nothing is wrong: the client opens a stream where it is now, and what it did not hear of comes again.
                raise StreamEndedError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
            except LogError as error:
                response = self._rejected(from_log_error(error), None)
                if isinstance(error, LogUnavailableError):
                    self._admission.not_stored(str(error))
            response.request_id = unanswered.request_id
            await self._put(response)
            self._unanswered_bytes -= unanswered.size
            self._answered.set()
            self._unanswered.task_done()

    def _rejected(self, error: RequestRejectedError, _: None) -> oona_pb2.StreamResponse:
        self._broker.rejections[error.reason] += 1
        return oona_pb2.StreamResponse(rejected=error.to_proto())

    async def _next_request(self) -> oona_pb2.StreamRequest | None:
        frame = await self._read()
        if isinstance(frame, UnreadableFrame):
            limit = self._broker.settings.max_frame_bytes
            if frame.size > limit:
                raise StreamEndedError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"a frame has {frame.size} bytes; the limit is {limit}"
                )
            raise StreamEndedError(grpc.StatusCode.INVALID_ARGUMENT, f"a frame is malformed: {frame.problem}")
        return frame

    async def _receive(self, tasks: asyncio.TaskGroup) -> None:
        while (request := await self._next_request()) is not None:
            try:
                await self._handle(request, tasks)
            except RequestRejectedError as error:
                # Behind what is not answered yet, so that a publisher sees the first refusal first.
                rejected = partial(self._rejected, error)
                await self._unanswered.put(_Unanswered(request.request_id, 0, None, rejected))

    async def _handle(self, request: oona_pb2.StreamRequest, tasks: asyncio.TaskGroup) -> None:
        """Do what a request asks, or raise :class:`RequestRejectedError`."""
        name = request.WhichOneof("request")
        if not request.request_id:
            raise invalid("request_id", "must be above 0")
        match name:
            case "publish":
                await self._publish(request)
            case "ack":
                await self._ack(request)
            case "grant":
                check_grant(request.grant)
                subscription_id = request.grant.subscription_id
                if subscription_id in self._subscriptions or subscription_id not in self._ended_subscriptions:
                    subscription, _ = self._subscription("grant", subscription_id)
                    subscription.grant(request.grant.messages, request.grant.bytes)
            case "subscribe":
                await self._subscribe(request, tasks)
            case "unsubscribe":
                await self._unsubscribe(request)
            case "open":
                raise StreamEndedError(grpc.StatusCode.INVALID_ARGUMENT, "request: open may only be the first")
            case _:
                raise invalid("request", "is required, and must be one that this server knows")

    async def _publish(self, request: oona_pb2.StreamRequest) -> None:
        await self._admission.check_publish(request.publish)
        while self._unanswered_bytes > _UNANSWERED_BYTES:
            self._answered.clear()
            await self._answered.wait()
        if self._ended.done():
            # Its successor may have been told the next sequence already: what was stored now would take its place.
            self._ended.result()
        stored = self._broker.publish(self.client_id, request.publish, self._admission.check_runs)
        size = request.ByteSize()
        self._unanswered_bytes += size
        await self._unanswered.put(_Unanswered(request.request_id, size, stored, _published))

    async def _ack(self, request: oona_pb2.StreamRequest) -> None:
        check_ack(request.ack)
        subscription, _ = self._subscription("ack", request.ack.subscription_id)
        stored = subscription.ack(request.ack)
        await self._unanswered.put(_Unanswered(request.request_id, 0, stored, _acked))

    async def _subscribe(self, request: oona_pb2.StreamRequest, tasks: asyncio.TaskGroup) -> None:
        subscription_id = request.subscribe.subscription_id
        if subscription_id in self._subscriptions:
            raise invalid("subscribe.subscription_id", f"{subscription_id} is in use on this stream")
        self._admission.check_subscribe(request.subscribe, len(self._subscriptions))
        try:
            reader = f"{self.client_id}/{subscription_id}"
            subscription = await self._broker.subscribe(request.subscribe, self._put, reader)
        except LogDamagedError as error:
            raise StreamEndedError(grpc.StatusCode.DATA_LOSS, str(error)) from error
        except LogUnavailableError as error:
            raise StreamEndedError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        subscribed = oona_pb2.Subscribed(
            subscription_id=subscription_id,
            start_offset=subscription.start_offset,
            high_watermark=subscription.high_watermark,
        )
        try:
            await self._put(oona_pb2.StreamResponse(request_id=request.request_id, subscribed=subscribed))
        except asyncio.CancelledError:
            subscription.close()
            raise
        task = tasks.create_task(self._run_subscription(subscription))
        self._subscriptions[subscription_id] = (subscription, task)

    async def _run_subscription(self, subscription: ServedSubscription) -> None:
        try:
            await subscription.run()
        except LogDamagedError as error:
            raise StreamEndedError(grpc.StatusCode.DATA_LOSS, str(error)) from error
        except LogUnavailableError as error:
            raise StreamEndedError(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        subscription_id = subscription.subscription_id
        self._subscriptions.pop(subscription_id)
        self._ended_subscriptions.add(subscription_id, subscription_id)
        subscription.close()

    async def _unsubscribe(self, request: oona_pb2.StreamRequest) -> None:
        subscription_id = request.unsubscribe.subscription_id
        subscription, task = self._subscription("unsubscribe", subscription_id)
        task.cancel()
        await asyncio.wait([task])
        if self._subscriptions.pop(subscription_id, None) is not None:
            subscription.close()
        closed = oona_pb2.Closed(subscription_id=subscription_id, reason=oona_pb2.CLOSE_REASON_UNSUBSCRIBED)
        await self._put(oona_pb2.StreamResponse(request_id=request.request_id, closed=closed))

    def _subscription(self, request: str, subscription_id: int) -> tuple[ServedSubscription, asyncio.Task[None]]:
        if (found := self._subscriptions.get(subscription_id)) is None:
            raise RequestRejectedError(
                oona_pb2.REJECT_REASON_UNKNOWN_SUBSCRIPTION,
                f"{request}.subscription_id: {subscription_id} is not a subscription of this stream",
            )
        return found


def _acked(committed: int) -> oona_pb2.StreamResponse:
    return oona_pb2.StreamResponse(acked=oona_pb2.Acked(committed_offset=committed))


def _published(appended: Appended) -> oona_pb2.StreamResponse:
    published = oona_pb2.Published(count=appended.count, duplicates=appended.duplicates)
    if appended.count:
        published.first_offset = appended.first_offset
    return oona_pb2.StreamResponse(published=published)


def _first(group: BaseExceptionGroup[StreamEndedError]) -> StreamEndedError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
