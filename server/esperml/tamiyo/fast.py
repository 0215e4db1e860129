"""The same network for one host at a time, without the costs of a general graph library.

``GCNConv`` normalises its edges anew in every layer, and sends the messages of each kind of edge by themselves. For
one host it is several times faster to normalise once, and to gather, weigh and add the messages of all kinds together.
Dense adjacency matrices, the other way to do it, are no faster for small hosts and far slower for large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esperml.tamiyo.graphs import GraphBatch
from esperml.tamiyo.policy import MessageLayer, PolicyNetwork, PolicyOutput


class FastPolicy:
    """A frozen network that judges one host at a time.

    The network must not be trained further: part of its weights are copied here.

    Args:
        network: the network to freeze.
    """

    def __init__(self, network: PolicyNetwork) -> None:
        self._network = network.eval()
        self._layers = [layer for layer in network.messages if isinstance(layer, MessageLayer)]
        self._weights = [layer.side_by_side() for layer in self._layers]

    def __call__(self, host: GraphBatch) -> PolicyOutput:
        """What the network says of one host; equal to ``network(host)`` to float tolerance.

        Args:
            host: a batch of one.
        """
        with torch.inference_mode():
            size, kinds = host.node.shape[0], len(host.edge_index)
            senders, targets, weights = normalised_edges(host.edge_index, size)
            h = torch.relu(self._network.encode_node(host.node))
            for layer, side_by_side in zip(self._layers, self._weights, strict=True):
                # Row n * kinds + k: what layer n says along edges of kind k.
                said = (h @ side_by_side).view(size * kinds, -1)
                messages = torch.zeros_like(h).index_add_(0, targets, said.index_select(0, senders).mul_(weights))
                h = layer.update(h, messages)
            return self._network.read_out(h, host)


def normalised_edges(edge_index: tuple[Tensor, ...], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The edges of ``D^-1/2 (A + I) D^-1/2`` of every kind, in one list.

    D is the degree by targets, as in ``GCNConv`` (Kipf and Welling 2017, for directed edges).

    Args:
        edge_index: per kind, sources above targets, ``[2, E_k]``, without self-loops or repeats.
        size: number of layers N.

    Returns:
        For each edge, self-loops included: its sender ``source * kinds + kind``, its target, and its weight as a
        column, ``[E, 1]``.
    """
    kinds = len(edge_index)
    loops = torch.arange(size)
    kind = torch.repeat_interleave(torch.arange(kinds), torch.tensor([edges.shape[1] + size for edges in edge_index]))
    sources = torch.cat([torch.cat([edges[0], loops]) for edges in edge_index])
    targets = torch.cat([torch.cat([edges[1], loops]) for edges in edge_index])
    scale = torch.bincount(targets * kinds + kind, minlength=size * kinds).to(torch.float32).rsqrt_()
    senders = sources * kinds + kind
    weights = scale[senders] * scale[targets * kinds + kind]
    return senders, targets, weights.unsqueeze(1)
