"""The client of the bus."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, NoReturn, Self

import grpc
import structlog

from esperml.client.connection import Connection, StreamEndedWithoutStatusError
from esperml.client.credentials import NO_CREDENTIALS, Credentials, explain
from esperml.client.errors import (
    ClientClosedError,
    DrainTimeoutError,
    OonaError,
    PublishTimeoutError,
    StreamEndedError,
    rejection,
)
from esperml.client.retry import RETRYABLE, RETRYABLE_REJECTIONS, Backoff
from esperml.client.subscribing import Subscribing
from esperml.client.window import ResendWindow
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from esperml.v1 import event_pb2

_log = structlog.get_logger(__name__)

WINDOW_BYTES: Final = 32 * 2**20
# A stream that was good for nothing counts as a failure unless it stood for so long, in s: what opens streams and drops
# them shall not be asked again and again.
_STEADY_S: Final = 1.0


class OonaClient(Subscribing):
    """Publishes to and subscribes from the bus; an async context manager.

    Entering does not wait for the server. In the background the client connects, and connects again whenever the
    stream breaks, for as long as it takes: what is unconfirmed goes out again with the same sequences and is stored
    once, and subscriptions go on where they were.

    Args:
        target: address of the server, for example ``localhost:50051``, or several, separated by commas, that serve
            the same bus: where one fails, the next is tried.
        client_id: names this publisher for ever; unique, for example ``session-<run>-<uuid>``. 1 to 128 characters.
        credentials: token and TLS, where the server asks for them.
        backoff: waiting times between tries.
    """

    def __init__(
        self,
        target: str,
        *,
        client_id: str,
        credentials: Credentials = NO_CREDENTIALS,
        backoff: Backoff | None = None,
    ) -> None:
        super().__init__(target, client_id, credentials, Backoff() if backoff is None else backoff)
        self._window = ResendWindow(client_id, WINDOW_BYTES)
        self._admission = asyncio.Lock()
        self._room = asyncio.Event()
        self._hold_publishing: asyncio.TimerHandle | None = None
        self._sealed = False
        self._last_refusal: OonaError | None = None
        self._max_frame_bytes = 0
        self._runner: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._runner = asyncio.create_task(self._run(), name=f"oona-client-{self._client_id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream at once. What is unconfirmed fails with :class:`ClientClosedError`. :meth:`drain` waits."""
        self._fail(ClientClosedError())
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner

    async def drain(self, *, timeout_s: float | None = 30.0) -> None:
        """Finish in good order, then close.

        Subscriptions take nothing more in: who iterates over them gets what has arrived, acknowledges it, and leaves,
        and may publish while doing so. Then nothing new is published, and what is under way is waited for. Call it from
        a task that iterates over no subscription of this client, or it waits for itself.

        Args:
            timeout_s: longest time to wait, in s. None: for ever.

        Raises:
            DrainTimeoutError: it took longer; the client is closed all the same.
            OonaError: the client had failed before; see :meth:`publish`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._subscriptions:
                    for subscription in self._subscriptions.values():
                        subscription.drain()
                    self._left.clear()
                    await self._left.wait()
                self._sealed = True
                async with self._admission:  # Behind all who publish already.
                    while self._window and self._failure is None:
                        self._room.clear()
                        await self._room.wait()
            if self._failure is not None:
                raise self._failure
        except TimeoutError as error:
            if timeout_s is None:
                raise
            raise DrainTimeoutError(timeout_s) from error
        finally:
            await self.close()

    @property
    def next_sequence(self) -> int:
        """Sequence of the next event to be sent, 0 before the first stream.

        Where nothing is under way, it tells how many events were stored under this client id since it was first used:
        one fewer.
        """
        return self._window.next_sequence

    async def connected(self) -> None:
        """Wait until there is a stream.

        Raises:
            OonaError: there will be none; see :meth:`publish`.
        """
        await self._connected.wait()
        if self._failure is not None:
            raise self._failure

    async def publish(
        self, kind: event_pb2.Kind.ValueType, events: Sequence[event_pb2.Event], *, timeout_s: float | None = None
    ) -> oona_pb2.Published:
        """Store events in the log of ``kind``, all or none. Returns when they are stored and synced.

        Calls may overlap; events are stored in the order of the calls. While the server is away or cannot store, this
        waits and the client goes on trying.

        Args:
            kind: the log.
            events: at least one. They are copied.
            timeout_s: longest time to wait, in s. None: for ever. After it the events may still be stored.

        Raises:
            RejectedError: the server refused; nothing was stored.
            FrameTooLargeError: the events are more than the server takes at once.
            PublishTimeoutError: not confirmed in time.
            ClientIdConflictError: another publisher uses the same client id.
            StreamEndedError: the server ended the stream for good.
            ClientClosedError: the client is closed or about to be.
        """
        if self._sealed:
            raise ClientClosedError
        request = oona_pb2.StreamRequest()
        request.publish.kind = kind
        request.publish.events.extend(events)
        try:
            async with asyncio.timeout(timeout_s):
                # One after the other through this door, so that a full window does not change the order.
                async with self._admission:
                    while self._window.full and self._failure is None:
                        self._room.clear()
                        await self._room.wait()
                    if self._failure is not None:
                        raise self._failure
                    frame = self._window.add(request)
                    self._to_send.set()
                return await frame.confirmed
        except TimeoutError:
            if timeout_s is None:
                raise
            raise PublishTimeoutError(timeout_s) from self._last_refusal

    # The stream.

    async def _run(self) -> None:
        """Keep a stream open until the client is closed or trying again is of no use."""
        try:
            await self._keep_a_stream()
        except OonaError as error:
            self._fail(error)
        finally:
            # Nobody must wait for ever for a client that has stopped, whatever stopped it.
            self._fail(ClientClosedError())

    async def _keep_a_stream(self) -> NoReturn:
        announced = False
        while True:
            try:
                await self._serve_a_stream()
            except grpc.aio.AioRpcError as error:
                if error.code() not in RETRYABLE:
                    raise StreamEndedError(error.code(), error.details() or "") from error
                detail = f"{error.code().name}: {explain(error.details() or '', self._credentials)}"
            except TimeoutError:
                detail = "no answer"
            except StreamEndedWithoutStatusError as error:
                detail = str(error)
            was_connected = self.is_connected
            self._lose_stream()
            if was_connected or not announced:
                _log.warning("server_unreachable", target=self._target, client_id=self._client_id, detail=detail)
                announced = True
            self._addresses.move_on()
            await asyncio.sleep(self._backoff.next_delay())

    async def _serve_a_stream(self) -> None:
        connection = await self._reconnect()
        opened_s = asyncio.get_running_loop().time()
        sender = asyncio.create_task(self._send_queued(connection))
        try:
            async for response in connection.responses():
                self._dispatch(response)
        finally:
            if asyncio.get_running_loop().time() > opened_s + _STEADY_S:
                self._backoff.reset()
            sender.cancel()
            await asyncio.wait([sender])
            await connection.close()

    async def _reconnect(self) -> Connection:
        """Open a stream and make it carry on where the last one broke off."""
        connection = await Connection.open(self._target, self._client_id, self._credentials)
        try:
            # Unconfirmed frames go out again, with the same sequences.
            lost = self._window.resume(connection.opened.next_sequence)
        except OonaError:
            await connection.close()
            raise
        if lost:
            _log.error("server_lost_confirmed_events", target=self._target, client_id=self._client_id, events=lost)
        self._outbox.clear()
        self._max_frame_bytes = connection.opened.max_frame_bytes
        self._connected.set()
        self._room.set()
        # Subscriptions go on behind the last record that came, with their credit granted again.
        for subscription in list(self._subscriptions.values()):
            self._send_subscription(subscription)
        self._to_send.set()
        _log.info("server_connected", target=self._target, client_id=self._client_id, resent=len(self._window))
        return connection

    async def _send_queued(self, connection: Connection) -> None:
        while True:
            self._to_send.clear()
            while (request := self._next_request()) is not None:
                try:
                    await connection.send(request)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # The receiving side sees the same status, and acts on it.
            await self._to_send.wait()

    def _next_request(self) -> oona_pb2.StreamRequest | None:
        if self._outbox:
            return self._outbox.popleft()
        if self._hold_publishing is not None:
            return None
        if self._window.refuse_next_if_larger_than(self._max_frame_bytes):
            self._room.set()
        return self._window.next_to_send(next(self._request_ids))

    def _dispatch(self, response: oona_pb2.StreamResponse) -> None:
        """Hand one frame of the server to whom it concerns."""
        match response.WhichOneof("response"):
            case "delivery":
                if subscription := self._subscriptions.get(response.delivery.subscription_id):
                    subscription.on_delivery(response.delivery.records)
                    self._backoff.reset()
            case "published":
                self._window.confirm(response.request_id, response.published)
                self._last_refusal = None
                self._backoff.reset()
                self._room.set()
            case "progress":
                if subscription := self._subscriptions.get(response.progress.subscription_id):
                    subscription.on_progress(response.progress.high_watermark)
            case "closed" if not response.request_id:
                if subscription := self._subscriptions.get(response.closed.subscription_id):
                    subscription.on_closed(response.closed)
            case "rejected" if self._window.under_way(response.request_id):
                self._on_publish_rejected(response.request_id, response.rejected)
            case name:
                if answer := self._answers.pop(response.request_id, None):
                    answer(response)
                elif name == "rejected":
                    # A frame behind one that was refused, which goes out again, or credit for what has just ended.
                    _log.debug("request_rejected", client_id=self._client_id, message=response.rejected.message)

    def _on_publish_rejected(self, request_id: int, rejected: oona_pb2.Rejected) -> None:
        error = rejection(rejected)
        if error.reason in RETRYABLE_REJECTIONS:
            # Everything behind it leaves a gap now and is refused as well: all of it goes out again, later.
            if self._last_refusal is None:
                _log.warning("publishing_waits", target=self._target, detail=error.message)
            self._last_refusal = error
            self._window.rewind()
            delay = self._backoff.next_delay(error.retry_after_s or 0.0)
            self._hold_publishing = asyncio.get_running_loop().call_later(delay, self._publish_again)
        else:
            self._window.refuse(request_id, error)
            self._to_send.set()
            self._room.set()

    def _publish_again(self) -> None:
        self._hold_publishing = None
        self._to_send.set()

    def _lose_stream(self) -> None:
        """Tell everyone who waits for an answer of the stream that is gone."""
        self._connected.clear()
        if self._hold_publishing is not None:
            self._hold_publishing.cancel()
            self._hold_publishing = None
        self._lose_requests()

    def _fail(self, error: OonaError) -> None:
        """End everything with an error. The first one stays."""
        if self._failure is not None:
            return
        self._failure = error
        self._lose_stream()
        self._window.fail(error)
        for subscription in list(self._subscriptions.values()):
            subscription.fail(error)
        self._subscriptions.clear()
        self._left.set()
        self._room.set()
        self._connected.set()
