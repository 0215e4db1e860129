"""The host's graph of layers: who feeds whom, and how deep each layer lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array, absent, indices
from esperml.v1 import graph_pb2

_SPAN: Final = max(graph_pb2.EdgeKind.values()) + 1
_DATAFLOW: Final = _SPAN + 1
"""Groups of edges beside the kinds of the contract."""


@dataclass(frozen=True)
class Topology:
    """Edges of one host, by kind.

    Self-loops and repeated edges are left out: they say nothing that a graph of layers needs, and both would distort
    the normalisation of graph convolutions.

    Attributes:
        size: number of layers N.
        forward: true dataflow without residual joins, shape ``[2, E]``, sources above targets.
        residual: edges past at least one layer, shape ``[2, E]``.
        recurrent: edges back within one forward pass, shape ``[2, E]``.
        span: from the source to the target of every place that spans two layers, shape ``[2, E]``.
        dataflow: forward and residual edges together, each once; shape ``[2, E]``.
    """

    size: int
    forward: NDArray[np.int64]
    residual: NDArray[np.int64]
    recurrent: NDArray[np.int64]
    span: NDArray[np.int64]
    dataflow: NDArray[np.int64]

    @classmethod
    def of(cls, graph: graph_pb2.HostGraph) -> Topology:
        """The topology of a validated graph."""
        size = len(graph.layers)
        kinds, edges = indices(graph.edges.kinds), _keys(graph.edges, size)
        flows = edges[(kinds == graph_pb2.EDGE_KIND_FORWARD) | (kinds == graph_pb2.EDGE_KIND_RESIDUAL)]
        every = size * size
        keys = [edges + kinds * every, _keys(graph.places, size) + _SPAN * every, flows + _DATAFLOW * every]
        # Sorted, the edges of each group lie together, and repeated ones next to each other.
        every_edge = np.sort(np.concatenate(keys))
        groups, pairs = np.divmod(every_edge, every)
        ends = np.array(np.divmod(pairs, size))
        kept = ends[0] != ends[1]
        kept[1:] &= every_edge[1:] != every_edge[:-1]
        groups, both = groups[kept], ends[:, kept]

        def of_group(group: int) -> NDArray[np.int64]:
            first, end = np.searchsorted(groups, (group, group + 1))
            return both[:, first:end]

        return cls(
            size=size,
            forward=of_group(graph_pb2.EDGE_KIND_FORWARD),
            residual=of_group(graph_pb2.EDGE_KIND_RESIDUAL),
            recurrent=of_group(graph_pb2.EDGE_KIND_RECURRENT),
            span=of_group(_SPAN),
            dataflow=of_group(_DATAFLOW),
        )

    def network(self) -> nx.DiGraph[int]:
        """The dataflow as a NetworkX graph over the layers' indices."""
        network: nx.DiGraph[int] = nx.DiGraph()
        network.add_nodes_from(range(self.size))
        network.add_edges_from(self.dataflow.T.tolist())
        return network

    @cached_property
    def depth(self) -> Array:
        """Relative depth of each layer, 0 (first) to 1 (last), shape ``[N]``; NaN where the graph has no depth.

        Depth is the longest way from a layer that nothing feeds. A layer that runs more than once in a forward pass
        can close a cycle; layers on one cycle share their depth.
        """
        depth = _levels(self.dataflow, self.size)
        if depth is None:
            network = self.network()
            components = list(nx.strongly_connected_components(network))
            condensed = nx.condensation(network, components)
            component = np.zeros(self.size, dtype=np.int64)
            for number, layers in enumerate(components):
                component[list(layers)] = number
            edges = np.array(sorted(condensed.edges), dtype=np.int64).reshape(-1, 2).T
            levels = _levels(edges, condensed.number_of_nodes())
            assert levels is not None  # noqa: S101 - a condensation has no cycles
            depth = levels[component]
        deepest = depth.max()
        return depth / deepest if deepest > 0 else absent(self.size)

    def mean_over_sources(self, values: Array) -> Array:
        """Mean of ``values`` over the layers that feed each layer, NaN ones left out; shape ``[N]``."""
        sources, targets = self.dataflow
        return _mean_by(values[sources], targets, self.size)

    def mean_over_targets(self, values: Array) -> Array:
        """Mean of ``values`` over the layers that each layer feeds, NaN ones left out; shape ``[N]``."""
        sources, targets = self.dataflow
        return _mean_by(values[targets], sources, self.size)


def _levels(edges: NDArray[np.int64], size: int) -> Array | None:
    """Longest way to each node from one without predecessors, ``[size]``; ``None`` where there is a cycle.

    Where every edge leads to a higher number, as in a host that was recorded in the order in which it runs, one look at
    each edge is enough. Otherwise this is Kahn's algorithm by hand: NetworkX takes ten times as long, which counts in
    every decision.

    Args:
        edges: sorted by their sources, ``[2, E]``.
        size: number of nodes.
    """
    levels = [0] * size
    if (edges[0] < edges[1]).all():
        for source, target in edges.T.tolist():
            levels[target] = max(levels[target], levels[source] + 1)
        return np.array(levels, dtype=np.float64)
    successors: list[list[int]] = [[] for _ in range(size)]
    waiting_for = [0] * size
    for source, target in edges.T.tolist():
        successors[source].append(target)
        waiting_for[target] += 1
    ready = [node for node in range(size) if not waiting_for[node]]
    for node in ready:
        for successor in successors[node]:
            levels[successor] = max(levels[successor], levels[node] + 1)
            waiting_for[successor] -= 1
            if not waiting_for[successor]:
                ready.append(successor)
    return np.array(levels, dtype=np.float64) if len(ready) == size else None


def _keys(table: graph_pb2.EdgeTable | graph_pb2.PlaceTable, size: int) -> NDArray[np.int64]:
    """One number for each pair of source and target."""
    return indices(table.sources) * size + indices(table.targets)


def _mean_by(values: Array, groups: NDArray[np.int64], size: int) -> Array:
    known = ~np.isnan(values)
    counts = np.bincount(groups[known], minlength=size)
    totals = np.bincount(groups[known], weights=values[known], minlength=size)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
