"""The host's graph of layers: who feeds whom, and how deep each layer lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array, absent, indices
from esperml.v1 import graph_pb2


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
    """

    size: int
    forward: NDArray[np.int64]
    residual: NDArray[np.int64]
    recurrent: NDArray[np.int64]
    span: NDArray[np.int64]

    @classmethod
    def of(cls, graph: graph_pb2.HostGraph) -> Topology:
        """The topology of a validated graph."""
        size = len(graph.layers)
        edges = np.stack([indices(graph.edges.sources), indices(graph.edges.targets)])
        kinds = indices(graph.edges.kinds)
        places = np.stack([indices(graph.places.sources), indices(graph.places.targets)])
        return cls(
            size=size,
            forward=_distinct(edges[:, kinds == graph_pb2.EDGE_KIND_FORWARD], size),
            residual=_distinct(edges[:, kinds == graph_pb2.EDGE_KIND_RESIDUAL], size),
            recurrent=_distinct(edges[:, kinds == graph_pb2.EDGE_KIND_RECURRENT], size),
            span=_distinct(places, size),
        )

    @cached_property
    def dataflow(self) -> NDArray[np.int64]:
        """Forward and residual edges together, each once; shape ``[2, E]``."""
        return _distinct(np.concatenate([self.forward, self.residual], axis=1), self.size)

    def network(self) -> nx.DiGraph[int]:
        """The dataflow as a NetworkX graph over the layers' indices."""
        network: nx.DiGraph[int] = nx.DiGraph()
        network.add_nodes_from(range(self.size))
        network.add_edges_from(self.dataflow.T.tolist())
        return network

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
            edges = np.array(list(condensed.edges), dtype=np.int64).reshape(-1, 2).T
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

    Kahn's algorithm by hand: NetworkX takes ten times as long, which counts in every decision.
    """
    successors: list[list[int]] = [[] for _ in range(size)]
    waiting_for = [0] * size
    for source, target in edges.T.tolist():
        successors[source].append(target)
        waiting_for[target] += 1
    levels = [0] * size
    ready = [node for node in range(size) if not waiting_for[node]]
    for node in ready:
        for successor in successors[node]:
            levels[successor] = max(levels[successor], levels[node] + 1)
            waiting_for[successor] -= 1
            if not waiting_for[successor]:
                ready.append(successor)
    return np.array(levels, dtype=np.float64) if len(ready) == size else None


def _distinct(edges: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    keys = np.unique(edges[0] * size + edges[1])
    sources, targets = np.divmod(keys, size)
    kept = sources != targets
    return np.stack([sources[kept], targets[kept]])


def _mean_by(values: Array, groups: NDArray[np.int64], size: int) -> Array:
    known = ~np.isnan(values)
    counts = np.bincount(groups[known], minlength=size)
    totals = np.bincount(groups[known], weights=values[known], minlength=size)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
