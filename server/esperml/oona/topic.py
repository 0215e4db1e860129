"""One log with its readers: what is stored, and whom to wake when there is more."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from esperml.oona.frames import Frame, FrameCache, decode
from esperml.oona.log import LogDamagedError
from esperml.oona.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from esperml.oona.log import Appended, EncodedEvents, Log, TopicBounds
    from esperml.v1 import event_pb2

# Bytes read from the log at once, for readers that are behind.
_READ_BYTES: Final = 2**20
# How often, and at what distance, to look again for a record that is not there before the log counts as damaged.
_PURGE_LOOKS: Final = 50
_PURGE_PAUSE_S: Final = 0.01


class Topic:
    """The log of one kind.

    Args:
        kind: the kind.
        log: the engine.
        cache_bytes: bytes of decoded frames to keep.

    Attributes:
        kind: the kind.
        wakers: set when there is more to read, or less.
        passers: called in place of a waker by readers of some runs only, with where the log ended, where it ends, and
            the runs of what lies between, or None where they are not known.
        traffic: counts of what goes through it.
    """

    def __init__(self, kind: event_pb2.Kind.ValueType, log: Log, cache_bytes: int) -> None:
        self.kind = kind
        self.wakers: set[asyncio.Event] = set()
        self.passers: set[Callable[[int, int, AbstractSet[str] | None], None]] = set()
        self.traffic = Traffic()
        self._log = log
        self._cache = FrameCache(cache_bytes)
        self._floor = log.bounds(kind).earliest
        self._passed = log.bounds(kind).next
        self._passes = False

    @property
    def bounds(self) -> TopicBounds:
        """The extent of the log."""
        return self._log.bounds(self.kind)

    def appended(self, appended: Appended, events: EncodedEvents) -> None:
        """Note what was stored just now, so that readers at the tail need not read it."""
        if appended.count:
            self._cache.put(Frame(appended.first_offset, appended.append_time_ns, events.without(appended.duplicates)))

    def forget_purged(self) -> bool:
        """Forget what the log holds no longer. Returns whether there was something new to forget."""
        earliest, self._floor = self._floor, self.bounds.earliest
        if earliest == self._floor:
            return False
        self._cache.drop_below(self._floor)
        return True

    def wake(self) -> None:
        """Let every reader look again that may have something to see."""
        for waker in self.wakers:
            waker.set()
        if self.passers and not self._passes:
            # What was stored just now lies in the cache as soon as the callbacks that wait for it have run.
            self._passes = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        self._passes = False
        start, self._passed = self._passed, self.bounds.next
        run_ids = self._runs(start)
        for passer in self.passers:
            passer(start, self._passed, run_ids)

    def _runs(self, offset: int) -> set[str] | None:
        """The runs of what is stored from an offset on, or None where some of it is not in the cache."""
        run_ids: set[str] = set()
        while offset < self._passed:
            if (frame := self._cache.get(offset)) is None:
                return None
            run_ids.update(run_id for _, _, run_id in frame.spans)
            offset = frame.end
        return run_ids

    def cached(self, first_offset: int) -> Frame | None:
        """The frame that starts at an offset, if it need not be read."""
        return self._cache.get(first_offset)

    async def frame(self, first_offset: int) -> Frame | None:
        """The frame that starts at an offset, or None where it was purged.

        Raises:
            LogDamagedError: what is stored cannot be read.
        """
        frames = await self.read(first_offset)
        return frames[0] if frames and frames[0].first_offset == first_offset else None

    async def read(self, offset: int) -> list[Frame]:
        """Frames from the one that holds ``offset`` on, in order; some, not all. Where that was purged, the next.

        Raises:
            LogDamagedError: what is stored cannot be read, or is not there.
        """
        if (frame := self._cache.get(offset)) is not None:
            return self._cached_run(frame)
        for _ in range(_PURGE_LOOKS):
            frames = await self._read_log(offset)
            if (frames and frames[0].first_offset <= offset) or not self.bounds.earliest <= offset < self.bounds.next:
                return frames
            # The reading thread has seen a purge that this one is about to hear of.
            await asyncio.sleep(_PURGE_PAUSE_S)
        raise LogDamagedError(f"log {self.kind}: the record at offset {offset} is missing")

    async def _read_log(self, offset: int) -> list[Frame]:
        frames: list[Frame] = []
        for stored in await self._log.read(self.kind, offset, _READ_BYTES):
            if frames and stored.first_offset != frames[-1].end:
                break  # Readers count on frames that follow one another; whoever comes to the gap is told of it.
            frame = self._cache.get(stored.first_offset)
            if frame is None:
                frame = decode(self.kind, stored)
                self._cache.put(frame)
            frames.append(frame)
        return frames

    def _cached_run(self, frame: Frame) -> list[Frame]:
        """A frame and those behind it, as far as they are in the cache."""
        frames = [frame]
        size = frame.size
        while size < _READ_BYTES and (following := self._cache.get(frame.end)) is not None:
            frame = following
            frames.append(frame)
            size += frame.size
        return frames
