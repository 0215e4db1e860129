"""A state with its packed lists unpacked once, for all that checks, bounds or judges it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo import health
from esperml.tamiyo.columns import LAYER_MEASURES, PLACE_MEASURES, Array, Table, columns_of, indices
from esperml.tamiyo.topology import Topology
from esperml.v1 import graph_pb2, health_pb2

CHANNELS_FIRST: Final = frozenset(
    {graph_pb2.LAYER_TYPE_CONV1D, graph_pb2.LAYER_TYPE_CONV2D, graph_pb2.LAYER_TYPE_CONV3D}
)
LIVE_STAGES: Final = frozenset(
    {health_pb2.SEED_STAGE_GERMINATED, health_pb2.SEED_STAGE_BLENDING, health_pb2.SEED_STAGE_HOLDING}
)


@dataclass(frozen=True, slots=True)
class LayerSpecs:
    """What the structure says of its N layers, read in one pass.

    Attributes:
        names: of the layers.
        layer_type: ``LayerType`` of each layer, ``[N]``.
        parameters: parameters of each layer, ``[N]``.
        in_elements: numbers in one sample's input of each layer, ``[N]``; 1 for a scalar or an unstated shape.
        out_elements: numbers in one sample's output of each layer, ``[N]``; 1 for a scalar or an unstated shape.
        in_width: channels or features of each layer's input, ``[N]``.
        out_width: channels or features of each layer's output, ``[N]``.
        spatial_in: 1 where a layer's input has more than one dimension, ``[N]``.
        spatial_out: 1 where a layer's output has more than one dimension, ``[N]``.
        activated: 1 where a non-linearity follows a layer, 0 where none does, NaN where that is not known, ``[N]``.
    """

    names: list[str]
    layer_type: Array
    parameters: Array
    in_elements: Array
    out_elements: Array
    in_width: Array
    out_width: Array
    spatial_in: Array
    spatial_out: Array
    activated: Array

    @classmethod
    def of(cls, graph: graph_pb2.HostGraph) -> LayerSpecs:
        """Read the layers of a graph, which need not be valid yet."""
        names: list[str] = []
        facts: list[float] = []
        for layer in graph.layers:
            kind, read, made = layer.type, layer.input_shape[:], layer.output_shape[:]
            side = 0 if kind in CHANNELS_FIRST else -1
            names.append(layer.name)
            facts += (
                kind,
                layer.parameters,
                # As floats, which go over to infinity where integers would grow without bound.
                math.prod(read, start=1.0),
                math.prod(made, start=1.0),
                read[side] if read else 1,
                made[side] if made else 1,
                len(read) > 1,
                len(made) > 1,
                layer.activated if layer.HasField("activated") else math.nan,
            )
        return cls(names, *np.array(facts, dtype=np.float64).reshape(len(names), -1).T)


@dataclass(frozen=True)
class StateView:
    """One state of N layers and P places, each part unpacked when it is first asked for.

    The graph, the measures and the history must not change afterwards; limits and mask may, they are not unpacked.

    Attributes:
        state: the message.
    """

    state: graph_pb2.ModelGraphState

    @cached_property
    def specs(self) -> LayerSpecs:
        """What the structure says of the layers."""
        return LayerSpecs.of(self.state.graph)

    @cached_property
    def topology(self) -> Topology:
        """The graph of the layers."""
        return Topology.of(self.state.graph)

    @cached_property
    def layer_table(self) -> Table:
        """The measures of the layers as they were sent, in the order of ``LAYER_MEASURES``: M rows of N."""
        return Table.of(columns_of(self.state.layers, LAYER_MEASURES), len(self.state.graph.layers))

    @cached_property
    def place_table(self) -> Table:
        """The measures of the places as they were sent, in the order of ``PLACE_MEASURES``: M rows of P."""
        return Table.of(columns_of(self.state.places, PLACE_MEASURES), len(self.state.graph.places.sources))

    @cached_property
    def health_history(self) -> Table:
        """Health of the layers at earlier reports, oldest first: T rows of N."""
        return Table.of([point.health for point in self.state.history], len(self.state.graph.layers))

    @cached_property
    def layers(self) -> dict[str, Array]:
        """Every measure of the layers, ``[N]`` each, the derived ones computed anew from the raw ones.

        So a state means the same whoever made it, with the derived columns or without them.
        """
        arrays = dict(zip(LAYER_MEASURES, self.layer_table.values, strict=True))
        return arrays | health.derive(arrays, self.health_history.values, self.topology)

    @cached_property
    def places(self) -> dict[str, Array]:
        """Every measure of the places, ``[P]`` each."""
        return dict(zip(PLACE_MEASURES, self.place_table.values, strict=True))

    @cached_property
    def place_source(self) -> NDArray[np.int64]:
        """Layer whose input a seed reads, ``[P]``."""
        return indices(self.state.graph.places.sources)

    @cached_property
    def place_target(self) -> NDArray[np.int64]:
        """Layer to whose output a seed adds, ``[P]``."""
        return indices(self.state.graph.places.targets)

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
        return np.bincount(self.place_target, weights=at_places, minlength=len(self.state.graph.layers)).astype(
            np.float64
        )
