"""The link to a server: one background thread, so that the training thread never waits for network or disk."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog

from esperml.client.credentials import NO_CREDENTIALS, Credentials
from esperml.client.errors import (
    BehindFloorError,
    BelowFloorError,
    CredentialsError,
    ForbiddenError,
    FrameTooLargeError,
    InvalidRequestError,
    OonaError,
    RejectedError,
    StreamEndedError,
)
from esperml.client.oona import OonaClient
from esperml.contract import kind_name
from esperml.kasmina.backlog import Backlog, Batch
from esperml.kasmina.leftovers import send_leftovers
from esperml.kasmina.link import LinkStatistics
from esperml.kasmina.outbox import MAX_OTHERS, MAX_REPORTS, Outbox
from esperml.kasmina.spool import SpoolOptions
from esperml.v1 import event_pb2

if TYPE_CHECKING:
    from esperml.kasmina.link import Kind

_log = structlog.get_logger(__name__)

SPOOLED: Final = SpoolOptions()
"""Where what cannot be sent is kept unless the user says otherwise."""

_FRAME_INTERVAL_S: Final = 0.1
_UNREACHED_TIMEOUT_S: Final = 1.0
_SETTLE_S: Final = 0.02
# Time for the thread to break off what it is at, in s. One that hangs for longer is left to end with the process.
_BREAK_OFF_TIMEOUT_S: Final = 5.0
_REFUSED_RETRY_S: Final = 10.0
# Time before commands are asked for anew, where what was to be read next is not there, in s.
_RESTART_S: Final = 1.0
# Time for which what must not be lost waits in memory before it is written to disk, in s.
_KEEP_AFTER_S: Final = 1.0


class GrpcLink:
    """A link to the server at ``target``; see :class:`~esperml.kasmina.link.Link`.

    Making one neither waits nor fails: a server that is not there yet, or goes away, is waited for in the background
    while what is to be sent queues up to a bound. What is no report is written to disk after 1 s, whence this session
    sends it once it can, or a later one. The run's commands are subscribed to before anything is sent, so that none is
    missed. A server that refuses the token, or what the token is used for, is told of once in the log and asked again
    every 10 s: tokens are renewed, and rights are changed, while runs go on.

    Args:
        target: address of the server, for example ``localhost:50051``.
        run_id: the run whose commands to read.
        credentials: token and TLS, where the server asks for them.
        spool: where what cannot be sent is kept; ``None``: nowhere.
    """

    def __init__(
        self,
        target: str,
        run_id: str,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        spool: SpoolOptions | None = SPOOLED,
    ) -> None:
        self._target = target
        self._run_id = run_id
        self._credentials = credentials
        self._told: set[str] = set()
        self._spool = spool
        self._client_id = f"session-{uuid.uuid4().hex}"
        self._outbox = Outbox(MAX_REPORTS, MAX_OTHERS)
        self._backlog = Backlog(self._outbox, spool, target=target, run_id=run_id, client_id=self._client_id)
        self._received: deque[event_pb2.Event] = deque()
        self._sender_seconds = 0.0
        self._oona: OonaClient | None = None
        self._idle = False  # The sender waits for something to send, and wants to be told.
        self._closing = False
        self._cancelled = False
        self._all_sent: bool | None = None  # Known once it is closed.
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name=f"esper-link-{run_id}", daemon=True)
        self._thread.start()

    def publish(self, kind: Kind, event: event_pb2.Event) -> None:
        """Queue an event. Where the queue in memory is full, the oldest of its sort is dropped and counted."""
        self._outbox.put(kind, event)
        idle, self._idle = self._idle, False
        if idle:
            self._notify()

    def received(self) -> list[event_pb2.Event]:
        """What was sent to the run since the last call, oldest first."""
        received: list[event_pb2.Event] = []
        while self._received:
            received.append(self._received.popleft())
        return received

    def statistics(self) -> LinkStatistics:
        """What the link did so far."""
        oona = self._oona
        connected = self._all_sent if self._all_sent is not None else oona is not None and oona.is_connected
        outbox = self._outbox
        return LinkStatistics(
            outbox.reports_dropped, outbox.others_dropped, self._sender_seconds, connected, self._backlog.spooled
        )

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most ``timeout_s`` seconds, 1 s where there is no server, and end the thread.

        What is no report, and could not be sent, is on the disk then.

        A thread that cannot be ended, because something beneath it hangs, is left behind after 5 s more: the training
        loop goes on, and the process ends without it.
        """
        self._closing = True
        self._notify()
        self._thread.join(timeout_s if self.statistics().connected else min(timeout_s, _UNREACHED_TIMEOUT_S))
        if self._thread.is_alive():
            self._call_soon(self._cancel)
            self._thread.join(_BREAK_OFF_TIMEOUT_S)
            if self._thread.is_alive():
                _log.warning("link_left_behind", target=self._target, run_id=self._run_id)
        left = self._backlog.unsent
        self._all_sent = left == 0
        if left:
            _log.warning("events_not_sent", target=self._target, run_id=self._run_id, events=left)

    def _notify(self) -> None:
        self._call_soon(self._wake.set)

    def _call_soon(self, callback: Any) -> None:
        # Once the link is closed there is nobody to tell.
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(callback)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise

    def _cancel(self) -> None:
        self._cancelled = True
        if self._main is not None:
            self._main.cancel()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._work())
            except asyncio.CancelledError:
                _log.debug("link_cancelled", target=self._target, run_id=self._run_id)
            finally:
                self._oona = None
        self._backlog.keep()
        self._backlog.close()
        self._sender_seconds = time.thread_time()

    async def _work(self) -> None:
        self._main = asyncio.current_task()
        if self._cancelled:  # Before there was anything to cancel.
            return
        keeper = asyncio.create_task(self._keep_regularly())
        try:
            while await self._is_refused() and not await self._closes_within(_REFUSED_RETRY_S):
                pass
        except OonaError as error:
            _log.warning("link_ended", target=self._target, run_id=self._run_id, error=str(error))
            await self._closes_within(None)
        finally:
            keeper.cancel()
        # gRPC hands late events of a closed stream to its loop through any other loop of the process, which complains
        # aloud where that loop is gone.
        await asyncio.sleep(_SETTLE_S)

    async def _keep_regularly(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_AFTER_S)
            self._backlog.keep(older_than_s=_KEEP_AFTER_S)

    async def _is_refused(self) -> bool:
        """Serve until told to close. True where the server did not take the token, which may change."""
        try:
            await self._serve()
        except CredentialsError as error:
            self._tell_once("credentials_unusable", str(error))
        except StreamEndedError as error:
            if error.code is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            self._tell_once("token_refused", error.detail)
        else:
            return False
        return True

    async def _serve(self) -> None:
        """Send and read until told to close. Raises :class:`OonaError` where the server will have none of it."""
        asked = asyncio.Event()
        async with OonaClient(self._target, client_id=self._client_id, credentials=self._credentials) as oona:
            self._oona = oona
            try:
                await _first_of(self._send(oona, asked), self._read(oona, asked))
            finally:
                self._oona = None

    async def _read(self, oona: OonaClient, asked: asyncio.Event) -> None:
        """Read what is sent to the run, once the server allows it; ``asked`` is set as soon as it has been asked."""
        while True:
            try:
                async with oona.subscribe(event_pb2.KIND_COMMANDS, run_ids=[self._run_id]) as subscription:
                    asked.set()
                    async for record in subscription:
                        self._received.append(record.event)
            except ForbiddenError as error:
                self._tell_once("commands_forbidden", error.message)
                asked.set()
                await asyncio.sleep(_REFUSED_RETRY_S)
            except (BelowFloorError, BehindFloorError, InvalidRequestError) as error:
                # Commands were purged meanwhile, or the server has another log: go on with what comes from now on.
                self._tell_once("commands_lost", str(error))
                await asyncio.sleep(_RESTART_S)

    async def _send(self, oona: OonaClient, asked: asyncio.Event) -> None:
        await asked.wait()
        if self._spool is not None:
            # First of all: what an earlier session of this run says must not come after what this one says.
            await send_leftovers(self._spool, self._target, self._credentials)
        self._backlog.resume(oona.next_sequence)
        publishers = {self._client_id: oona}
        async with AsyncExitStack() as stack:
            while True:
                if batch := self._backlog.take(oona.next_sequence):
                    if (publisher := publishers.get(batch.client_id)) is None:
                        publisher = await stack.enter_async_context(
                            OonaClient(self._target, client_id=batch.client_id, credentials=self._credentials)
                        )
                        publishers[batch.client_id] = publisher
                    await self._publish(publisher, batch)
                    if len(publishers) > 1 and not self._backlog.spooled:
                        await stack.aclose()
                        publishers = {self._client_id: oona}
                elif self._closing:
                    return
                else:
                    await self._rest()
                self._sender_seconds = time.thread_time()

    async def _publish(self, publisher: OonaClient, batch: Batch) -> None:
        stored = False
        try:
            await publisher.publish(batch.kind, [entry.event for entry in batch.entries])
            stored = True
        except ForbiddenError as error:
            self._tell_once(f"{kind_name(batch.kind)}_forbidden", error.message)
            self._outbox.drop(batch.kind, len(batch.entries))
        except (RejectedError, FrameTooLargeError) as error:
            _log.warning("events_refused", kind=kind_name(batch.kind), events=len(batch.entries), error=str(error))
        except (OonaError, asyncio.CancelledError):
            self._backlog.put_back()
            raise
        self._backlog.done(stored=stored)

    async def _rest(self) -> None:
        """Wait for something to send, and not less than the least time between frames; the end cuts it short.

        Waking the thread and sending a frame cost far more than an event: what fast steps say shares both.
        """
        self._sender_seconds = time.thread_time()
        pause = self._loop.call_later(_FRAME_INTERVAL_S, self._wake.set)
        await self._wake.wait()
        pause.cancel()
        self._wake.clear()
        # Said before it is looked at, so that what is published meanwhile is not missed.
        self._idle = True
        if self._backlog.unsent or self._closing:
            self._idle = False
        else:
            await self._wake.wait()
            self._wake.clear()

    async def _closes_within(self, seconds: float | None) -> bool:
        """Wait, and no longer than until the link is closed. Whether it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._closing:
                    self._wake.clear()
                    await self._wake.wait()
        return self._closing

    def _tell_once(self, event: str, detail: str) -> None:
        """Say in the log what keeps the link from its work, if it has not been said."""
        if event not in self._told:
            self._told.add(event)
            _log.warning(event, target=self._target, run_id=self._run_id, detail=detail)


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run until one of ``works`` ends or fails, then cancel the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task
    finally:
        for task in tasks:
            task.cancel()
