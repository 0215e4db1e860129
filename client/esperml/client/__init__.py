"""Clients of the bus and recordings of it. Light: no torch, no numpy.

>>> from esperml.client import OonaClient, new_event
>>> from esperml.v1 import event_pb2
>>> async def tell(report):
...     async with OonaClient("localhost:50051", client_id="example-1") as oona:
...         await oona.publish(event_pb2.KIND_TELEMETRY, [new_event("my-run", health_report=report)])
"""

import esperml.client.forking  # noqa: F401, I001 - before whatever brings gRPC

from esperml.client.credentials import Credentials
from esperml.client.errors import (
    AmbiguousRunError,
    BehindFloorError,
    BelowFloorError,
    CallFailedError,
    ClientClosedError,
    ClientIdConflictError,
    CredentialsError,
    DrainTimeoutError,
    EsperError,
    ForbiddenError,
    ForkedClientError,
    FrameTooLargeError,
    GroupMismatchError,
    InvalidRequestError,
    NotARecordingError,
    OonaError,
    PublishTimeoutError,
    RecordingError,
    RejectedError,
    ResourceExhaustedError,
    SequenceGapError,
    StorageError,
    StreamEndedError,
    TruncatedRecordingError,
    UnknownSubscriptionError,
    WrongPayloadError,
)
from esperml.client.events import new_event
from esperml.client.oona import OonaClient
from esperml.client.recording import Recorded, Recorder, RecordingInfo, describe, read, record
from esperml.client.replaying import Replayed, Selection, replay, survey
from esperml.client.retry import Backoff
from esperml.client.subscription import Subscription
from esperml.client.sync import SyncOonaClient, SyncSubscription
from esperml.client.tamiyo import (
    InvalidStateError,
    NotFoundError,
    PreconditionError,
    RunsClient,
    TamiyoClient,
    TamiyoError,
)

__all__ = [
    "AmbiguousRunError",
    "Backoff",
    "BehindFloorError",
    "BelowFloorError",
    "CallFailedError",
    "ClientClosedError",
    "ClientIdConflictError",
    "Credentials",
    "CredentialsError",
    "DrainTimeoutError",
    "EsperError",
    "ForbiddenError",
    "ForkedClientError",
    "FrameTooLargeError",
    "GroupMismatchError",
    "InvalidRequestError",
    "InvalidStateError",
    "NotARecordingError",
    "NotFoundError",
    "OonaClient",
    "OonaError",
    "PreconditionError",
    "PublishTimeoutError",
    "Recorded",
    "Recorder",
    "RecordingError",
    "RecordingInfo",
    "RejectedError",
    "Replayed",
    "ResourceExhaustedError",
    "RunsClient",
    "Selection",
    "SequenceGapError",
    "StorageError",
    "StreamEndedError",
    "Subscription",
    "SyncOonaClient",
    "SyncSubscription",
    "TamiyoClient",
    "TamiyoError",
    "TruncatedRecordingError",
    "UnknownSubscriptionError",
    "WrongPayloadError",
    "describe",
    "new_event",
    "read",
    "record",
    "replay",
    "survey",
]
