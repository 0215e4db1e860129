"""Credit arithmetic of one subscription."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(slots=True)
class Credit:
    """What a reader has allowed and not yet got.

    Grants with a limit on bytes add up in ``messages`` and ``bytes``; grants without one add up in ``unmetered``. A
    record is paid for from the metered credit where that suffices, and else from the other.

    Attributes:
        messages: records that may be sent, within ``bytes``.
        bytes: bytes that those may have.
        unmetered: records of any size that may be sent.
    """

    messages: int = 0
    bytes: int = 0
    unmetered: int = 0

    def __bool__(self) -> bool:
        """Whether there is some left."""
        return bool(self.messages or self.unmetered)

    def grant(self, messages: int, size: int) -> None:
        """Add credit for ``messages`` records with ``size`` bytes together; 0 bytes: as many as they need."""
        if size:
            self.messages += messages
            self.bytes += size
        else:
            self.unmetered += messages

    def take(self, sizes: Sequence[int], start: int, stop: int) -> int:
        """Pay for as many records as the credit suffices for, in order.

        Args:
            sizes: bytes of all records before each, and, as the last, of all of them.
            start: index of the first to be paid for.
            stop: index after the last.

        Returns:
            Index after the last that was paid for; ``start`` where the credit does not suffice for one.
        """
        taken = start
        while taken < stop:
            if self.messages:
                most = min(stop, taken + self.messages)
                end = bisect_right(sizes, sizes[taken] + self.bytes, taken + 1, most + 1) - 1
                if end > taken:
                    self.messages -= end - taken
                    self.bytes -= sizes[end] - sizes[taken]
                    taken = end
                    continue
            if not self.unmetered:
                break
            # With metered credit left, the record after this one may be small enough for that.
            count = 1 if self.messages else min(stop - taken, self.unmetered)
            self.unmetered -= count
            taken += count
        return taken
