"""A state with its packed lists unpacked once, for all that checks, bounds or judges it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo import health
from esperml.tamiyo.columns import LAYER_MEASURES, PLACE_MEASURES, Array, Table, columns_of, indices
from esperml.tamiyo.structure import LayerSpecs, Structure
from esperml.tamiyo.topology import Topology
from esperml.v1 import graph_pb2, health_pb2

LIVE_STAGES: Final = frozenset(
    {
        health_pb2.SEED_STAGE_GERMINATED,
        health_pb2.SEED_STAGE_TRAINING,
        health_pb2.SEED_STAGE_BLENDING,
        health_pb2.SEED_STAGE_HOLDING,
    }
)
"""Stages of seeds that are planted and not settled. Features tell no more of them than that they live."""


@dataclass(frozen=True)
class StateView:
    """One state of N layers and P places, each part unpacked when it is first asked for.

    The graph, the measures and the history must not change afterwards; limits and mask may, they are not unpacked.

    Attributes:
        state: the message.
    """

    state: graph_pb2.ModelGraphState

    @cached_property
    def structure(self) -> Structure:
        """What follows from the graph alone."""
        return Structure.of(self.state.graph)

    @property
    def specs(self) -> LayerSpecs:
        """What the structure says of the layers."""
        return self.structure.specs

    @property
    def topology(self) -> Topology:
        """The graph of the layers."""
        return self.structure.topology

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

    @property
    def place_source(self) -> NDArray[np.int64]:
        """Layer whose input a seed reads, ``[P]``."""
        return self.structure.place_source

    @property
    def place_target(self) -> NDArray[np.int64]:
        """Layer to whose output a seed adds, ``[P]``."""
        return self.structure.place_target

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
