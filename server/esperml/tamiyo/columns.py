"""Packed columns of the contract as numpy arrays. Within Tamiyo an absent value is NaN, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.contract import MEASURES
from esperml.v1 import graph_pb2, health_pb2

Array = NDArray[np.float64]
"""One value a layer or place; NaN where the measure is absent."""

LAYER_MEASURES: Final = tuple(MEASURES)
PLACE_MEASURES: Final = ("growth_gradient", "explained_error")


def absent(size: int) -> Array:
    """A column of ``size`` absent values."""
    return np.full(size, np.nan)


def from_column(column: graph_pb2.Column, size: int) -> Array:
    """The values of a column, NaN where absent.

    Args:
        column: a column of a state that was validated: no values, or ``size`` of them.
        size: number of layers or places.

    Returns:
        Array of shape ``[size]``.
    """
    if not column.values:
        return absent(size)
    values = np.array(column.values, dtype=np.float64)
    if column.absent:
        values[np.array(column.absent, dtype=np.int64)] = np.nan
    return values


def to_column(values: Array) -> graph_pb2.Column:
    """The packed column of ``values``; what is NaN becomes absent."""
    missing = np.isnan(values)
    if missing.all():
        return graph_pb2.Column()
    return graph_pb2.Column(
        values=np.where(missing, 0.0, values).astype(np.float32).tolist(),
        absent=np.flatnonzero(missing).tolist(),
    )


def layer_arrays(columns: graph_pb2.LayerColumns, size: int) -> dict[str, Array]:
    """Every measure of the layers by name, each of shape ``[size]``."""
    return {name: from_column(getattr(columns, name), size) for name in LAYER_MEASURES}


def layer_columns(arrays: dict[str, Array]) -> graph_pb2.LayerColumns:
    """The message of :func:`layer_arrays`. Measures without any value are left out."""
    columns = graph_pb2.LayerColumns()
    for name, values in arrays.items():
        packed = to_column(values)
        if packed.values:
            getattr(columns, name).CopyFrom(packed)
    return columns


def place_arrays(columns: graph_pb2.PlaceColumns, size: int) -> dict[str, Array]:
    """Every measure of the places by name, each of shape ``[size]``."""
    return {name: from_column(getattr(columns, name), size) for name in PLACE_MEASURES}


def place_columns(arrays: dict[str, Array]) -> graph_pb2.PlaceColumns:
    """The message of :func:`place_arrays`."""
    columns = graph_pb2.PlaceColumns()
    for name, values in arrays.items():
        packed = to_column(values)
        if packed.values:
            getattr(columns, name).CopyFrom(packed)
    return columns


def optional(message: health_pb2.RunMeasures | health_pb2.SeedSignal, field: str) -> float:
    """An optional number of a message, NaN where it is absent."""
    return float(getattr(message, field)) if message.HasField(field) else np.nan  # type: ignore[arg-type]


def indices(values: Sequence[int]) -> NDArray[np.int64]:
    """A packed index list as an array of shape ``[len(values)]``."""
    return np.array(values, dtype=np.int64)
