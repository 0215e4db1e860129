"""Credit arithmetic of one subscription."""

from __future__ import annotations

from dataclasses import dataclass


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

    def grant(self, messages: int, size: int) -> None:
        """Add credit for ``messages`` records with ``size`` bytes together; 0 bytes: as many as they need."""
        if size:
            self.messages += messages
            self.bytes += size
        else:
            self.unmetered += messages

    def take(self, size: int) -> bool:
        """Pay for one record of ``size`` bytes. Returns False, and takes nothing, where the credit does not suffice."""
        if self.messages and size <= self.bytes:
            self.messages -= 1
            self.bytes -= size
            return True
        if self.unmetered:
            self.unmetered -= 1
            return True
        return False
