"""Packed columns of the contract as numpy arrays. Within Tamiyo an absent value is NaN, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Table:
    """Columns side by side, one a row.

    Attributes:
        values: ``[M, N]``, NaN where absent.
        known: what was sent and not marked absent, ``[M, N]``. A NaN that was sent is known, and wrong.
    """

    values: Array
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, columns: Sequence[graph_pb2.Column], size: int) -> Table:
        """Unpack ``columns``: each has no values, or ``size`` of them, and marks none absent that it does not have."""
        values = np.full((len(columns), size), np.nan)
        known = np.zeros((len(columns), size), dtype=np.bool_)
        for row, column in enumerate(columns):
            if column.values:
                values[row] = column.values
                known[row] = True
                if column.absent:
                    known[row, column.absent] = False
                    values[row, column.absent] = np.nan
        return cls(values, known)


def to_column(values: Array) -> graph_pb2.Column:
    """The packed column of ``values``; what is NaN becomes absent."""
    missing = np.isnan(values)
    if missing.all():
        return graph_pb2.Column()
    return graph_pb2.Column(
        values=np.where(missing, 0.0, values).astype(np.float32).tolist(),
        absent=np.flatnonzero(missing).tolist(),
    )


def columns_of(
    message: graph_pb2.LayerColumns | graph_pb2.PlaceColumns, names: Sequence[str]
) -> list[graph_pb2.Column]:
    """The columns of a message in the order of ``names``."""
    return [getattr(message, name) for name in names]


def layer_columns(arrays: dict[str, Array]) -> graph_pb2.LayerColumns:
    """The message that holds a measure of the layers in each column. Measures without any value are left out."""
    columns = graph_pb2.LayerColumns()
    for name, values in arrays.items():
        packed = to_column(values)
        if packed.values:
            getattr(columns, name).CopyFrom(packed)
    return columns


def place_columns(arrays: dict[str, Array]) -> graph_pb2.PlaceColumns:
    """The message that holds a measure of the places in each column."""
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
