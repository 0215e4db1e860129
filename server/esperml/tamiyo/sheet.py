"""From raw values by name to one table of features.

Every kind of squashing is done once for all features of that kind: a host has few layers, so that most of the time
would go into calling numpy for one short column after another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array
from esperml.tamiyo.squash import LIMIT, log_scale, rank, ratio, steep

Value = Array | NDArray[np.bool_] | NDArray[np.signedinteger] | float
"""One value a layer or place, or the same for all; NaN where not known."""

_NONE: Final[Mapping[str, Array]] = MappingProxyType({})


class Sheet:
    """The features of one kind of thing: layers, places, or the host.

    Args:
        names: the F features in their order. A feature ``x_known`` says whether ``x`` is known.
        scales: features that are squashed by logarithms, each with the arguments of
            :func:`~esperml.tamiyo.squash.log_scale`.
    """

    def __init__(self, names: Sequence[str], scales: Mapping[str, tuple[float, float]]) -> None:
        self._names = tuple(names)
        self._scaled = tuple(scales)
        self._smallest, self._large = np.array(list(scales.values()), dtype=np.float64).T[:, :, None]

    def table(
        self,
        size: int,
        *,
        raw: Mapping[str, Value],
        ratios: Mapping[str, tuple[Value, Value]],
        scaled: Mapping[str, Value],
        slopes: Mapping[str, Value] = _NONE,
        ranked: Mapping[str, Value] = _NONE,
    ) -> NDArray[np.float32]:
        """Squash and lay out the values of all features.

        Args:
            size: number of layers or places N.
            raw: features that stay as they are.
            ratios: numerator and denominator, for :func:`~esperml.tamiyo.squash.ratio`.
            scaled: the features that have a scale, at least.
            slopes: slopes per report, for :func:`~esperml.tamiyo.squash.steep`.
            ranked: what is ranked, for :func:`~esperml.tamiyo.squash.rank`.

        Returns:
            Shape ``[N, F]``, finite: zero where a value is not known, cut off at :data:`~esperml.tamiyo.squash.LIMIT`.
        """
        numerators, denominators = zip(*ratios.values(), strict=True)
        blocks = [
            _rows(raw.values(), size),
            ratio(_rows(numerators, size), _rows(denominators, size)),
            log_scale(_rows([scaled[name] for name in self._scaled], size), self._smallest, self._large),
        ]
        if slopes:
            blocks.append(steep(_rows(slopes.values(), size)))
        if ranked:
            blocks.append(rank(_rows(ranked.values(), size)))
        values = np.concatenate(blocks)
        known = ~np.isnan(values)
        np.copyto(values, 0.0, where=~known)
        np.clip(values, -LIMIT, LIMIT, out=values)
        order = _order(self._names, (*raw, *ratios, *self._scaled, *slopes, *ranked))
        return np.concatenate([values, known]).T[:, order].astype(np.float32, order="C")


def _rows(values: Collection[Value], size: int) -> Array:
    table = np.empty((len(values), size))
    for row, value in enumerate(values):
        table[row] = value
    return table


@cache
def _order(names: tuple[str, ...], given: tuple[str, ...]) -> NDArray[np.int64]:
    """Where each feature lies among the values given and, after them, whether each is known."""
    at = {name: index for index, name in enumerate(given)}
    at |= {f"{name}_known": len(given) + index for index, name in enumerate(given)}
    return np.array([at[name] for name in names], dtype=np.int64)
