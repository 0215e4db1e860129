"""Which failures are worth another try, and how long to wait before it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import grpc

from esperml.v1 import oona_pb2

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

RETRYABLE_REJECTIONS: Final = frozenset(
    {
        oona_pb2.REJECT_REASON_STORAGE,  # The disk is full, or the cluster has no leader: nothing was stored.
        oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED,  # Over a rate or a limit; the server may say when to come back.
    }
)
"""Reasons after which the client makes the same request again on the same stream. All others concern the request."""


@dataclass(slots=True)
class Backoff:
    """Waiting times that double from ``initial_s`` to ``longest_s``, each drawn from its upper half.

    The draw keeps many clients of one server from coming back at the same moment.
    """

    initial_s: float = 0.05
    longest_s: float = 5.0
    _failures: int = 0

    def next_delay(self, at_least_s: float = 0.0) -> float:
        """Time to wait before the next try, in s: never less than ``at_least_s``, and up to a tenth more than that."""
        ceiling = min(self.longest_s, self.initial_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, 64)
        return max(ceiling * random.uniform(0.5, 1.0), at_least_s * random.uniform(1.0, 1.1))

    def reset(self) -> None:
        """Start from the shortest time again, after a success."""
        self._failures = 0
