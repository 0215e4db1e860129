"""Everything that the clients raise.

::

    EsperError
    ├── OonaError
    │   ├── ClientClosedError                the client was closed
    │   ├── CredentialsError                 a token or a certificate cannot be used: field
    │   ├── ForkedClientError                the client was made before a fork, and is used behind it
    │   ├── StreamEndedError                 the server ended the stream for good: code, detail
    │   ├── CallFailedError                  a single call failed: method, code, detail
    │   ├── PublishTimeoutError              not confirmed in time: timeout_s
    │   ├── DrainTimeoutError                not finished in time: timeout_s
    │   ├── ClientIdConflictError            another publisher uses the client id: client_id
    │   ├── FrameTooLargeError               more than the server takes at once: size, limit
    │   ├── RejectedError                    the server refused one request: reason, message, retry_after_s
    │   │   ├── InvalidRequestError          a field is missing or out of range
    │   │   ├── WrongPayloadError            the kind does not carry the payload
    │   │   ├── SequenceGapError             expected_sequence
    │   │   ├── BelowFloorError              earliest_offset
    │   │   ├── UnknownSubscriptionError
    │   │   ├── StorageError                 the server cannot store now
    │   │   ├── ResourceExhaustedError       over a rate or a limit
    │   │   ├── GroupMismatchError           another member asked for other filters
    │   │   └── ForbiddenError               the token does not allow it
    │   └── BehindFloorError                 records yet to be read were purged: earliest_offset
    └── RecordingError                       path
        ├── NotARecordingError               no recording, or none of this contract
        ├── AmbiguousRunError                more runs than can be replayed as one: run_ids
        └── TruncatedRecordingError          the end is missing: whole

They are one tree so that a training loop can guard itself with one ``except``; they carry fields so that nobody has to
read their text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import grpc


class EsperError(Exception):
    """Base of all errors of the clients."""


class OonaError(EsperError):
    """Base of the errors of the bus."""


class ClientClosedError(OonaError):
    """The client was closed before this was done."""

    def __init__(self) -> None:
        super().__init__("the client is closed")


class CredentialsError(OonaError):
    """A token or a certificate cannot be used as given.

    Attributes:
        field: which one, as in :class:`~esperml.client.Credentials`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class ForkedClientError(OonaError):
    """The client was made in another process, of which this one is a fork. Its connection did not come along."""

    def __init__(self) -> None:
        super().__init__("the client was made before this process was forked; make one after the fork, or spawn")


class StreamEndedError(OonaError):
    """The server ended the stream with a status that trying again will not change.

    Attributes:
        code: the gRPC status.
        detail: what the server said.
    """

    def __init__(self, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"the stream ended with {code.name}: {detail}")
        self.code = code
        self.detail = detail


class CallFailedError(OonaError):
    """A call outside the stream failed.

    Attributes:
        method: name of the call, for example ``DescribeTopic``.
        code: the gRPC status.
        detail: what the server said.
    """

    def __init__(self, method: str, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"{method} failed with {code.name}: {detail}")
        self.method = method
        self.code = code
        self.detail = detail


class PublishTimeoutError(OonaError, TimeoutError):
    """Events were not confirmed in time. They may be stored already, and the client goes on trying.

    Attributes:
        timeout_s: the time that was allowed, in s.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"not confirmed within {timeout_s:g} s; the client goes on trying")
        self.timeout_s = timeout_s


class DrainTimeoutError(OonaError, TimeoutError):
    """A client that was told to drain had not finished in time, and was closed all the same.

    Attributes:
        timeout_s: the time that was allowed, in s.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"not drained within {timeout_s:g} s; the client is closed all the same")
        self.timeout_s = timeout_s


class ClientIdConflictError(OonaError):
    """Another publisher publishes under the same client id. Each needs its own.

    Attributes:
        client_id: the id that is not unique.
    """

    def __init__(self, client_id: str) -> None:
        super().__init__(f"client id {client_id!r} is used by another publisher; give each its own")
        self.client_id = client_id


class FrameTooLargeError(OonaError):
    """One call published more than the server takes in a frame. Publish in smaller parts.

    Attributes:
        size: bytes of the frame.
        limit: most bytes that the server takes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a frame of {size} bytes is over the server's limit of {limit}; publish in smaller parts")
        self.size = size
        self.limit = limit


class RejectedError(OonaError):
    """The server refused one request; nothing of it was done, and the stream stands.

    Attributes:
        reason: the contract's reason.
        message: in words, naming the field.
        retry_after_s: time after which it is worth while to try again, in s, where the server said so.
    """

    retry_after_s: float | None = None

    def __init__(self, reason: oona_pb2.RejectReason.ValueType, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class InvalidRequestError(RejectedError):
    """A field is missing or out of range; the message names it."""


class WrongPayloadError(RejectedError):
    """The payload of an event is not one that its kind carries."""


class SequenceGapError(RejectedError):
    """The sequence of a frame does not follow what the server stored last.

    Attributes:
        expected_sequence: the sequence that the server expected, where it said so.
    """

    expected_sequence: int | None = None


class BelowFloorError(RejectedError):
    """The offset asked for was purged.

    Attributes:
        earliest_offset: first offset that is still there, where the server said so.
    """

    earliest_offset: int | None = None


class UnknownSubscriptionError(RejectedError):
    """The server knows no such subscription on this stream."""


class StorageError(RejectedError):
    """The server cannot store now, for example because its disk is full."""


class ResourceExhaustedError(RejectedError):
    """The client is over its rate, or the log over its limit. Publishing tries again by itself."""


class GroupMismatchError(RejectedError):
    """Another member of the group asked for other filters."""


class ForbiddenError(RejectedError):
    """The client's token does not allow it; the message says what it lacks. Trying again needs another token."""


class BehindFloorError(OonaError):
    """A subscription ended because records that it had yet to read were purged.

    Attributes:
        earliest_offset: first offset that is still there.
    """

    def __init__(self, earliest_offset: int) -> None:
        super().__init__(f"records yet to be read were purged; the first that is still there is {earliest_offset}")
        self.earliest_offset = earliest_offset


class RecordingError(EsperError):
    """Base of the errors of recordings.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class NotARecordingError(RecordingError):
    """The file is no recording, or holds something that this contract does not know."""


class AmbiguousRunError(RecordingError):
    """More than one run is chosen, but they are to be replayed as a single one.

    Attributes:
        run_ids: the runs.
    """

    def __init__(self, path: Path, run_ids: Sequence[str]) -> None:
        shown = ", ".join(run_ids[:5]) + (", …" if len(run_ids) > 5 else "")
        super().__init__(path, f"holds {len(run_ids)} runs ({shown}), which cannot be replayed as one: choose one")
        self.run_ids = run_ids


class TruncatedRecordingError(RecordingError):
    """The end of the recording is missing or damaged. Raised after everything that is whole was given back.

    Attributes:
        whole: events that were given back.
    """

    def __init__(self, path: Path, whole: int) -> None:
        what = f"after {whole} whole events" if whole else "before its first whole event: nothing of it can be read"
        super().__init__(path, f"the recording is cut off or damaged {what}")
        self.whole = whole


_REJECTIONS: Final[Mapping[int, type[RejectedError]]] = {
    oona_pb2.REJECT_REASON_INVALID: InvalidRequestError,
    oona_pb2.REJECT_REASON_WRONG_PAYLOAD: WrongPayloadError,
    oona_pb2.REJECT_REASON_SEQUENCE_GAP: SequenceGapError,
    oona_pb2.REJECT_REASON_BELOW_FLOOR: BelowFloorError,
    oona_pb2.REJECT_REASON_UNKNOWN_SUBSCRIPTION: UnknownSubscriptionError,
    oona_pb2.REJECT_REASON_STORAGE: StorageError,
    oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED: ResourceExhaustedError,
    oona_pb2.REJECT_REASON_GROUP_MISMATCH: GroupMismatchError,
    oona_pb2.REJECT_REASON_FORBIDDEN: ForbiddenError,
}


def rejection(rejected: oona_pb2.Rejected) -> RejectedError:
    """The error for what the server said. A reason of a later contract becomes a plain :class:`RejectedError`."""
    error = _REJECTIONS.get(rejected.reason, RejectedError)(rejected.reason, rejected.message)
    if rejected.HasField("retry_after"):
        error.retry_after_s = rejected.retry_after.ToTimedelta().total_seconds()
    if isinstance(error, SequenceGapError) and rejected.HasField("expected_sequence"):
        error.expected_sequence = rejected.expected_sequence
    if isinstance(error, BelowFloorError) and rejected.HasField("earliest_offset"):
        error.earliest_offset = rejected.earliest_offset
    return error
