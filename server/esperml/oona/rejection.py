"""Refusing one request."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from esperml.oona.log import LogFullError, LogUnavailableError, SequenceGapError
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from esperml.oona.log import LogError


class RequestRejectedError(Exception):
    """A request cannot be met; nothing of it was done, and the stream stands.

    Attributes:
        reason: the contract's reason.
        message: in words, naming the field.
        earliest_offset: first offset that is still there, where that is the reason.
        expected_sequence: the sequence that was expected, where that is the reason.
        retry_after_s: when it is worth while to try again, in s, where that is known.
    """

    def __init__(
        self,
        reason: oona_pb2.RejectReason.ValueType,
        message: str,
        *,
        earliest_offset: int | None = None,
        expected_sequence: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.earliest_offset = earliest_offset
        self.expected_sequence = expected_sequence
        self.retry_after_s = retry_after_s

    def to_proto(self) -> oona_pb2.Rejected:
        """The contract's message for it."""
        rejected = oona_pb2.Rejected(
            reason=self.reason,
            message=self.message,
            earliest_offset=self.earliest_offset,
            expected_sequence=self.expected_sequence,
        )
        if self.retry_after_s is not None:
            rejected.retry_after.FromTimedelta(timedelta(seconds=self.retry_after_s))
        return rejected


def invalid(field: str, problem: str) -> RequestRejectedError:
    """The rejection of a field that is missing or out of range."""
    return RequestRejectedError(oona_pb2.REJECT_REASON_INVALID, f"{field}: {problem}")


def from_log_error(error: LogError) -> RequestRejectedError:
    """The rejection for what kept the log from storing. Raises the error itself where it concerns more than that."""
    if isinstance(error, SequenceGapError):
        return RequestRejectedError(
            oona_pb2.REJECT_REASON_SEQUENCE_GAP,
            f"publish.first_sequence: {error}",
            expected_sequence=error.expected,
        )
    if isinstance(error, LogFullError):
        return RequestRejectedError(
            oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED, str(error), retry_after_s=error.retry_after_s
        )
    if isinstance(error, LogUnavailableError):
        return RequestRejectedError(oona_pb2.REJECT_REASON_STORAGE, str(error))
    raise error
