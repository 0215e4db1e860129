from __future__ import annotations

import subprocess
import sys

import esperml.client

PUBLIC = {
    "Backoff",
    "BehindFloorError",
    "BelowFloorError",
    "CallFailedError",
    "ClientClosedError",
    "ClientIdConflictError",
    "EsperError",
    "FrameTooLargeError",
    "GroupMismatchError",
    "InvalidRequestError",
    "NotARecordingError",
    "OonaClient",
    "OonaError",
    "PublishTimeoutError",
    "Recorded",
    "Recorder",
    "RecordingError",
    "RecordingInfo",
    "RejectedError",
    "SequenceGapError",
    "StorageError",
    "StreamEndedError",
    "Subscription",
    "TruncatedRecordingError",
    "UnknownSubscriptionError",
    "WrongPayloadError",
    "describe",
    "new_event",
    "read",
    "record",
}


def test_the_public_names_are_these():
    assert set(esperml.client.__all__) >= PUBLIC
    assert all(hasattr(esperml.client, name) for name in esperml.client.__all__)
    assert sorted(esperml.client.__all__) == list(esperml.client.__all__)


def test_the_client_brings_no_torch():
    code = "import sys, esperml.client; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0
