"""What can go wrong when a host is wrapped or changed."""

from __future__ import annotations

from typing import Final

from esperml.client.errors import EsperError


class KasminaError(EsperError):
    """Base of every error of this package."""


class UnsupportedHostError(KasminaError):
    """The model cannot be wrapped. The message says why and what to do."""


class CheckpointError(KasminaError):
    """A state does not fit the run that shall take it up, or cannot be written down; nothing was changed."""


class RefusedError(KasminaError):
    """A change of the host was refused; nothing was changed.

    Attributes:
        reason: why, in words, naming what stood in the way.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


FAILURES: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)
"""What the code of a blueprint may raise without harm: the seed is not planted, or is left out of the pass."""
