"""Servers that serve the same bus, of which a client uses one at a time."""

from __future__ import annotations


class Addresses:
    """Goes round a list of servers.

    Args:
        target: addresses, separated by commas, for example ``host-1:50051,host-2:50051``.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, target: str) -> None:
        self._all = [address for part in target.split(",") if (address := part.strip())]
        if not self._all:
            raise ValueError("target: must name a server, for example localhost:50051")
        self._index = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def present(self) -> str:
        """The server in use."""
        return self._all[self._index]

    def move_on(self) -> None:
        """Use the next one, after the present one has failed."""
        self._index = (self._index + 1) % len(self._all)
