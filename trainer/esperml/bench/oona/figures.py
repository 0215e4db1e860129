"""Medians, percentiles and the intervals that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Final

import numpy as np

COVERAGE: Final = 0.9


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median of blocks, with an interval for the median that they are drawn from.

    Attributes:
        median: the middle value.
        low: lower end of the interval.
        high: upper end.
    """

    median: float
    low: float
    high: float

    def rounded(self, digits: int) -> tuple[float, list[float]]:
        """The median and the interval, as JSON has them."""
        return round(self.median, digits), [round(self.low, digits), round(self.high, digits)]


def estimate(values: Sequence[float]) -> Estimate:
    """The median of at least one value, and the narrowest pair of order statistics that covers it.

    Whatever the distribution, the k-th smallest and the k-th largest of n values hold the median between them with the
    probability 1 - 2 P(Binomial(n, 1/2) < k). k is the largest that makes this at least 0.9. Below five values none
    does, and the interval is the whole range.
    """
    ordered = sorted(values)
    n = len(ordered)
    rank = 1
    while 2 * (rank + 1) <= n and 1 - 2 * sum(comb(n, below) for below in range(rank + 1)) / 2**n >= COVERAGE:
        rank += 1
    return Estimate(median(ordered), ordered[rank - 1], ordered[-rank])


def percentiles_us(seconds: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th percentile, in µs."""
    p50, p99 = np.percentile(np.asarray(seconds) * 1e6, [50, 99])
    return round(float(p50), 1), round(float(p99), 1)
