"""How often records of a group were delivered and came back."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Tried(NamedTuple):
    """Consecutive records that were delivered equally often.

    Attributes:
        first: offset of the first.
        last: offset of the last.
        deliveries: deliveries that came back.
        failures: those of them that came back for the record's own sake, not for that of an earlier one of its run.
    """

    first: int
    last: int
    deliveries: int
    failures: int


class Attempts:
    """Deliveries that came back, by offset: disjoint ranges, ascending.

    Args:
        tried: ranges as :class:`Tried` has them, ascending and disjoint.
    """

    __slots__ = ("_firsts", "_tried")

    def __init__(self, tried: Iterable[tuple[int, int, int, int]] = ()) -> None:
        self._tried = [Tried(*item) for item in tried]
        self._firsts = [item.first for item in self._tried]

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._tried)

    def __iter__(self) -> Iterator[Tried]:
        return iter(self._tried)

    def at(self, offset: int) -> Tried:
        """The range that holds an offset, as far as it goes; where there is none, one of the offset alone with 0s."""
        index = bisect_right(self._firsts, offset) - 1
        if index >= 0 and offset <= self._tried[index].last:
            return self._tried[index]
        return Tried(offset, offset, 0, 0)

    def within(self, first: int, last: int) -> list[Tried]:
        """What lies from ``first`` to ``last``, both inside, cut to that."""
        start, stop = self._overlap(first, last)
        return [
            Tried(max(item.first, first), min(item.last, last), item.deliveries, item.failures)
            for item in self._tried[start:stop]
        ]

    def uniform_end(self, first: int, last: int) -> tuple[int, int]:
        """Up to where, at most ``last``, records from ``first`` on were delivered equally often, and how often."""
        index = bisect_right(self._firsts, first) - 1
        if index >= 0 and first <= self._tried[index].last:
            return min(last, self._tried[index].last), self._tried[index].deliveries
        index += 1
        end = self._firsts[index] - 1 if index < len(self._firsts) else last
        return min(last, end), 0

    def add(self, first: int, last: int, *, deliveries: int, failures: int) -> None:
        """Count more of them for all from ``first`` to ``last``, both inside."""
        counted: list[Tried] = []
        for item in self.within(first, last):
            if first < item.first:
                counted.append(Tried(first, item.first - 1, deliveries, failures))
            counted.append(Tried(item.first, item.last, item.deliveries + deliveries, item.failures + failures))
            first = item.last + 1
        if first <= last:
            counted.append(Tried(first, last, deliveries, failures))
        self._replace(counted[0].first, last, counted)

    def remove(self, first: int, last: int) -> None:
        """Forget all from ``first`` to ``last``, both inside."""
        if self._tried:
            self._replace(first, last, [])

    def _overlap(self, first: int, last: int) -> tuple[int, int]:
        start = bisect_right(self._firsts, first)
        if start and self._tried[start - 1].last >= first:
            start -= 1
        return start, max(start, bisect_left(self._firsts, last + 1))

    def _replace(self, first: int, last: int, new: list[Tried]) -> None:
        start, stop = self._overlap(first, last)
        if start < stop:
            before, after = self._tried[start], self._tried[stop - 1]
            if before.first < first:
                new.insert(0, before._replace(last=first - 1))
            if after.last > last:
                new.append(after._replace(first=last + 1))
        self._tried[start:stop] = new
        self._firsts[start:stop] = [item.first for item in new]
