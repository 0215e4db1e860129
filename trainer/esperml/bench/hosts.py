"""States of hosts of any size, as a server meets them: every measure, a full history, two places a layer."""

from __future__ import annotations

from typing import Final

import numpy as np

from esperml.contract import MEASURES
from esperml.v1 import graph_pb2

BLUEPRINTS: Final = ("low_rank", "mlp", "conv", "gate")
HISTORY: Final = 16
RESIDUAL_EVERY: Final = 4
STEP_BETWEEN: Final = 50


def chain(layers: int, *, seed: int = 0) -> graph_pb2.ModelGraphState:
    """A chain of linear layers with residual joins, all of it measured.

    Args:
        layers: how many, at least 1.
        seed: of the measures and widths.

    Returns:
        A state that Decide accepts, past any warm-up.
    """
    generator = np.random.default_rng(seed)
    widths = generator.integers(8, 257, size=layers + 1).tolist()
    graph = graph_pb2.HostGraph(structure_version=1, blueprints=BLUEPRINTS)
    edges, places = graph.edges, graph.places
    for layer in range(layers):
        graph.layers.add(
            name=f"body.{layer}",
            type=graph_pb2.LAYER_TYPE_LINEAR,
            parameters=(widths[layer] + 1) * widths[layer + 1],
            input_shape=[widths[layer]],
            output_shape=[widths[layer + 1]],
            activated=layer + 1 < layers,
        )
        sources = [layer] if layer == 0 else [layer, layer - 1]
        places.sources.extend(sources)
        places.targets.extend([layer] * len(sources))
        places.blueprints.extend([2 ** len(BLUEPRINTS) - 1] * len(sources))
        for distance, kind in ((1, graph_pb2.EDGE_KIND_FORWARD), (RESIDUAL_EVERY, graph_pb2.EDGE_KIND_RESIDUAL)):
            if layer >= distance and layer % distance == 0:
                edges.sources.append(layer - distance)
                edges.targets.append(layer)
                edges.kinds.append(kind)
    state = graph_pb2.ModelGraphState(run_id="bench", step=HISTORY * STEP_BETWEEN + STEP_BETWEEN, graph=graph)
    for name, measure in MEASURES.items():
        if not measure.derived:
            getattr(state.layers, name).values.extend(generator.random(layers).tolist())
    for name in ("growth_gradient", "explained_error"):
        getattr(state.places, name).values.extend(generator.random(len(places.sources)).tolist())
    for moment in range(HISTORY):
        point = state.history.add(step=(moment + 1) * STEP_BETWEEN)
        point.run.train_loss = 2.0 / (moment + 1)
        point.health.values.extend(generator.random(layers).tolist())
    state.run.train_loss = 0.1
    state.run.held_out_loss = 0.2
    state.run.learning_rate = 1e-3
    return state
