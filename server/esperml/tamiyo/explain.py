"""Which features a decision rests on: the gradient of its log-probability by each feature, times the feature.

That is a first-order answer to "what if this were zero" (Simonyan et al. 2013; Shrikumar et al. 2017): cheap, and true
near the state at hand only. Features that are absent are zero, and are never blamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esperml.tamiyo.engine import Verdict
from esperml.tamiyo.features import GRAPH_FEATURES, NODE_FEATURES, PLACE_FEATURES, GraphBatch, collate, extract
from esperml.tamiyo.policies import GcnPolicy, Policy
from esperml.tamiyo.policy import (
    PolicyNetwork,
    adapt_log_probabilities,
    blueprint_log_probabilities,
    place_log_probabilities,
)
from esperml.v1 import tamiyo_pb2


def attribute(policy: Policy, verdict: Verdict, limit: int) -> list[tamiyo_pb2.Attribution]:
    """The features that moved a decision most.

    Args:
        policy: the one that took it.
        verdict: the decision. What a place contributes is put down to its target layer.
        limit: attributions to give.

    Returns:
        Attributions by magnitude, greatest first. None for a policy that reads no features, and none where the masks
        left nothing to decide.
    """
    if not isinstance(policy, GcnPolicy):
        return []
    graph = extract(verdict.state, policy.network.config.vocabulary)
    inputs = tuple(tensor.requires_grad_() for tensor in (graph.node, graph.place, graph.graph))
    graph = replace(graph, node=inputs[0], place=inputs[1], graph=inputs[2])
    with torch.enable_grad():
        log_probability = _log_probability(policy.network, collate([graph]), verdict.choice)
        if not log_probability.requires_grad:
            return []
        gradients = torch.autograd.grad(log_probability, inputs, allow_unused=True, materialize_grads=True)
    node, place, whole = ((x * g).detach().numpy() for x, g in zip(inputs, gradients, strict=True))
    names = [layer.name for layer in verdict.state.graph.layers]
    targets = [names[target] for target in verdict.state.graph.places.targets]
    found = [
        *_named(node, names, NODE_FEATURES),
        *_named(place, targets, PLACE_FEATURES),
        *_named(whole[None, :], [""], GRAPH_FEATURES),
    ]
    return sorted(found, key=lambda attribution: -abs(attribution.contribution))[:limit]


def _log_probability(network: PolicyNetwork, batch: GraphBatch, choice: tuple[int, int] | None) -> Tensor:
    output = network(batch)
    adapt, nothing = adapt_log_probabilities(output, batch)
    if choice is None:
        return nothing[0] if batch.allowed.any() else torch.zeros(())
    place, blueprint = choice
    where = place_log_probabilities(output, batch)[place]
    return adapt[0] + where + blueprint_log_probabilities(output, batch)[place, blueprint]


def _named(
    contributions: NDArray[np.float32], layers: Sequence[str], features: Sequence[str]
) -> list[tamiyo_pb2.Attribution]:
    rows, columns = np.nonzero(contributions)
    return [
        tamiyo_pb2.Attribution(
            layer=layers[row], feature=features[column], contribution=float(contributions[row, column])
        )
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
