"""What one member of a group was delivered and has not settled."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Deadlines of what was settled that may stay before they are swept out.
_STALE_DEADLINES: Final = 64


class Span(NamedTuple):
    """Consecutive records of one run in one stored frame.

    Attributes:
        first: offset of the first.
        last: offset of the last.
        frame: first offset of the stored frame that holds them.
        run_id: their run.
    """

    first: int
    last: int
    frame: int
    run_id: str


class Lease(NamedTuple):
    """Records that were delivered together and are not settled.

    Attributes:
        span: the records.
        deadline_s: when they come back, on the caller's clock.
    """

    span: Span
    deadline_s: float


class Leases:
    """Leases of one member, which do not overlap, by offset."""

    __slots__ = ("_deadlines", "_firsts", "_leases")

    def __init__(self) -> None:
        self._leases: list[Lease] = []
        self._firsts: list[int] = []
        # Every lease was put in here with its deadline, in that order; what is no longer so is found out on looking.
        self._deadlines: deque[tuple[float, int, int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._leases)

    def __iter__(self) -> Iterator[Span]:
        """The spans, ascending."""
        return (lease.span for lease in self._leases)

    def add(self, span: Span, deadline_s: float) -> None:
        """Lease records that are not leased. Deadlines never decrease from call to call."""
        index = bisect_left(self._firsts, span.first)
        self._firsts.insert(index, span.first)
        self._leases.insert(index, Lease(span, deadline_s))
        self._deadlines.append((deadline_s, span.first, span.last))
        # Those of what was settled leave at the front only, where one long lease may keep them all.
        if len(self._deadlines) > 2 * len(self._leases) + _STALE_DEADLINES:
            left = sorted((lease.deadline_s, lease.span.first, lease.span.last) for lease in self._leases)
            self._deadlines = deque(left)

    def at(self, offset: int) -> Span | None:
        """The span that holds an offset."""
        index = bisect_right(self._firsts, offset) - 1
        if index < 0 or self._leases[index].span.last < offset:
            return None
        return self._leases[index].span

    def take(self, first: int, last: int) -> list[Span]:
        """Take out what is leased from offset ``first`` to ``last``, both inside, ascending."""
        start, stop = self._overlap(first, last)
        if start == stop:
            return []
        taken = [lease.span for lease in self._leases[start:stop]]
        kept = []
        if (head := self._leases[start]).span.first < first:
            kept.append(Lease(head.span._replace(last=first - 1), head.deadline_s))
            taken[0] = taken[0]._replace(first=first)
        if (tail := self._leases[stop - 1]).span.last > last:
            kept.append(Lease(tail.span._replace(first=last + 1), tail.deadline_s))
            taken[-1] = taken[-1]._replace(last=last)
        self._leases[start:stop] = kept
        self._firsts[start:stop] = [lease.span.first for lease in kept]
        return taken

    def take_runs(self, firsts: Mapping[str, int]) -> dict[str, list[Span]]:
        """Take out what is leased of some runs, of each from an offset on. Returns it by run, ascending."""
        taken: dict[str, list[Span]] = {run_id: [] for run_id in firsts}
        if not taken:
            return taken
        kept = []
        for lease in self._leases:
            span, first = lease.span, firsts.get(lease.span.run_id)
            if first is None or span.last < first:
                kept.append(lease)
                continue
            if span.first < first:
                kept.append(Lease(span._replace(last=first - 1), lease.deadline_s))
                span = span._replace(first=first)
            taken[span.run_id].append(span)
        self._leases = kept
        self._firsts = [lease.span.first for lease in kept]
        return taken

    def take_all(self) -> list[Span]:
        """Take out everything, ascending."""
        taken = list(self)
        self._leases.clear()
        self._firsts.clear()
        self._deadlines.clear()
        return taken

    @property
    def next_deadline_s(self) -> float | None:
        """When the first of them runs out, on the caller's clock."""
        while self._deadlines:
            deadline_s, first, last = self._deadlines[0]
            start, stop = self._overlap(first, last)
            if any(lease.deadline_s <= deadline_s for lease in self._leases[start:stop]):
                return deadline_s
            self._deadlines.popleft()
        return None

    def expired(self, now_s: float) -> list[Span]:
        """What was held for too long, ascending. It stays leased, and is not named again unless it is leased again."""
        expired: set[Span] = set()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, first, last = self._deadlines.popleft()
            start, stop = self._overlap(first, last)
            expired.update(lease.span for lease in self._leases[start:stop] if lease.deadline_s <= deadline_s)
        return sorted(expired)

    def _overlap(self, first: int, last: int) -> tuple[int, int]:
        start = bisect_right(self._firsts, first)
        if start and self._leases[start - 1].span.last >= first:
            start -= 1
        return start, max(start, bisect_right(self._firsts, last))
