"""What waits to be delivered to one member of a group: by run, so that a run in trouble costs the others nothing."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esperml.oona.leases import Span

# Heads of runs that were overtaken by earlier ones or held back, which may stay before they are swept out.
_STALE_HEADS: Final = 64


class Delay(NamedTuple):
    """A run waits behind a record that came back.

    Attributes:
        until_s: when it goes on, on the caller's clock.
        head: offset of the record.
    """

    until_s: float
    head: int


class Backlog:
    """Spans that wait: those of a run in the order of their offsets, and of all runs together the lowest first.

    A run that is delayed keeps its spans, and takes in more, but :meth:`first` gives none of them.

    Attributes:
        delays: the runs that are delayed.
    """

    __slots__ = ("_count", "_heads", "_runs", "delays")

    def __init__(self) -> None:
        self.delays: dict[str, Delay] = {}
        self._runs: dict[str, deque[Span]] = {}
        # The first offset of each run that may go on, as a heap; what is no longer so is found out on looking.
        self._heads: list[tuple[int, str]] = []
        self._count = 0

    def __len__(self) -> int:
        """How many spans wait."""
        return self._count

    def __iter__(self) -> Iterator[Span]:
        """The spans, each run's ascending."""
        return (span for queue in self._runs.values() for span in queue)

    @property
    def next_resume_s(self) -> float | None:
        """When the first delay is over, on the caller's clock."""
        return min((delay.until_s for delay in self.delays.values()), default=None)

    def longest(self) -> tuple[int, str]:
        """Of which run most spans wait, and how many; 0 of a run without a name where none do."""
        return max(((len(queue), run_id) for run_id, queue in self._runs.items()), default=(0, ""))

    def append(self, span: Span) -> None:
        """Put in a span behind all of its run."""
        self._count += 1
        if (queue := self._runs.get(span.run_id)) is not None:
            queue.append(span)
        else:
            self._runs[span.run_id] = deque((span,))
            self._offer(span.run_id)

    def prepend(self, run_id: str, spans: Sequence[Span]) -> None:
        """Put in spans of a run, ascending, before all of it."""
        if spans:
            self._count += len(spans)
            self._runs.setdefault(run_id, deque()).extendleft(reversed(spans))
            self._offer(run_id)

    def first(self) -> Span | None:
        """The lowest span of the runs that may go on."""
        while self._heads:
            first, run_id = self._heads[0]
            queue = self._runs.get(run_id)
            if queue is not None and queue[0].first == first and run_id not in self.delays:
                return queue[0]
            heappop(self._heads)
        return None

    def take_first(self, last: int) -> Span:
        """Take out what :meth:`first` gave just now, up to offset ``last``; the rest of it waits on."""
        run_id = self._heads[0][1]
        queue = self._runs[run_id]
        span = queue[0]
        if last < span.last:
            queue[0] = span._replace(first=last + 1)
            heapreplace(self._heads, (last + 1, run_id))
            return span._replace(last=last)
        self._count -= 1
        queue.popleft()
        if queue:
            heapreplace(self._heads, (queue[0].first, run_id))
        else:
            heappop(self._heads)
            del self._runs[run_id]
        return span

    def overlapping(self, first: int, last: int) -> list[Span]:
        """The spans that hold something from offset ``first`` to ``last``, both inside."""
        found = []
        for queue in self._runs.values():
            for span in queue:
                if span.first > last:
                    break
                if span.last >= first:
                    found.append(span)
        return found

    def delay(self, run_id: str, until_s: float, head: int) -> None:
        """Hold a run back behind a record until a time, in the place of what held it back so far."""
        self.delays[run_id] = Delay(until_s, head)

    def resume(self, run_id: str) -> None:
        """Let a run that is delayed go on."""
        del self.delays[run_id]
        if run_id in self._runs:
            self._offer(run_id)

    def skip_below(self, floor: int) -> None:
        """Take out everything below an offset, and let the runs go on that wait behind such a record."""
        for run_id, queue in list(self._runs.items()):
            while queue and queue[0].last < floor:
                queue.popleft()
                self._count -= 1
            if not queue:
                del self._runs[run_id]
            elif queue[0].first < floor:
                queue[0] = queue[0]._replace(first=floor)
        for run_id in [run_id for run_id, delay in self.delays.items() if delay.head < floor]:
            del self.delays[run_id]
        self._renew_heads()

    def clear(self) -> None:
        """Take out everything."""
        self.delays.clear()
        self._runs.clear()
        self._heads.clear()
        self._count = 0

    def _offer(self, run_id: str) -> None:
        if run_id in self.delays:
            return
        heappush(self._heads, (self._runs[run_id][0].first, run_id))
        if len(self._heads) > 2 * len(self._runs) + _STALE_HEADS:
            self._renew_heads()

    def _renew_heads(self) -> None:
        self._heads = [(queue[0].first, run_id) for run_id, queue in self._runs.items() if run_id not in self.delays]
        heapify(self._heads)
