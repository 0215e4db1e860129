"""Features of the layers."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array, absent
from esperml.tamiyo.feature_names import LAYER_TYPES, NODE_FEATURES
from esperml.tamiyo.sheet import Sheet, Value
from esperml.tamiyo.view import StateView

SIZE: Final = (1.0, 1e4)
COUNT: Final = (1.0, 10.0)
STEPS: Final = (1.0, 1e4)
EFFECT: Final = (1e-2, 1.0)

_SHEET: Final = Sheet(
    NODE_FEATURES,
    {
        "log_parameters": (1.0, 1e6),
        "log_in_elements": SIZE,
        "log_out_elements": SIZE,
        "log_in_width": SIZE,
        "log_out_width": SIZE,
        "in_degree": COUNT,
        "out_degree": COUNT,
        "residual_degree": COUNT,
        "live_seeds": COUNT,
        "fossils": COUNT,
        "adaptation_count": COUNT,
        "activation_mean": (1e-2, 100.0),
        "activation_variance": (1e-4, 100.0),
        "gradient_norm": (1e-6, 1.0),
        "gradient_to_weight": (1e-6, 1.0),
        "log_memory": (1.0, 1e9),
        "log_flops": (1.0, 1e9),
        "steps_since_adaptation": STEPS,
        "last_effect": EFFECT,
    },
)
_AS_MEASURED: Final = (
    "dead_fraction",
    "effective_rank",
    "vanishing_fraction",
    "exploding_fraction",
    "expressivity_bottleneck",
    "input_autocorrelation",
    "health",
    "stability",
    "readiness",
    "upstream_health",
    "downstream_health",
    "layer_position",
)
_STEEP: Final = ("throughput_trend", "health_trend")
_RANKED: Final = ("effective_rank", "dead_fraction", "gradient_norm", "expressivity_bottleneck", "health")


def node_features(view: StateView) -> NDArray[np.float32]:
    """Every feature of :data:`~esperml.tamiyo.feature_names.NODE_FEATURES`, ``[N, F]``."""
    layers, specs = view.layers, view.specs
    size = len(specs.names)
    sources, targets = view.topology.dataflow
    in_degree, out_degree = np.bincount(targets, minlength=size), np.bincount(sources, minlength=size)
    return _SHEET.table(
        size,
        raw={
            **{f"type_{name}": specs.layer_type == value for name, value in LAYER_TYPES.items()},
            "spatial_in": specs.spatial_in,
            "spatial_out": specs.spatial_out,
            "is_first": in_degree == 0,
            "is_last": out_degree == 0,
            "activated": specs.activated,
            **{name: layers[name] for name in _AS_MEASURED},
            **_latency(layers["latency_mean"], layers["latency_variance"]),
        },
        slopes={name: layers[name] for name in _STEEP},
        ratios=_ratios(view),
        ranked={
            "in_rank": specs.in_width,
            "out_rank": specs.out_width,
            **{f"{name}_rank": layers[name] for name in _RANKED},
        },
        scaled={
            **layers,
            "log_parameters": specs.parameters,
            "log_in_elements": specs.in_elements,
            "log_out_elements": specs.out_elements,
            "log_in_width": specs.in_width,
            "log_out_width": specs.out_width,
            "in_degree": in_degree,
            "out_degree": out_degree,
            "residual_degree": np.bincount(view.topology.residual[1], minlength=size),
            "live_seeds": view.count_at_targets(view.count_at_places(view.live_seeds)),
            "fossils": view.count_at_targets(view.count_at_places(view.fossils)),
            "log_memory": layers["memory_bytes"],
            "log_flops": layers["flops"],
            "last_effect": _last_effect(view),
        },
    )


def _ratios(view: StateView) -> dict[str, tuple[Value, Value]]:
    read, made = view.specs.in_width, view.specs.out_width
    gradient = view.layers["gradient_norm"]
    known = gradient[~np.isnan(gradient)]
    return {
        "out_to_in_width": (made, read),
        "in_to_widest": (read, read.max()),
        "in_to_narrowest": (read, read.min()),
        "out_to_widest": (made, made.max()),
        "out_to_host_input": (made, read[0]),
        "out_to_host_output": (made, made[-1]),
        "gradient_norm_to_host": (gradient, known.mean() if len(known) else 0.0),
        "in_to_upstream": (read, view.topology.mean_over_sources(read)),
        "out_to_downstream": (made, view.topology.mean_over_targets(made)),
    }


def _latency(mean: Array, variance: Array) -> dict[str, Array]:
    """Relative to the host and to itself, so that neither depends on how fast the machine is."""
    total, some = np.nansum(mean), mean > 0
    return {
        "latency_share": mean / total if total > 0 else absent(len(mean)),
        "latency_variation": np.where(some, np.log1p(np.sqrt(variance) / np.where(some, mean, 1.0)), np.nan),
    }


def _last_effect(view: StateView) -> Array:
    effect = absent(len(view.specs.names))
    for record in view.state.adaptations:
        if record.HasField("effect"):
            effect[view.place_target[record.place]] = record.effect
    return effect
