"""Sets of offsets as sorted ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class RangeSet:
    """A set of whole numbers, kept as disjoint ranges that do not touch.

    Args:
        ranges: pairs (first, last), both inside, in any order.
    """

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in ranges:
            self.add(first, last)

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._firsts, number) - 1
        return index >= 0 and number <= self._lasts[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The ranges as pairs (first, last), ascending."""
        return zip(self._firsts, self._lasts, strict=True)

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._firsts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._firsts == other._firsts and self._lasts == other._lasts

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RangeSet({list(self)})"

    def first_gap(self, first: int, last: int) -> tuple[int, int] | None:
        """The first numbers from ``first`` to ``last``, both inside, that are not in the set; None where all are."""
        index = bisect_right(self._firsts, first)
        if index and self._lasts[index - 1] >= first:
            first = self._lasts[index - 1] + 1
            if first > last:
                return None
        return first, (min(last, self._firsts[index] - 1) if index < len(self._firsts) else last)

    def add(self, first: int, last: int) -> None:
        """Put in all numbers from ``first`` to ``last``, both inside. Raises ``ValueError`` if there are none."""
        if first > last:
            raise ValueError(f"the range {first} to {last} is empty")
        # The ranges that overlap or touch become one with the new one.
        start = bisect_left(self._lasts, first - 1)
        end = bisect_right(self._firsts, last + 1)
        if start < end:
            first = min(first, self._firsts[start])
            last = max(last, self._lasts[end - 1])
        self._firsts[start:end] = [first]
        self._lasts[start:end] = [last]

    def pop_prefix(self, start: int) -> int:
        """Take out everything below the first number from ``start`` on that is not inside. Returns that number."""
        end = bisect_right(self._firsts, start)
        if end and self._lasts[end - 1] >= start:
            start = self._lasts[end - 1] + 1
        del self._firsts[:end], self._lasts[:end]
        return start

    def to_json(self) -> str:
        """The ranges as a JSON array of arrays ``[first, last]``, ascending."""
        # A tenth of a million of them are written several times as fast at one go as by the ``json`` module.
        numbers = [0] * (2 * len(self._firsts))
        numbers[::2] = self._firsts
        numbers[1::2] = self._lasts
        return f"[{','.join(['[%d,%d]'] * len(self._firsts))}]" % tuple(numbers)

    def copy(self) -> RangeSet:
        """An independent copy."""
        other = RangeSet()
        other._firsts = self._firsts.copy()
        other._lasts = self._lasts.copy()
        return other
