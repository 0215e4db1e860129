"""Deliveries in the making: records are put in as they lie in their frames, and paid for from credit."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from esperml.oona.wire import encode_delivery

if TYPE_CHECKING:
    from esperml.oona.credit import Credit
    from esperml.oona.wire import EncodedRecords

# A delivery ends with the record that reaches this.
_DELIVERY_BYTES: Final = 2**20


class DeliveryBuilder:
    """Collects records for one delivery.

    Args:
        subscription_id: the subscription that it is for.
        max_records: most records in it.
        credit: what pays for them.

    Attributes:
        count: records in it.
    """

    def __init__(self, subscription_id: int, max_records: int, credit: Credit) -> None:
        self.count = 0
        self._subscription_id = subscription_id
        self._max_records = max_records
        self._credit = credit
        self._size = 0
        self._parts: list[bytes] = []

    @property
    def is_full(self) -> bool:
        """Whether no record fits in."""
        return self.count >= self._max_records or self._size >= _DELIVERY_BYTES

    def add(self, records: EncodedRecords, start: int, stop: int) -> int:
        """Put in records from index ``start`` on, as many as fit and can be paid for.

        Returns:
            Index after the last that was put in: ``stop`` where all were.
        """
        if self.is_full:
            return start
        sizes = records.sizes
        most = min(stop, start + self._max_records - self.count)
        most = min(most, bisect_left(sizes, sizes[start] + _DELIVERY_BYTES - self._size, start + 1, most))
        end = self._credit.take(sizes, start, most)
        if end > start:
            self.count += end - start
            self._size += sizes[end] - sizes[start]
            self._parts.append(records.slice(start, end))
        return end

    def encode(self) -> bytes:
        """The delivery as a serialized ``StreamResponse``."""
        return encode_delivery(self._subscription_id, self._parts)
