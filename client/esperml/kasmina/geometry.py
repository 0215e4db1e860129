"""What a blueprint must know of a place: what it reads, and what it adds to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import nn

from esperml.v1 import graph_pb2

LINEAR: Final = graph_pb2.LAYER_TYPE_LINEAR
CONV_RANKS: Final[Mapping[graph_pb2.LayerType.ValueType, int]] = {
    graph_pb2.LAYER_TYPE_CONV1D: 1,
    graph_pb2.LAYER_TYPE_CONV2D: 2,
    graph_pb2.LAYER_TYPE_CONV3D: 3,
}
"""Number of spatial dimensions of each kind of convolution."""

LAYER_TYPES: Final[tuple[tuple[type[nn.Module], graph_pb2.LayerType.ValueType], ...]] = (
    (nn.Linear, LINEAR),
    (nn.Conv1d, graph_pb2.LAYER_TYPE_CONV1D),
    (nn.Conv2d, graph_pb2.LAYER_TYPE_CONV2D),
    (nn.Conv3d, graph_pb2.LAYER_TYPE_CONV3D),
)
"""The modules that can be wrapped."""


def layer_type(module: nn.Module) -> graph_pb2.LayerType.ValueType | None:
    """The contract's name for the kind of ``module``, or ``None`` for a module that cannot be wrapped."""
    for cls, kind in LAYER_TYPES:
        if isinstance(module, cls):
            return kind
    return None


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes at a place, without the batch dimension.

    Linear layers keep features last, ``(*, F)``; convolutions keep channels first, ``(C, *spatial)``.

    Attributes:
        source_type: kind of the layer whose input the seed reads.
        target_type: kind of the layer to whose output it adds.
        input_shape: shape of what it reads.
        output_shape: shape of what it adds to.
    """

    source_type: graph_pb2.LayerType.ValueType
    target_type: graph_pb2.LayerType.ValueType
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def spatial(self) -> bool:
        """True where a seed maps channels to channels: from a convolution's input to a convolution's output."""
        return (
            self.source_type == self.target_type
            and self.target_type in CONV_RANKS
            and len(self.input_shape) == len(self.output_shape) == self.rank + 1
        )

    @property
    def flat(self) -> bool:
        """True where a seed maps features to features, a convolution's input being flattened for a Linear layer."""
        if self.target_type != LINEAR or not self.output_shape:
            return False
        if self.source_type == LINEAR:
            return self.input_shape[:-1] == self.output_shape[:-1] and len(self.input_shape) > 0
        return len(self.output_shape) == 1

    @property
    def rank(self) -> int:
        """Spatial dimensions of the source's input; 0 for a Linear layer."""
        return CONV_RANKS.get(self.source_type, 0)

    @property
    def in_features(self) -> int:
        """Features (or channels, where :attr:`spatial`) that the seed reads."""
        if self.spatial:
            return self.input_shape[0]
        return self.input_shape[-1] if self.source_type == LINEAR else math.prod(self.input_shape)

    @property
    def out_features(self) -> int:
        """Features (or channels, where :attr:`spatial`) that the seed writes."""
        return self.output_shape[0] if self.spatial else self.output_shape[-1]

    @property
    def in_positions(self) -> int:
        """Positions at which the input is read by one map: of a convolution's input, or of a sequence's features."""
        return math.prod(self.input_shape[1:]) if self.spatial else self.out_positions

    @property
    def out_positions(self) -> int:
        """Positions of the output at which one map writes: of channels, or of a sequence's features."""
        return math.prod(self.output_shape[1:] if self.spatial else self.output_shape[:-1])

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """Channels and spatial shape of the input as a signal: a Linear layer's features are one of one channel."""
        return self.input_shape if self.source_type in CONV_RANKS else (1, self.in_features)
