"""The link to a server: one background thread, so that the training thread never waits for the network."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeAlias

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
from esperml.kasmina.link import LinkStatistics
from esperml.v1 import event_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esperml.kasmina.link import Kind

    # Where it stands among all that was published, what it is, and itself.
    _Entry: TypeAlias = "tuple[int, Kind, event_pb2.Event]"

_log = structlog.get_logger(__name__)

MAX_REPORTS: Final = 256
"""Reports that wait to be sent; the oldest goes when another comes."""

MAX_OTHERS: Final = 4096
"""Events and outcomes that wait to be sent; likewise."""

_FRAME_EVENTS: Final = 64
_FRAME_INTERVAL_S: Final = 0.1
_UNREACHED_TIMEOUT_S: Final = 1.0
_SETTLE_S: Final = 0.02
# Time for the thread to break off what it is at, in s. One that hangs for longer is left to end with the process.
_BREAK_OFF_TIMEOUT_S: Final = 5.0
_REFUSED_RETRY_S: Final = 10.0
# Time before commands are asked for anew, where what was to be read next is not there, in s.
_RESTART_S: Final = 1.0


class GrpcLink:
    """A link to the server at ``target``; see :class:`~esperml.kasmina.link.Link`.

    Making one neither waits nor fails: a server that is not there yet, or goes away, is waited for in the background
    while what is to be sent queues up to a bound. The run's commands are subscribed to before anything is sent, so
    that none is missed. A server that refuses the token, or what the token is used for, is told of once in the log
    and asked again every 10 s: tokens are renewed, and rights are changed, while runs go on.

    Args:
        target: address of the server, for example ``localhost:50051``.
        run_id: the run whose commands to read.
        credentials: token and TLS, where the server asks for them.
    """

    def __init__(self, target: str, run_id: str, *, credentials: Credentials = NO_CREDENTIALS) -> None:
        self._target = target
        self._run_id = run_id
        self._credentials = credentials
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._reports: deque[_Entry] = deque()
        self._others: deque[_Entry] = deque()
        self._published = 0
        self._reports_dropped = 0
        self._others_dropped = 0
        self._received: deque[event_pb2.Event] = deque()
        self._sender_seconds = 0.0
        self._oona: OonaClient | None = None
        self._in_flight = 0
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
        """Queue an event; where the queue is full, the oldest of its sort is dropped and counted."""
        with self._lock:
            self._published += 1
            entry = (self._published, kind, event)
            if kind == event_pb2.KIND_TELEMETRY:
                if len(self._reports) >= MAX_REPORTS:
                    self._reports.popleft()
                    self._reports_dropped += 1
                self._reports.append(entry)
            else:
                if len(self._others) >= MAX_OTHERS:
                    self._others.popleft()
                    self._others_dropped += 1
                self._others.append(entry)
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
        return LinkStatistics(self._reports_dropped, self._others_dropped, self._sender_seconds, connected)

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most ``timeout_s`` seconds, 1 s where there is no server, and end the thread.

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
        left = len(self._reports) + len(self._others) + self._in_flight
        self._all_sent = left == 0
        if left:
            _log.warning("events_not_sent", target=self._target, run_id=self._run_id, events=left)

    def _notify(self) -> None:
        self._call_soon(self._wake.set)

    def _call_soon(self, callback: Any) -> None:
        # The thread ends by itself when the server refuses it for good; there is nobody to tell then.
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
            except OonaError as error:
                _log.warning("link_ended", target=self._target, run_id=self._run_id, error=str(error))
            finally:
                self._oona = None
        self._sender_seconds = time.thread_time()

    async def _work(self) -> None:
        self._main = asyncio.current_task()
        if self._cancelled:  # Before there was anything to cancel.
            return
        client_id = f"session-{uuid.uuid4().hex}"
        while await self._is_refused(client_id) and not await self._closes_within(_REFUSED_RETRY_S):
            pass
        # gRPC hands late events of a closed stream to its loop through any other loop of the process, which complains
        # aloud where that loop is gone.
        await asyncio.sleep(_SETTLE_S)

    async def _is_refused(self, client_id: str) -> bool:
        """Serve until told to close. True where the server did not take the token, which may change."""
        try:
            await self._serve(client_id)
        except CredentialsError as error:
            self._tell_once("credentials_unusable", str(error))
        except StreamEndedError as error:
            if error.code is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            self._tell_once("token_refused", error.detail)
        else:
            return False
        return True

    async def _serve(self, client_id: str) -> None:
        """Send and read until told to close. Raises :class:`OonaError` where the server will have none of it."""
        asked = asyncio.Event()
        async with OonaClient(self._target, client_id=client_id, credentials=self._credentials) as oona:
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
        while True:
            kind, entries = self._take()
            if entries:
                self._in_flight = len(entries)
                try:
                    await oona.publish(kind, [event for _, _, event in entries])
                except ForbiddenError as error:
                    self._tell_once(f"{kind_name(kind)}_forbidden", error.message)
                    self._drop(kind, len(entries))
                except (RejectedError, FrameTooLargeError) as error:
                    _log.warning("events_refused", kind=kind_name(kind), events=len(entries), error=str(error))
                except (OonaError, asyncio.CancelledError):
                    self._put_back(kind, entries)
                    raise
                finally:
                    self._in_flight = 0
            elif self._closing:
                return
            else:
                await self._rest()
            self._sender_seconds = time.thread_time()

    async def _rest(self) -> None:
        """Wait for something to send, and not less than the least time between frames; the end cuts it short.

        Waking the thread and sending a frame cost far more than an event: what fast steps say shares both.
        """
        self._sender_seconds = time.thread_time()
        pause = self._loop.call_later(_FRAME_INTERVAL_S, self._wake.set)
        await self._wake.wait()
        pause.cancel()
        self._wake.clear()
        with self._lock:
            self._idle = not (self._reports or self._others or self._closing)
        if self._idle:
            await self._wake.wait()
            self._wake.clear()

    async def _closes_within(self, seconds: float) -> bool:
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

    def _drop(self, kind: Kind, events: int) -> None:
        if kind == event_pb2.KIND_TELEMETRY:
            self._reports_dropped += events
        else:
            self._others_dropped += events

    def _put_back(self, kind: Kind, entries: Sequence[_Entry]) -> None:
        with self._lock:
            queue = self._reports if kind == event_pb2.KIND_TELEMETRY else self._others
            queue.extendleft(reversed(entries))

    def _take(self) -> tuple[Kind, list[_Entry]]:
        """The oldest events of one kind, as many as follow each other and go into a frame."""
        with self._lock:
            queues = [queue for queue in (self._reports, self._others) if queue]
            if not queues:
                return event_pb2.KIND_UNSPECIFIED, []
            queue = min(queues, key=lambda entries: entries[0][0])
            kind = queue[0][1]
            entries: list[_Entry] = []
            while queue and queue[0][1] == kind and len(entries) < _FRAME_EVENTS:
                entries.append(queue.popleft())
            return kind, entries


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
