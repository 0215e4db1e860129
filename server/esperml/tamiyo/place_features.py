"""Features of the places where a seed may grow."""

from __future__ import annotations

import numpy as np

from esperml.tamiyo.columns import Array, absent, indices
from esperml.tamiyo.node_features import COUNT, EFFECT, SIZE, STEPS
from esperml.tamiyo.squash import log_scale, rank, ratio
from esperml.tamiyo.view import StateView


def place_features(view: StateView) -> dict[str, Array]:
    """Every feature of :data:`~esperml.tamiyo.feature_names.PLACE_FEATURES`, ``[P]`` each, NaN where not known."""
    columns = _architecture(view) | _past(view)
    for name, values in (_measured(view) | _last_adaptation(view)).items():
        columns[name] = values
        columns[f"{name}_known"] = (~np.isnan(values)).astype(np.float64)
    return columns


def _architecture(view: StateView) -> dict[str, Array]:
    source, target = view.place_source, view.place_target
    span_two = source != target
    read, added = view.in_width[source], view.out_width[target]
    on_the_way = np.minimum(view.out_width[source], view.in_width[target])
    bits = [mask.bit_count() for mask in view.state.graph.places.blueprints]
    return {
        "span_two": span_two.astype(np.float64),
        "log_source_width": SIZE(read),
        "log_target_width": SIZE(added),
        "target_to_source_width": ratio(added, read),
        "widening": np.where(span_two, ratio(np.minimum(read, added), on_the_way), 0.0),
        "log_dense_size": log_scale(1.0, 1e8)(view.in_elements[source] * view.out_elements[target]),
        "spatial_source": view.spatial_in[source],
        "spatial_target": view.spatial_out[target],
        "fitting": np.array(bits, dtype=np.float64) / max(1, len(view.state.graph.blueprints)),
    }


def _past(view: StateView) -> dict[str, Array]:
    places = len(view.place_source)
    records = view.state.adaptations

    def count(action: str) -> Array:
        at = indices([record.place for record in records if record.action == action])
        return np.bincount(at, minlength=places).astype(np.float64)

    return {
        "occupied": (view.count_at_places(view.live_seeds) > 0).astype(np.float64),
        "fossilised": COUNT(view.count_at_places(view.fossils)),
        "germinated": COUNT(count("germinate")),
        "culled": COUNT(count("cull")),
    }


def _measured(view: StateView) -> dict[str, Array]:
    growth, explained = view.places["growth_gradient"], view.places["explained_error"]
    source, target = view.place_source, view.place_target
    limits = view.state.limits
    affordable = absent(len(source))
    if limits.HasField("graft_parameter_budget"):
        affordable = limits.graft_parameter_budget / (view.in_elements[source] + view.out_elements[target])
    return {
        "growth_gradient": log_scale(1e-8, 1.0)(growth),
        "growth_gradient_rank": rank(growth),
        "growth_gradient_to_best": ratio(growth, _greatest(growth)),
        "explained_error": explained,
        "explained_error_rank": rank(explained),
        "explained_error_to_best": ratio(explained, _greatest(explained)),
        "affordable_rank": log_scale(1.0, 100.0)(affordable),
    }


def _last_adaptation(view: StateView) -> dict[str, Array]:
    effect, since = absent(len(view.place_source)), absent(len(view.place_source))
    for record in view.state.adaptations:
        since[record.place] = max(0, view.state.step - record.step)
        if record.HasField("effect"):
            effect[record.place] = record.effect
    return {"last_effect": EFFECT(effect), "steps_since_adaptation": STEPS(since)}


def _greatest(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else 0.0
