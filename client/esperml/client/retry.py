"""Which failures are worth another try, and how long to wait before it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import grpc

RETRYABLE: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,  # Nobody listens, the connection broke, or the server shuts down.
        grpc.StatusCode.CANCELLED,  # The server's side of the stream was torn down.
        grpc.StatusCode.DEADLINE_EXCEEDED,  # The network stalled.
        grpc.StatusCode.INTERNAL,  # A proxy or the transport broke the stream.
        grpc.StatusCode.UNKNOWN,  # The same, seen from further away.
    }
)
"""Status codes after which the client opens the stream again. All others need a person."""


@dataclass(slots=True)
class Backoff:
    """Waiting times that double from ``initial_s`` to ``longest_s``, each drawn from its upper half.

    The draw keeps many clients of one server from coming back at the same moment.
    """

    initial_s: float = 0.05
    longest_s: float = 5.0
    _failures: int = 0

    def next_delay(self) -> float:
        """Time to wait before the next try, in s."""
        ceiling = min(self.longest_s, self.initial_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, 64)
        return ceiling * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start from the shortest time again, after a success."""
        self._failures = 0
