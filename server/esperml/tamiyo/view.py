"""A state with its packed lists unpacked once, for everything that computes features from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array, indices
from esperml.tamiyo.topology import Topology
from esperml.v1 import graph_pb2, health_pb2

CHANNELS_FIRST: Final = frozenset(
    {graph_pb2.LAYER_TYPE_CONV1D, graph_pb2.LAYER_TYPE_CONV2D, graph_pb2.LAYER_TYPE_CONV3D}
)
LIVE_STAGES: Final = frozenset(
    {health_pb2.SEED_STAGE_GERMINATED, health_pb2.SEED_STAGE_BLENDING, health_pb2.SEED_STAGE_HOLDING}
)


@dataclass(frozen=True)
class StateView:
    """One state of N layers and P places.

    Attributes:
        state: the message.
        topology: its graph.
        layers: every measure of the layers, ``[N]`` each, derived ones included.
        places: every measure of the places, ``[P]`` each.
    """

    state: graph_pb2.ModelGraphState
    topology: Topology
    layers: dict[str, Array]
    places: dict[str, Array]

    @cached_property
    def place_source(self) -> NDArray[np.int64]:
        """Layer whose input a seed reads, ``[P]``."""
        return indices(self.state.graph.places.sources)

    @cached_property
    def place_target(self) -> NDArray[np.int64]:
        """Layer to whose output a seed adds, ``[P]``."""
        return indices(self.state.graph.places.targets)

    @cached_property
    def layer_type(self) -> NDArray[np.int64]:
        """``LayerType`` of each layer, ``[N]``."""
        return indices([layer.type for layer in self.state.graph.layers])

    @cached_property
    def parameters(self) -> Array:
        """Parameters of each layer, ``[N]``."""
        return np.array([layer.parameters for layer in self.state.graph.layers], dtype=np.float64)

    @cached_property
    def in_elements(self) -> Array:
        """Numbers in one sample's input of each layer, at least 1, ``[N]``."""
        return np.array([max(1, math.prod(x.input_shape)) for x in self.state.graph.layers], dtype=np.float64)

    @cached_property
    def out_elements(self) -> Array:
        """Numbers in one sample's output of each layer, at least 1, ``[N]``."""
        return np.array([max(1, math.prod(x.output_shape)) for x in self.state.graph.layers], dtype=np.float64)

    @cached_property
    def in_width(self) -> Array:
        """Channels or features of each layer's input, ``[N]``."""
        return np.array([_width(x.input_shape, x.type) for x in self.state.graph.layers], dtype=np.float64)

    @cached_property
    def out_width(self) -> Array:
        """Channels or features of each layer's output, ``[N]``."""
        return np.array([_width(x.output_shape, x.type) for x in self.state.graph.layers], dtype=np.float64)

    @cached_property
    def live_seeds(self) -> list[health_pb2.SeedSignal]:
        """Seeds that are planted and not settled yet."""
        return [seed for seed in self.state.seeds if seed.stage in LIVE_STAGES]

    @cached_property
    def fossils(self) -> list[health_pb2.SeedSignal]:
        """Seeds that were made part of the host."""
        return [seed for seed in self.state.seeds if seed.stage == health_pb2.SEED_STAGE_FOSSILISED]

    def count_at_places(self, seeds: list[health_pb2.SeedSignal]) -> Array:
        """How many of ``seeds`` lie at each place, ``[P]``."""
        at = indices([seed.place for seed in seeds])
        return np.bincount(at, minlength=len(self.place_source)).astype(np.float64)

    def count_at_targets(self, at_places: Array) -> Array:
        """A count per place summed over the places that lead into each layer, ``[N]``."""
        return np.bincount(self.place_target, weights=at_places, minlength=self.topology.size).astype(np.float64)


def _width(shape: Sequence[int], layer_type: int) -> int:
    if not shape:
        return 1
    return max(1, shape[0] if layer_type in CHANNELS_FIRST else shape[-1])
