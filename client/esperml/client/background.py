"""One event loop in one thread, on which all clients without asyncio do their work.

One for the whole process: gRPC's asyncio stack serves all loops of a process from a single queue, so that several would
hold one another up.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar

from esperml.client.errors import ClientClosedError, ForkedClientError, OonaError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

_T = TypeVar("_T")

# Longest time that the end of the interpreter waits for the loop, in s.
_EXIT_TIMEOUT_S: Final = 5.0


class BackgroundLoop:
    """An event loop in a thread that is there while somebody uses it. All methods may be called from any other thread.

    A process that was forked has none of the threads of its parent, so that nothing of it can be used there.
    """

    def __init__(self) -> None:
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        atexit.register(self.end_with_interpreter)

    def acquire(self) -> None:
        """Use the loop from now on; the first user starts it. Raises :class:`ForkedClientError`."""
        self._check_process()
        with self._lock:
            self._users += 1
            if self._users == 1:
                started = threading.Event()
                # A daemon: a program that forgot to close its client shall end all the same. See end_with_interpreter.
                self._thread = threading.Thread(target=self._run, args=(started,), name="esper-oona", daemon=True)
                self._thread.start()
                started.wait()

    def release(self) -> None:
        """Use the loop no longer; the last user ends it."""
        self._check_process()
        with self._lock:
            self._users -= 1
            if not self._users:
                self._end(None)

    def start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin some work, and return what stands for its outcome.

        Raises:
            ForkedClientError: the loop runs in the process of which this one is a fork.
            ClientClosedError: nobody uses the loop (any more).
            RuntimeError: called on the loop itself, where waiting for the outcome would never end.
        """
        try:
            loop = self._usable_loop()
            return asyncio.run_coroutine_threadsafe(work, loop)
        except (RuntimeError, OonaError):
            # The loop has not got it. After Ctrl-C, which may come at any moment, it may have, and closes it itself.
            work.close()
            raise

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do some work and return its outcome. Errors as for :meth:`start`, and those of the work.

        Whatever interrupts the wait, Ctrl-C for example, cancels the work.
        """
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def end_with_interpreter(self) -> None:
        """Break off what is under way, so that no thread is amid something when the interpreter goes."""
        if os.getpid() == self._process_id:
            self._end(_EXIT_TIMEOUT_S)

    def _usable_loop(self) -> asyncio.AbstractEventLoop:
        self._check_process()
        if threading.current_thread() is self._thread:
            raise RuntimeError("a client without asyncio cannot be used from its own thread")
        if self._loop is None or self._loop.is_closed():
            raise ClientClosedError
        return self._loop

    def _check_process(self) -> None:
        if os.getpid() != self._process_id:
            raise ForkedClientError

    def _end(self, timeout_s: float | None) -> None:
        if self._loop is None or self._stop is None or self._thread is None:
            return
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout_s)
        self._loop = self._stop = self._thread = None

    def _run(self, started: threading.Event) -> None:
        async def until_stopped() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            started.set()
            await self._stop.wait()

        with asyncio.Runner() as runner:
            runner.run(until_stopped())


_background = BackgroundLoop()


def background_loop() -> BackgroundLoop:
    """The loop of this process."""
    return _background


def _after_fork() -> None:
    global _background  # noqa: PLW0603 - the one of the parent is of no use here
    _background = BackgroundLoop()


os.register_at_fork(after_in_child=_after_fork)
