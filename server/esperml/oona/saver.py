"""When a group's progress is stored: with each acknowledgement while it is short, not so often while it is long."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# Ranges that every acknowledgement may have written anew. Longer progress costs each transaction of the log, and
# whoever else waits for that, milliseconds.
_SHORT: Final = 1024


class Saver:
    """Stores something that changes, and says when a change is stored.

    What is short is stored at once. Of what is long, one version is stored at a time, and the next no sooner than as
    long after it as it took: the changes that come meanwhile share that.

    Args:
        store: stores it as it is at the time of the call.
        length: how long it is, in ranges.
    """

    def __init__(self, store: Callable[[], asyncio.Future[None]], length: Callable[[], int]) -> None:
        self._store = store
        self._length = length
        self._is_storing = False
        self._pause: asyncio.TimerHandle | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._ends = False

    def save(self) -> asyncio.Future[None]:
        """Store it as it is now, or later than now. Returns a future of when that is done, or has failed."""
        if self._ends or self._length() <= _SHORT:
            return self._store()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if not self._is_storing and self._pause is None:
            self._next()
        return future

    def end(self) -> None:
        """From now on, store everything at once: soon nothing more can be stored."""
        self._ends = True
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._waiting:
            self._next()

    def _next(self) -> None:
        self._pause = None
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._is_storing = True

        def stored(future: asyncio.Future[None]) -> None:
            self._is_storing = False
            for one in waiting:
                _settle(one, future)
            if not self._ends:
                self._pause = loop.call_later(loop.time() - began_s, self._next)

        self._store().add_done_callback(stored)


def _settle(waiting: asyncio.Future[None], stored: asyncio.Future[None]) -> None:
    """Have a future, unless nobody waits for it any more, end as another did."""
    if waiting.done() or stored.cancelled():
        waiting.cancel()
    elif (error := stored.exception()) is not None:
        waiting.set_exception(error)
        # Who asked may be gone; that is no error nobody handled.
        waiting.exception()
    else:
        waiting.set_result(None)
