"""Letting streams in, and what each may do: rights, and limits on streams, subscriptions and rates."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

from esperml.oona.access import CALLER, check_publish, check_runs, check_subscribe, check_twins
from esperml.oona.rate import TokenBucket
from esperml.oona.refusals import RefusalLog
from esperml.oona.rejection import RequestRejectedError
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import grpc

    from esperml.oona.access import Caller
    from esperml.settings import OonaSettings

STORAGE_TROUBLE_S: Final = 10.0
"""Time for which a failure to store counts as trouble that lasts, in s: clients try again sooner."""

MAX_WAIT_S: Final = 1.0
"""Longest time for which a stream over its rate is not read, in s; after it, what it publishes is rejected."""

_MAX_RATES: Final = 1024


class TurnedAwayError(Exception):
    """A stream cannot be had now; the message says which limit is reached."""


class Rates:
    """What one token, or one client where there are none, may publish in a time.

    Args:
        settings: the rates, per second.
        clock: gives the time, in s.
    """

    def __init__(self, settings: OonaSettings, clock: Callable[[], float]) -> None:
        self._events = TokenBucket(settings.publish_events_per_s, clock) if settings.publish_events_per_s else None
        self._bytes = TokenBucket(settings.publish_bytes_per_s, clock) if settings.publish_bytes_per_s else None

    def wait_s(self) -> float:
        """Time until something may be published, in s."""
        return max(bucket.wait_s() if bucket else 0.0 for bucket in (self._events, self._bytes))

    def take(self, publish: oona_pb2.Publish) -> None:
        """Count its events and their bytes as published."""
        if self._events:
            self._events.take(len(publish.events))
        if self._bytes:
            self._bytes.take(publish.ByteSize())

    @property
    def unused(self) -> bool:
        """Whether it is as good as new."""
        return all(bucket is None or bucket.full for bucket in (self._events, self._bytes))


class Admission:
    """One stream that was let in.

    Args:
        doors: who let it in.
        caller: who it is; None where the server asks for no tokens.
        peer: where from, as gRPC says it.
    """

    def __init__(self, doors: Doors, caller: Caller | None, peer: str) -> None:
        self.caller = caller
        self._peer = peer
        self._client_id = ""
        self._doors = doors
        self._rates: Rates | None = None
        # First sequence that was over the rate: what comes behind it leaves a gap, and need not be waited for.
        self._over_from: int | None = None
        self._end: Callable[[grpc.StatusCode, str], None] | None = None

    def publisher(self, client_id: str, end: Callable[[grpc.StatusCode, str], None]) -> str:
        """The name under which the sequence of the stream's client is kept.

        Args:
            client_id: what the client calls itself.
            end: ends the stream from outside.
        """
        self._end = end
        self._client_id = client_id
        name = client_id if self.caller is None else self.caller.publisher(client_id)
        if self.caller is None or self.caller.limited:
            self._rates = self._doors.rates(name if self.caller is None else self.caller.name)
        return name

    def not_stored(self, problem: str) -> None:
        """Note that what the stream asked to be stored was not."""
        self._doors.not_stored(problem)

    def end(self, code: grpc.StatusCode, detail: str) -> None:
        """End the stream, if it has begun."""
        if self._end is not None:
            self._end(code, detail)

    async def check_publish(self, publish: oona_pb2.Publish) -> None:
        """Return when the stream may publish this, which is at once unless it is over its rate.

        Of which runs the events are is for :meth:`check_runs`, once that is known.

        Raises:
            RequestRejectedError: it may not, or not so soon.
        """
        try:
            if self.caller is not None:
                check_publish(self.caller, publish.kind)
                check_twins(self.caller, publish)
            if self._rates is not None:
                await self._pace(publish, self._rates)
        except RequestRejectedError as error:
            self.refused(error.message)
            raise

    def check_runs(self, run_ids: Iterable[str]) -> None:
        """Raise :class:`RequestRejectedError` unless the stream may publish events of these runs, one an event."""
        if self.caller is not None:
            try:
                check_runs(self.caller, run_ids)
            except RequestRejectedError as error:
                self.refused(error.message)
                raise

    async def _pace(self, publish: oona_pb2.Publish, rates: Rates) -> None:
        """Wait until the rates allow it, for a moment; then reject it."""
        first_sequence = publish.first_sequence
        wait_s = rates.wait_s()
        if wait_s and (self._over_from is None or first_sequence <= self._over_from):
            # The others of the same name may take what flows in meanwhile.
            await asyncio.sleep(min(wait_s, MAX_WAIT_S))
            wait_s = rates.wait_s()
        if wait_s:
            self._over_from = first_sequence if self._over_from is None else min(first_sequence, self._over_from)
            raise RequestRejectedError(
                oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED,
                f"publish: {self._doors.rate_limits} is the limit for "
                f"{'one client' if self.caller is None else f'token {self.caller.name!r}'}",
                retry_after_s=wait_s,
            )
        self._over_from = None
        rates.take(publish)

    def check_subscribe(self, subscribe: oona_pb2.Subscribe, standing: int) -> None:
        """Raise :class:`RequestRejectedError` unless the stream, with ``standing`` subscriptions, may have this one."""
        try:
            self._check_subscribe(subscribe, standing)
        except RequestRejectedError as error:
            self.refused(error.message)
            raise

    def refused(self, detail: str) -> None:
        """Note that the stream was refused something."""
        self._doors.refusals.refused(
            detail, method="Oona.Stream", peer=self._peer, caller=self.caller, client_id=self._client_id
        )

    def _check_subscribe(self, subscribe: oona_pb2.Subscribe, standing: int) -> None:
        if self.caller is not None:
            check_subscribe(self.caller, subscribe)
        if standing >= self._doors.settings.max_subscriptions:
            raise RequestRejectedError(
                oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED,
                f"subscribe: the stream has {standing} subscriptions, the limit; end one, or open another stream",
            )


class Doors:
    """Lets streams in, as many as there may be.

    Args:
        settings: the limits.
        clock: gives the time, in s.

    Attributes:
        settings: the limits.
        refusals: the log of what was refused.
    """

    def __init__(self, settings: OonaSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.refusals = RefusalLog(clock)
        self._clock = clock
        self._inside: set[Admission] = set()
        self._count: dict[str, int] = {}
        self._rates: dict[str, Rates] = {}
        self._not_stored: tuple[float, str] | None = None

    @property
    def storage_problem(self) -> str:
        """What kept the bus from storing just now, in words; empty where nothing did."""
        if self._not_stored is None or self._clock() >= self._not_stored[0] + STORAGE_TROUBLE_S:
            return ""
        return self._not_stored[1]

    def not_stored(self, problem: str) -> None:
        """Note that the bus could not store something."""
        self._not_stored = (self._clock(), problem)

    @property
    def inside(self) -> Collection[Admission]:
        """The streams that are open."""
        return frozenset(self._inside)

    @property
    def rate_limits(self) -> str:
        """The limits on rates, in words."""
        events, size = self.settings.publish_events_per_s, self.settings.publish_bytes_per_s
        return " and ".join(f"{limit:g} {unit}/s" for limit, unit in ((events, "events"), (size, "bytes")) if limit)

    @contextlib.contextmanager
    def admit(self, peer: str) -> Iterator[Admission]:
        """Let the present caller's stream in for as long as the context lasts.

        Args:
            peer: where from, as gRPC says it.

        Raises:
            TurnedAwayError: there are as many as there may be.
        """
        caller = CALLER.get()
        admission = Admission(self, caller, peer)
        problem = self._full_for(caller)
        if problem:
            admission.refused(problem)
            raise TurnedAwayError(problem)
        self._inside.add(admission)
        if caller is not None:
            self._count[caller.name] = self._count.get(caller.name, 0) + 1
        try:
            yield admission
        finally:
            self._inside.remove(admission)
            if caller is not None:
                self._count[caller.name] -= 1
                if not self._count[caller.name]:
                    del self._count[caller.name]

    def _full_for(self, caller: Caller | None) -> str:
        """Which limit keeps a caller's stream out; empty where none does."""
        if len(self._inside) >= self.settings.max_streams:
            return f"{len(self._inside)} streams are open, which is the limit"
        if (
            caller is not None
            and caller.limited
            and self._count.get(caller.name, 0) >= self.settings.max_streams_per_token
        ):
            return f"token {caller.name!r} has {self._count[caller.name]} streams open, which is the limit for one"
        return ""

    def rates(self, name: str) -> Rates | None:
        """What remains for ``name`` to publish, shared by all its streams; None where there is no limit."""
        if not (self.settings.publish_events_per_s or self.settings.publish_bytes_per_s):
            return None
        if len(self._rates) >= _MAX_RATES:
            self._rates = {name: rates for name, rates in self._rates.items() if not rates.unused}
        return self._rates.setdefault(name, Rates(self.settings, self._clock))
