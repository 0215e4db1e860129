"""Hosts as tensors: one, or many side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

EDGE_KINDS: Final = ("forward", "reverse", "residual", "span")
"""Kinds of edge that the policy convolves over, each with weights of its own.

``forward`` is the dataflow without residual joins, ``residual`` the joins, ``reverse`` both against their direction
(together with recurrent edges, which run backwards by nature), ``span`` leads from the source to the target of every
place that spans two layers.
"""


@dataclass(frozen=True)
class GraphTensors:
    """One host as tensors.

    Shapes: N layers, P places, F, Q and G features, B blueprints of the vocabulary, E_k edges of kind k.

    Attributes:
        node: features of the layers, ``[N, F]``.
        edge_index: per kind of :data:`EDGE_KINDS`, sources above targets, ``[2, E_k]``; without self-loops or repeats.
        place_source: layer whose input a seed reads, ``[P]``.
        place_target: layer to whose output a seed adds, ``[P]``.
        place: features of the places, ``[P, Q]``.
        allowed: whether a blueprint may be germinated at a place, ``[P, B]``, bool.
        graph: features of the host as a whole, ``[G]``.
    """

    node: Tensor
    edge_index: tuple[Tensor, ...]
    place_source: Tensor
    place_target: Tensor
    place: Tensor
    allowed: Tensor
    graph: Tensor


@dataclass(frozen=True)
class GraphBatch:
    """Several hosts as one graph of as many parts.

    Shapes: as for :class:`GraphTensors`, with N and P the sums over g hosts.

    Attributes:
        node: ``[N, F]``.
        node_graph: host of each layer, ``[N]``.
        edge_index: per kind, ``[2, E_k]``.
        place_source: ``[P]``.
        place_target: ``[P]``.
        place_graph: host of each place, ``[P]``.
        place: ``[P, Q]``.
        allowed: ``[P, B]``, bool.
        graph: ``[g, G]``.
    """

    node: Tensor
    node_graph: Tensor
    edge_index: tuple[Tensor, ...]
    place_source: Tensor
    place_target: Tensor
    place_graph: Tensor
    place: Tensor
    allowed: Tensor
    graph: Tensor

    @property
    def size(self) -> int:
        """Number of hosts."""
        return self.graph.shape[0]

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same batch on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        edge_index = tuple(edges.to(device) for edges in moved.pop("edge_index"))
        return GraphBatch(edge_index=edge_index, **{name: tensor.to(device) for name, tensor in moved.items()})


def collate(graphs: Sequence[GraphTensors]) -> GraphBatch:
    """Lay hosts side by side.

    Args:
        graphs: at least one, all of one vocabulary.

    Returns:
        The batch, in the order given.
    """
    counts = torch.tensor([len(graph.node) for graph in graphs])
    starts = torch.cumsum(counts, 0) - counts
    places = torch.tensor([len(graph.place) for graph in graphs])
    hosts = torch.arange(len(graphs))
    return GraphBatch(
        node=torch.cat([graph.node for graph in graphs]),
        node_graph=torch.repeat_interleave(hosts, counts),
        edge_index=tuple(
            torch.cat([graph.edge_index[kind] + start for graph, start in zip(graphs, starts, strict=True)], dim=1)
            for kind in range(len(EDGE_KINDS))
        ),
        place_source=torch.cat([graph.place_source + start for graph, start in zip(graphs, starts, strict=True)]),
        place_target=torch.cat([graph.place_target + start for graph, start in zip(graphs, starts, strict=True)]),
        place_graph=torch.repeat_interleave(hosts, places),
        place=torch.cat([graph.place for graph in graphs]),
        allowed=torch.cat([graph.allowed for graph in graphs]),
        graph=torch.stack([graph.graph for graph in graphs]),
    )
