"""Features of the places where a seed may grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array, absent, indices
from esperml.tamiyo.feature_names import PLACE_FEATURES
from esperml.tamiyo.node_features import COUNT, EFFECT, SIZE, STEPS
from esperml.tamiyo.sheet import Sheet
from esperml.tamiyo.squash import ratio
from esperml.tamiyo.view import StateView
from esperml.v1 import graph_pb2

_SHEET: Final = Sheet(
    PLACE_FEATURES,
    {
        "log_source_width": SIZE,
        "log_target_width": SIZE,
        "log_dense_size": (1.0, 1e8),
        "fossilised": COUNT,
        "germinated": COUNT,
        "culled": COUNT,
        "growth_gradient": (1e-8, 1.0),
        "affordable_rank": (1.0, 100.0),
        "last_effect": EFFECT,
        "steps_since_adaptation": STEPS,
    },
)


def place_features(view: StateView, vocabulary: Sequence[str]) -> NDArray[np.float32]:
    """Every feature of :data:`~esperml.tamiyo.feature_names.PLACE_FEATURES`, ``[P, Q]``.

    Args:
        view: a state with P places.
        vocabulary: names of the blueprints that the policy knows. What else the host can grow must not change what
            the policy sees: it is the same host.
    """
    source, target, specs = view.place_source, view.place_target, view.specs
    growth, explained = view.places["growth_gradient"], view.places["explained_error"]
    read, added = specs.in_width[source], specs.out_width[target]
    narrowest_on_the_way = np.minimum(specs.out_width[source], specs.in_width[target])
    read_elements, added_elements = specs.in_elements[source], specs.out_elements[target]
    limits, records = view.state.limits, view.state.adaptations
    spans_two = source != target
    budget = limits.graft_parameter_budget if limits.HasField("graft_parameter_budget") else np.nan
    effect, since = _last_adaptation(view)
    return _SHEET.table(
        len(source),
        raw={
            "span_two": spans_two,
            "widening": np.where(spans_two, ratio(np.minimum(read, added), narrowest_on_the_way), 0.0),
            "spatial_source": specs.spatial_in[source],
            "spatial_target": specs.spatial_out[target],
            "fitting": _fitting(view.state.graph, vocabulary),
            "occupied": view.count_at_places(view.live_seeds) > 0,
            "explained_error": explained,
        },
        ratios={
            "target_to_source_width": (added, read),
            "growth_gradient_to_best": (growth, _greatest(growth)),
            "explained_error_to_best": (explained, _greatest(explained)),
        },
        ranked={"growth_gradient_rank": growth, "explained_error_rank": explained},
        scaled={
            "log_source_width": read,
            "log_target_width": added,
            "log_dense_size": read_elements * added_elements,
            "fossilised": view.count_at_places(view.fossils),
            "germinated": _count(records, "germinate", len(source)),
            "culled": _count(records, "cull", len(source)),
            "growth_gradient": growth,
            "affordable_rank": budget / (read_elements + added_elements),
            "last_effect": effect,
            "steps_since_adaptation": since,
        },
    )


def _fitting(graph: graph_pb2.HostGraph, vocabulary: Sequence[str]) -> Array:
    known = sum(1 << bit for bit, name in enumerate(graph.blueprints) if name in vocabulary)
    bits = np.bitwise_count(np.array(graph.places.blueprints, dtype=np.uint64) & np.uint64(known))
    share: Array = bits / max(1, known.bit_count())
    return share


def _count(records: Sequence[graph_pb2.AdaptationRecord], action: str, places: int) -> NDArray[np.int64]:
    return np.bincount(indices([record.place for record in records if record.action == action]), minlength=places)


def _last_adaptation(view: StateView) -> tuple[Array, Array]:
    """What the last adaptation at each place did, and how many steps ago it was; ``[P]`` each."""
    effect, since = absent(len(view.place_source)), absent(len(view.place_source))
    for record in view.state.adaptations:
        since[record.place] = max(0, view.state.step - record.step)
        if record.HasField("effect"):
            effect[record.place] = record.effect
    return effect, since


def _greatest(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else 0.0
