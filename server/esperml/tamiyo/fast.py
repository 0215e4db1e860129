"""The same network for one host at a time, without the costs of a general graph library.

A small host costs calls rather than arithmetic, so what only many hosts side by side need is left out here: offsets,
scatters and repeated normalisation. What the layers hear along all kinds of edges is one weighted sum over bags of
senders, and heads that read the same input are one multiplication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esperml.tamiyo.feature_names import PLACE_FEATURES
from esperml.tamiyo.graphs import GraphTensors
from esperml.tamiyo.policy import MessageLayer, PolicyNetwork
from esperml.tamiyo.structure import REMEMBERED

_LOWEST: Final = np.finfo(np.float32).min


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a network says of one host with P places and B blueprints, after masks.

    Attributes:
        adapt: probability of adapting; 0 where nothing is allowed.
        places: probability of each place, given that something is done, ``[P]``; all zero where nothing is allowed.
        blueprints: probability of each blueprint, given the place, ``[P, B]``; zero where not allowed.
        value: estimate of the state's worth in units of reward.
    """

    adapt: float
    places: NDArray[np.float64]
    blueprints: NDArray[np.float64]
    value: float


class FastPolicy:
    """A frozen network that judges one host at a time.

    The network must not be trained further: its weights are copied here, those that read the same input side by side.

    Args:
        network: the network to freeze.
    """

    def __init__(self, network: PolicyNetwork) -> None:
        self._hidden = network.config.hidden
        self._node, self._graph = _affine(network.encode_node), _affine(network.encode_graph)
        self._messages = [(layer, layer.stacked()) for layer in network.messages if isinstance(layer, MessageLayer)]
        # What a place makes of its source and target depends on those layers alone: once a layer, not once a place.
        place = _affine(network.place[0])
        source, target, own = torch.split(place.weight, [self._hidden, self._hidden, len(PLACE_FEATURES)])
        self._ends = torch.cat([source, target], dim=1)
        self._own, self._place = _Affine(own, place.bias), _affine(network.place[2])
        self._choice = _side_by_side(network.target, network.blueprint)
        self._pooled = _side_by_side(network.adapt[0], network.value[0])
        adapt, value = _affine(network.adapt[2]), _affine(network.value[2])
        weight = torch.zeros(2 * self._hidden, 2)
        weight[: self._hidden, :1], weight[self._hidden :, 1:] = adapt.weight, value.weight
        self._verdict = _Affine(weight, torch.cat([adapt.bias, value.bias]))

    def __call__(self, host: GraphTensors) -> Judgement:
        """What the network says of one host; equal to ``network`` and its log-probabilities to float tolerance."""
        with torch.inference_mode():
            h = self._judge_layers(host)
            z = self._judge_places(h, host)
            scores, allowed = self._choice(z).numpy(), host.allowed.numpy()
            usable: NDArray[np.bool_] = np.any(allowed, axis=1)
            places = _softmax(scores[:, 0], usable)
            count = int(usable.sum())
            best = scores[usable, 0].max() if count else 0.0
            facts = torch.tensor([best, math.log1p(count)])
            expected = torch.from_numpy(places.astype(np.float32)) @ z
            whole = torch.relu(self._graph(host.graph[None]))[0]
            pooled = torch.cat([h.mean(dim=0), h.amax(dim=0), whole, facts, expected])
            adapt_logit, value = self._verdict(torch.relu(self._pooled(pooled[None])))[0]
            return Judgement(
                adapt=torch.sigmoid(adapt_logit).item() if count else 0.0,
                places=places,
                blueprints=_softmax(scores[:, 1:], allowed),
                value=value.item(),
            )

    def _judge_layers(self, host: GraphTensors) -> Tensor:
        size = len(host.node)
        senders, starts, weights = heard(host.edge_index, size)
        h = torch.relu(self._node(host.node))
        for layer, stacked in self._messages:
            # Row n * kinds + k: what layer n hears along edges of kind k.
            along, *_ = torch.embedding_bag(h, senders, starts, False, 0, False, weights)
            h = layer.update(h, along.view(size, -1) @ stacked)
        return h

    def _judge_places(self, h: Tensor, host: GraphTensors) -> Tensor:
        ends = h @ self._ends
        source = ends[:, : self._hidden].index_select(0, host.place_source)
        target = ends[:, self._hidden :].index_select(0, host.place_target)
        return torch.relu(self._place(torch.relu(self._own(host.place) + source + target)))


@lru_cache(REMEMBERED)
def heard(edge_index: tuple[Tensor, ...], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The edges of ``D^-1/2 (A + I) D^-1/2`` of every kind, in one bag for each layer and kind.

    D is the degree by targets, as in ``GCNConv`` (Kipf and Welling 2017, for directed edges). Remembered by the very
    tensors, which states of one graph share.

    Args:
        edge_index: per kind, sources above targets, ``[2, E_k]``, without self-loops.
        size: number of layers N.

    Returns:
        For all bags, ``target * kinds + kind``, one after the other: the senders; where each bag starts,
        ``[N * kinds]``; and the weight of each sender.
    """
    kinds, loops = len(edge_index), np.arange(size)
    kind = np.repeat(np.arange(kinds), [edges.shape[1] + size for edges in edge_index])
    itself = np.array([loops, loops])
    sources, targets = np.concatenate([part for edges in edge_index for part in (edges.numpy(), itself)], axis=1)
    bags = targets * kinds + kind
    degrees = np.bincount(bags, minlength=size * kinds)
    scale = 1.0 / np.sqrt(degrees)
    weights = (scale[sources * kinds + kind] * scale[bags]).astype(np.float32)
    order = np.argsort(bags, kind="stable")
    starts = np.cumsum(degrees) - degrees
    return torch.from_numpy(sources[order]), torch.from_numpy(starts), torch.from_numpy(weights[order])


def _softmax(scores: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Softmax along the last axis over what is allowed; zero elsewhere, and throughout where nothing is."""
    masked = np.where(allowed, scores, _LOWEST).astype(np.float64)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True, initial=_LOWEST)) * allowed
    normalised: NDArray[np.float64] = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1.0)
    return normalised


@dataclass(frozen=True, slots=True)
class _Affine:
    """``x @ weight + bias``, without the costs of a module."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def _affine(layer: nn.Module) -> _Affine:
    return _Affine(layer.get_parameter("weight").detach().T.contiguous(), layer.get_parameter("bias").detach().clone())


def _side_by_side(*layers: nn.Module) -> _Affine:
    parts = [_affine(layer) for layer in layers]
    return _Affine(torch.cat([part.weight for part in parts], dim=1), torch.cat([part.bias for part in parts]))
