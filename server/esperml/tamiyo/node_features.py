"""Features of the layers."""

from __future__ import annotations

import numpy as np

from esperml.tamiyo.columns import Array, absent
from esperml.tamiyo.feature_names import LAYER_TYPES
from esperml.tamiyo.squash import Squash, log_scale, rank, ratio, steep, unit
from esperml.tamiyo.view import StateView

SIZE: Squash = log_scale(1.0, 1e4)
COUNT: Squash = log_scale(1.0, 10.0)
STEPS: Squash = log_scale(1.0, 1e4)
EFFECT: Squash = log_scale(1e-2, 1.0)

_MEASURES: dict[str, Squash] = {
    "activation_mean": log_scale(1e-2, 100.0),
    "activation_variance": log_scale(1e-4, 100.0),
    "dead_fraction": unit,
    "effective_rank": unit,
    "gradient_norm": log_scale(1e-6, 1.0),
    "gradient_to_weight": log_scale(1e-6, 1.0),
    "vanishing_fraction": unit,
    "exploding_fraction": unit,
    "expressivity_bottleneck": unit,
    "throughput_trend": steep,
    "input_autocorrelation": unit,
    "health": unit,
    "health_trend": steep,
    "stability": unit,
    "readiness": unit,
    "upstream_health": unit,
    "downstream_health": unit,
    "layer_position": unit,
    "steps_since_adaptation": STEPS,
}
_RANKED = ("effective_rank", "dead_fraction", "gradient_norm", "expressivity_bottleneck", "health")


def node_features(view: StateView) -> dict[str, Array]:
    """Every feature of :data:`~esperml.tamiyo.feature_names.NODE_FEATURES`, ``[N]`` each, NaN where not known."""
    columns = _architecture(view)
    for name, values in (_measured(view) | _relative(view)).items():
        columns[name] = values
        columns[f"{name}_known"] = (~np.isnan(values)).astype(np.float64)
    return columns


def _architecture(view: StateView) -> dict[str, Array]:
    topology, size = view.topology, view.topology.size
    sources, targets = topology.dataflow
    in_degree = np.bincount(targets, minlength=size).astype(np.float64)
    out_degree = np.bincount(sources, minlength=size).astype(np.float64)
    residual = np.bincount(topology.residual[1], minlength=size).astype(np.float64)
    types = {f"type_{name}": (view.layer_type == value).astype(np.float64) for name, value in LAYER_TYPES.items()}
    return {
        **types,
        "log_parameters": log_scale(1.0, 1e6)(view.parameters),
        "log_in_elements": SIZE(view.in_elements),
        "log_out_elements": SIZE(view.out_elements),
        "log_in_width": SIZE(view.in_width),
        "log_out_width": SIZE(view.out_width),
        "spatial_in": view.spatial_in,
        "spatial_out": view.spatial_out,
        "out_to_in_width": ratio(view.out_width, view.in_width),
        "in_to_widest": ratio(view.in_width, view.in_width.max()),
        "in_to_narrowest": ratio(view.in_width, view.in_width.min()),
        "out_to_widest": ratio(view.out_width, view.out_width.max()),
        "out_to_host_input": ratio(view.out_width, view.in_width[0]),
        "out_to_host_output": ratio(view.out_width, view.out_width[-1]),
        "in_rank": rank(view.in_width),
        "out_rank": rank(view.out_width),
        "in_degree": COUNT(in_degree),
        "out_degree": COUNT(out_degree),
        "residual_degree": COUNT(residual),
        "is_first": (in_degree == 0).astype(np.float64),
        "is_last": (out_degree == 0).astype(np.float64),
        "live_seeds": COUNT(view.count_at_targets(view.count_at_places(view.live_seeds))),
        "fossils": COUNT(view.count_at_targets(view.count_at_places(view.fossils))),
        "adaptation_count": COUNT(view.layers["adaptation_count"]),
    }


def _measured(view: StateView) -> dict[str, Array]:
    layers = view.layers
    latency, spread = layers["latency_mean"], np.sqrt(layers["latency_variance"])
    total = np.nansum(latency)
    return {
        "activated": view.activated,
        **{name: squash(layers[name]) for name, squash in _MEASURES.items()},
        "latency_share": latency / total if total > 0 else absent(len(latency)),
        "latency_variation": np.where(latency > 0, np.log1p(spread / np.where(latency > 0, latency, 1.0)), np.nan),
        "log_memory": log_scale(1.0, 1e9)(layers["memory_bytes"]),
        "log_flops": log_scale(1.0, 1e9)(layers["flops"]),
        "last_effect": EFFECT(_last_effect(view)),
    }


def _relative(view: StateView) -> dict[str, Array]:
    gradient = view.layers["gradient_norm"]
    known = gradient[~np.isnan(gradient)]
    return {
        **{f"{name}_rank": rank(view.layers[name]) for name in _RANKED},
        "gradient_norm_to_host": ratio(gradient, known.mean() if len(known) else 0.0),
        "in_to_upstream": ratio(view.in_width, view.topology.mean_over_sources(view.in_width)),
        "out_to_downstream": ratio(view.out_width, view.topology.mean_over_targets(view.out_width)),
    }


def _last_effect(view: StateView) -> Array:
    effect = absent(view.topology.size)
    for record in view.state.adaptations:
        if record.HasField("effect"):
            effect[view.place_target[record.place]] = record.effect
    return effect
