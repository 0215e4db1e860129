"""Functions that bring measures of any scale into the order of one.

Each takes many rows at once. What is absent, NaN, stays so.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array

LIMIT: Final = 8.0
"""Magnitude beyond which a feature is cut off: far outside what training shows, it must not swing a policy."""


def log_scale(values: Array, smallest: Array | float, large: Array | float) -> Array:
    """``log(1 + x / smallest) / log(1 + large / smallest)``, signed.

    Args:
        values: any shape.
        smallest: magnitude below which differences do not matter.
        large: magnitude that maps to one.
    """
    squashed: Array = np.sign(values) * np.log1p(np.abs(values) / smallest) * (1.0 / np.log1p(large / smallest))
    return squashed


def steep(values: Array) -> Array:
    """``tanh(10 x)``: for slopes per report, which are small."""
    squashed: Array = np.tanh(10.0 * values)
    return squashed


def ratio(numerator: Array, denominator: Array) -> Array:
    """Natural logarithm of a ratio of positive sizes, divided by 4; NaN where either is absent or not positive."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = numerator / denominator
    usable = (quotient > 0) & np.isfinite(quotient)
    logarithm: Array = np.where(usable, np.log(np.where(usable, quotient, 1.0)) / 4.0, np.nan)
    return logarithm


def rank(values: Array) -> Array:
    """Share of the other known values of a row that are smaller, ties counted half; one half where there is no other.

    NaN stays NaN. Ranks compare layers of one host whatever the host's scale is.

    Args:
        values: shape ``[K, N]``.

    Returns:
        Shape ``[K, N]``, 0 to 1.
    """
    # Stable sorts from either side count equal values up and down: together, twice the middle of where they lie.
    # NaN is sorted last.
    twice = _positions(values) + _positions(values[:, ::-1])[:, ::-1]
    known = ~np.isnan(values)
    others = known.sum(axis=1, keepdims=True) - 1
    share = np.where(others > 0, twice / 2.0 / np.maximum(others, 1), 0.5)
    return np.where(known, share, np.nan)


def _positions(values: Array) -> NDArray[np.int64]:
    """Where each value of a row lies when the row is sorted."""
    positions = np.empty(values.shape, dtype=np.int64)
    rows, columns = (np.arange(length) for length in values.shape)
    positions[rows[:, None], np.argsort(values, axis=1, kind="stable")] = columns
    return positions
