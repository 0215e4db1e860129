"""Functions that bring measures of any scale into the order of one, without ever giving NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array

LIMIT: Final = 8.0
"""Magnitude beyond which a feature is cut off: far outside what training shows, it must not swing a policy."""

Squash = Callable[[Array], Array]


def unit(values: Array) -> Array:
    """As it is: for what lies in -1 to 1 already."""
    return values


def log_scale(smallest: float, large: float) -> Squash:
    """``log(1 + x / smallest) / log(1 + large / smallest)``, signed.

    Args:
        smallest: magnitude below which differences do not matter.
        large: magnitude that maps to one.
    """
    scale = 1.0 / np.log1p(large / smallest)

    def squash(values: Array) -> Array:
        squashed: Array = np.sign(values) * np.log1p(np.abs(values) / smallest) * scale
        return squashed

    return squash


def steep(values: Array) -> Array:
    """``tanh(10 x)``: for slopes per report, which are small."""
    squashed: Array = np.tanh(10.0 * values)
    return squashed


def ratio(numerator: Array, denominator: Array | float) -> Array:
    """Natural logarithm of a ratio of positive sizes, divided by 4; NaN where either is absent or not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.asarray(numerator / denominator, dtype=np.float64)
    usable = (quotient > 0) & np.isfinite(quotient)
    logarithm: Array = np.where(usable, np.log(np.where(usable, quotient, 1.0)) / 4.0, np.nan)
    return logarithm


def rank(values: Array) -> Array:
    """Share of the other known values that are smaller, ties counted half, 0 to 1; one half where there is no other.

    NaN stays NaN. Ranks compare layers of one host whatever the host's scale is.
    """
    result = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    if len(known) == 1:
        result[known] = 0.5
    elif len(known) > 1:
        chosen = values[known]
        ordered = np.sort(chosen)
        below = np.searchsorted(ordered, chosen, side="left")
        not_above = np.searchsorted(ordered, chosen, side="right")
        result[known] = (below + not_above - 1) / 2.0 / (len(known) - 1)
    return result


def finite(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zero where absent, cut off at :data:`LIMIT`; in place."""
    np.copyto(table, 0.0, where=np.isnan(table))
    return np.clip(table, -LIMIT, LIMIT, out=table)
