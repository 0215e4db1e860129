"""Counts of what goes through the log of one kind. A frame costs a few additions, however many events it holds."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esperml.oona.log import Appended

LATENCY_BOUNDS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
SIZE_BOUNDS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class Distribution:
    """How often values fell between bounds.

    Args:
        bounds: ascending; a value counts at the first that it does not exceed.

    Attributes:
        bounds: the bounds.
        counts: values at each bound, and above the last.
        total: sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Traffic:
    """What went through the log of one kind since the process began.

    Attributes:
        stored: events.
        stored_bytes: bytes of them.
        duplicates: events that a publisher sent again and that were not stored twice.
        delivered: records, to whomever and however often.
        delivered_bytes: bytes of the deliveries.
        redelivered: those of the records that a group had been delivered before.
        acknowledged: records that members of groups said they were done with.
        given_back: records that they gave back.
        given_up: records that became dead letters.
        commit_s: time from a frame's arrival to its confirmation, in s.
        frame_events: events in a published frame.
        delivery_records: records in a delivery.
    """

    __slots__ = (
        "acknowledged",
        "commit_s",
        "delivered",
        "delivered_bytes",
        "delivery_records",
        "duplicates",
        "frame_events",
        "given_back",
        "given_up",
        "redelivered",
        "stored",
        "stored_bytes",
    )

    def __init__(self) -> None:
        self.stored = self.stored_bytes = self.duplicates = 0
        self.delivered = self.delivered_bytes = self.redelivered = 0
        self.acknowledged = self.given_back = self.given_up = 0
        self.commit_s = Distribution(LATENCY_BOUNDS_S)
        self.frame_events = Distribution(SIZE_BOUNDS)
        self.delivery_records = Distribution(SIZE_BOUNDS)

    def frame_stored(self, appended: Appended, size: int, took_s: float) -> None:
        """Count a frame of ``size`` bytes that was confirmed ``took_s`` after it came."""
        self.stored += appended.count
        self.duplicates += appended.duplicates
        if appended.count:
            self.stored_bytes += size
        self.commit_s.add(took_s)
        self.frame_events.add(appended.count + appended.duplicates)

    def delivery_sent(self, records: int, size: int) -> None:
        """Count a delivery of so many records and bytes."""
        self.delivered += records
        self.delivered_bytes += size
        self.delivery_records.add(records)
