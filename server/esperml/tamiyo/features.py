"""From raw measures to tensors: feature version 1, the one way in which server and trainer see a host.

Three rules hold for every feature. A measure that may be absent comes with a flag that says whether it is known, and is
zero where it is not. Sizes and norms are squashed by logarithms, and are given relative to the rest of the host too,
since absolute scales do not carry over from one host to another. Nothing depends on how fast the machine is.

docs/features.md lists every feature with its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from esperml.tamiyo.feature_names import GRAPH_FEATURES, NODE_FEATURES, PLACE_FEATURES
from esperml.tamiyo.graph_features import graph_features
from esperml.tamiyo.graphs import EDGE_KINDS, GraphBatch, GraphTensors, collate
from esperml.tamiyo.node_features import node_features
from esperml.tamiyo.place_features import place_features
from esperml.tamiyo.view import StateView
from esperml.v1 import graph_pb2

__all__ = [
    "EDGE_KINDS",
    "FEATURE_VERSION",
    "GRAPH_FEATURES",
    "NODE_FEATURES",
    "PLACE_FEATURES",
    "GraphBatch",
    "GraphTensors",
    "allowed_blueprints",
    "collate",
    "extract",
    "tensors",
]

FEATURE_VERSION = 1
"""Counts changes of any formula or feature. A checkpoint names the one that it was trained on."""


def extract(state: graph_pb2.ModelGraphState, vocabulary: Sequence[str]) -> GraphTensors:
    """The tensors of a state.

    Only raw measures are read: what Tamiyo derives is derived here again, so that old recordings and states made by
    hand mean the same.

    Args:
        state: a state that was validated (:func:`esperml.tamiyo.validate.check_state`) or made by the analyzer.
        vocabulary: names of the B blueprints that the policy knows, in its order.

    Returns:
        Tensors of float32, int64 and bool, all finite.
    """
    return tensors(StateView(state), vocabulary)


def tensors(view: StateView, vocabulary: Sequence[str]) -> GraphTensors:
    """The tensors of a state that was unpacked already; see :func:`extract`."""
    return GraphTensors(
        node=torch.from_numpy(node_features(view)),
        edge_index=view.structure.edge_index,
        place_source=torch.from_numpy(view.place_source),
        place_target=torch.from_numpy(view.place_target),
        place=torch.from_numpy(place_features(view, vocabulary)),
        allowed=torch.from_numpy(allowed_blueprints(view.state, vocabulary)),
        graph=torch.from_numpy(graph_features(view)[0]),
    )


def allowed_blueprints(state: graph_pb2.ModelGraphState, vocabulary: Sequence[str]) -> NDArray[np.bool_]:
    """What may be germinated where: the state's mask, or what fits where it has none.

    Args:
        state: a validated state with P places.
        vocabulary: names of B blueprints.

    Returns:
        Shape ``[P, B]``. False for blueprints that the host does not have.
    """
    places = len(state.graph.places.sources)
    if not state.HasField("mask"):
        bits = state.graph.places.blueprints
    elif state.mask.may_adapt:
        bits = state.mask.blueprints
    else:
        return np.zeros((places, len(vocabulary)), dtype=np.bool_)
    masks = np.array(bits, dtype=np.uint64)
    allowed = np.zeros((places, len(vocabulary)), dtype=np.bool_)
    bit_of = {name: bit for bit, name in enumerate(state.graph.blueprints)}
    columns = [column for column, name in enumerate(vocabulary) if name in bit_of]
    shifts = np.array([bit_of[vocabulary[column]] for column in columns], dtype=np.uint64)
    allowed[:, columns] = (masks[:, None] >> shifts) & np.uint64(1)
    return allowed
