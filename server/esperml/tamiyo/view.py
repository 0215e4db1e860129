"""A state with its packed lists unpacked once, for everything that computes features from it."""

from __future__ import annotations

import math
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
    def _specs(self) -> Array:
        """Type, parameters, elements in and out, width in and out, dimensions in and out, activated: ``[9, N]``."""
        rows = []
        for layer in self.state.graph.layers:
            read, made = tuple(layer.input_shape), tuple(layer.output_shape)
            kind = layer.type
            side = 0 if kind in CHANNELS_FIRST else -1
            rows.append(
                (
                    kind,
                    layer.parameters,
                    math.prod(read),
                    math.prod(made),
                    read[side] if read else 1,
                    made[side] if made else 1,
                    len(read),
                    len(made),
                    layer.activated if layer.HasField("activated") else np.nan,
                )
            )
        return np.array(rows, dtype=np.float64).T

    def _spec(self, row: int) -> Array:
        values: Array = self._specs[row]
        return values

    @property
    def layer_type(self) -> Array:
        """``LayerType`` of each layer, ``[N]``."""
        return self._spec(0)

    @property
    def parameters(self) -> Array:
        """Parameters of each layer, ``[N]``."""
        return self._spec(1)

    @property
    def in_elements(self) -> Array:
        """Numbers in one sample's input of each layer, ``[N]``; 1 for a scalar or an unstated shape."""
        return self._spec(2)

    @property
    def out_elements(self) -> Array:
        """Numbers in one sample's output of each layer, ``[N]``; 1 for a scalar or an unstated shape."""
        return self._spec(3)

    @property
    def in_width(self) -> Array:
        """Channels or features of each layer's input, ``[N]``."""
        return self._spec(4)

    @property
    def out_width(self) -> Array:
        """Channels or features of each layer's output, ``[N]``."""
        return self._spec(5)

    @property
    def spatial_in(self) -> Array:
        """1 where a layer's input has more than one dimension, ``[N]``."""
        return (self._spec(6) > 1).astype(np.float64)

    @property
    def spatial_out(self) -> Array:
        """1 where a layer's output has more than one dimension, ``[N]``."""
        return (self._spec(7) > 1).astype(np.float64)

    @property
    def activated(self) -> Array:
        """1 where a non-linearity follows a layer, 0 where none does, NaN where that is not known, ``[N]``."""
        return self._spec(8)

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
