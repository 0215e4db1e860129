"""Flow control of one subscription: how much may be under way, and when to ask for more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class FlowControl:
    """Credit of one subscription, as its client counts it.

    What was granted but not taken by the reader never exceeds ``messages`` and ``bytes``: that is the memory that a
    slow reader costs. Credit goes back in steps of half the whole, so that grants are few.
    """

    messages: int
    bytes: int
    _taken_messages: int = 0
    _taken_bytes: int = 0

    def open(self, buffered_messages: int = 0, buffered_bytes: int = 0) -> tuple[int, int]:
        """Credit to grant to a new stream, as (messages, bytes), where so much still waits for the reader."""
        self._taken_messages = self._taken_bytes = 0
        return max(self.messages - buffered_messages, 0), max(self.bytes - buffered_bytes, 0)

    def take(self, messages: int, size: int) -> tuple[int, int] | None:
        """Count records of ``size`` bytes together as taken.

        Returns credit to grant, as (messages, bytes), when it is time.
        """
        self._taken_messages += messages
        self._taken_bytes += size
        if 2 * self._taken_messages < self.messages and 2 * self._taken_bytes < self.bytes:
            return None
        grant = (self._taken_messages, self._taken_bytes)
        self._taken_messages = self._taken_bytes = 0
        return grant
