"""What can go wrong when a host is wrapped or changed."""

from __future__ import annotations

from esperml.client.errors import EsperError


class KasminaError(EsperError):
    """Base of every error of this package."""


class UnsupportedHostError(KasminaError):
    """The model cannot be wrapped. The message says why and what to do."""


class RefusedError(KasminaError):
    """A change of the host was refused; nothing was changed.

    Attributes:
        reason: why, in words, naming what stood in the way.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
