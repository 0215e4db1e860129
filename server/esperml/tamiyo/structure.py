"""What follows from a host's graph alone, worked out once for each graph: a host is decided on many times before its
structure changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esperml.tamiyo.columns import Array, indices
from esperml.tamiyo.graphs import EDGE_KINDS
from esperml.tamiyo.topology import Topology
from esperml.v1 import graph_pb2

REMEMBERED: Final = 32
"""Graphs that are remembered, those that were asked for last."""

CHANNELS_FIRST: Final = frozenset(
    {graph_pb2.LAYER_TYPE_CONV1D, graph_pb2.LAYER_TYPE_CONV2D, graph_pb2.LAYER_TYPE_CONV3D}
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


class Structure:
    """One graph, each part of what follows from it worked out when it is first asked for.

    It is shared by all states of that graph: nobody may change its arrays.

    Args:
        graph: need not be valid to read ``specs``, and must be for all else.

    Attributes:
        is_valid: whether the graph was checked and found right, see :func:`esperml.tamiyo.validate.check_graph`.
    """

    def __init__(self, graph: graph_pb2.HostGraph) -> None:
        self._graph = graph
        self.is_valid = False

    @staticmethod
    def of(graph: graph_pb2.HostGraph) -> Structure:
        """The structure of a graph; the same one for graphs that are the same to the byte."""
        return _of_bytes(graph.SerializeToString(deterministic=True))

    @cached_property
    def specs(self) -> LayerSpecs:
        """What it says of the layers."""
        return LayerSpecs.of(self._graph)

    @cached_property
    def topology(self) -> Topology:
        """The graph of the layers."""
        return Topology.of(self._graph)

    @cached_property
    def place_source(self) -> NDArray[np.int64]:
        """Layer whose input a seed reads, ``[P]``."""
        return indices(self._graph.places.sources)

    @cached_property
    def place_target(self) -> NDArray[np.int64]:
        """Layer to whose output a seed adds, ``[P]``."""
        return indices(self._graph.places.targets)

    @cached_property
    def edge_index(self) -> tuple[Tensor, ...]:
        """Per kind of :data:`~esperml.tamiyo.graphs.EDGE_KINDS`, sources above targets, ``[2, E_k]``."""
        topology = self.topology
        edges = {
            "forward": topology.forward,
            "reverse": np.concatenate([topology.dataflow[::-1], topology.recurrent], axis=1),
            "residual": topology.residual,
            "span": topology.span,
        }
        return tuple(torch.from_numpy(np.ascontiguousarray(edges[kind])) for kind in EDGE_KINDS)


@lru_cache(REMEMBERED)
def _of_bytes(graph: bytes) -> Structure:
    return Structure(graph_pb2.HostGraph.FromString(graph))
