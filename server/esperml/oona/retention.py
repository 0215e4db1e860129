"""Lets go of the oldest records of logs that have limits, a little at a time, while the bus goes on.

Whole frames leave, so that up to one frame less than a limit allows may stay. The space in the file that they leave is
used for new records. The file itself does not shrink: at a steady rate it would have to grow again at once, and moving
what is kept to the front would cost more writes than the records themselves did.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import structlog
from google.protobuf.duration_pb2 import Duration

from esperml.contract import KINDS, kind_name
from esperml.oona.log import LogError
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from esperml.contract import KindValue
    from esperml.oona.log import TopicBounds
    from esperml.settings import RetentionLimits, RetentionSettings

_log = structlog.get_logger(__name__)

_INTERVAL_S: Final = 1.0
# Frames looked at, and let go, at once.
_FRAMES: Final = 512


@dataclass(frozen=True, slots=True)
class FrameExtent:
    """What retention has to know of a stored frame.

    Attributes:
        first_offset: offset of its first event.
        count: its events.
        append_time_ns: when it was stored, in ns since 1970.
        bytes: bytes of its batch.
    """

    first_offset: int
    count: int
    append_time_ns: int
    bytes: int


class RetainedLog(Protocol):
    """What retention asks of a log engine."""

    def bounds(self, kind: int) -> TopicBounds:
        """The extent of the log of ``kind``."""
        ...

    async def oldest(self, kind: int, count: int) -> Sequence[FrameExtent]:
        """The first frames of a log, at most ``count``, in order."""
        ...

    async def purge(self, kind: int, before: int) -> int:
        """Delete the frames that lie below offset ``before`` as a whole. Returns the earliest offset then."""
        ...


def first_to_keep(frames: Iterable[FrameExtent], bounds: TopicBounds, limits: RetentionLimits, now_ns: int) -> int:
    """The first offset of a log that its limits allow to stay, as far as its oldest frames tell.

    However small the limits are in bytes and records, the last frame stays: those who read at the end of the log shall
    find what was published last. Only age takes it away.

    Args:
        frames: the oldest frames of the log, from its first on, without gaps.
        bounds: the extent of the log.
        limits: what it may keep; 0 stands for no limit.
        now_ns: the time, in ns since 1970.
    """
    keep = bounds.earliest
    size = bounds.bytes
    for frame in frames:
        is_old = limits.age_s > 0 and frame.append_time_ns < now_ns - limits.age_s * 1e9
        is_too_much = (0 < limits.records < bounds.next - keep) or (0 < limits.bytes < size)
        end = frame.first_offset + frame.count
        if not is_old and not (is_too_much and end < bounds.next):
            break
        keep = end
        size -= frame.bytes
    return keep


def retention(limits: RetentionLimits) -> oona_pb2.Retention:
    """The limits as the contract tells them: what has none is absent."""
    told = oona_pb2.Retention()
    if limits.age_s:
        told.age.CopyFrom(Duration(seconds=int(limits.age_s), nanos=int(limits.age_s % 1 * 1e9)))
    if limits.bytes:
        told.bytes = limits.bytes
    if limits.records:
        told.records = limits.records
    return told


class Retention:
    """Holds the logs of an engine to their limits.

    Args:
        log: the engine.
        settings: the limits of each kind.
        interval_s: how often to look, in s.
    """

    def __init__(self, log: RetainedLog, settings: RetentionSettings, interval_s: float = _INTERVAL_S) -> None:
        self._log = log
        self._interval_s = interval_s
        self._limits = {kind: limits_of(settings, kind) for kind in KINDS}
        self._problem = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Enforce the limits until the context is left."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def enforce(self) -> None:
        """Let go of everything that is beyond the limits now.

        Raises:
            LogUnavailableError: not all of it could be deleted.
            LogDamagedError: what is stored cannot be read.
        """
        for kind, limits in self._limits.items():
            if limits.age_s or limits.bytes or limits.records:
                before = self._log.bounds(kind).earliest
                while await self._let_go(kind, limits):
                    pass
                if (earliest := self._log.bounds(kind).earliest) > before:
                    _log.debug("records_let_go", kind=kind_name(kind), count=earliest - before, earliest=earliest)

    async def _let_go(self, kind: KindValue, limits: RetentionLimits) -> bool:
        """Let go of some frames. Returns whether there may be more to let go."""
        frames = await self._log.oldest(kind, _FRAMES)
        bounds = self._log.bounds(kind)
        if not frames or frames[0].first_offset != bounds.earliest:
            return False  # Empty, or somebody else is deleting: look again later.
        keep = first_to_keep(frames, bounds, limits, time.time_ns())
        if keep == bounds.earliest:
            return False
        await self._log.purge(kind, keep)
        return keep == frames[-1].first_offset + frames[-1].count

    async def _run(self) -> None:
        while True:
            try:
                await self.enforce()
            except LogError as error:
                # A full disk stays full for a while: one line will do.
                if str(error) != self._problem:
                    _log.warning("retention_waits", detail=str(error))
                self._problem = str(error)
            else:
                self._problem = ""
            await asyncio.sleep(self._interval_s)


def limits_of(settings: RetentionSettings, kind: KindValue) -> RetentionLimits:
    """The limits of a kind."""
    limits: RetentionLimits = getattr(settings, kind_name(kind))
    return limits
