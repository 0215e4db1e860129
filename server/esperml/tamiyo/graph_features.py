"""Features of the host as a whole."""

from __future__ import annotations

import numpy as np

from esperml.tamiyo.columns import Array, optional
from esperml.tamiyo.health import slope
from esperml.tamiyo.node_features import COUNT, STEPS
from esperml.tamiyo.squash import Squash, log_scale, ratio, steep
from esperml.tamiyo.view import StateView

_LOSS: Squash = log_scale(1e-3, 10.0)


def graph_features(view: StateView) -> dict[str, Array]:
    """Every feature of :data:`~esperml.tamiyo.feature_names.GRAPH_FEATURES`, ``[1]`` each, NaN where not known."""
    columns = _certain(view)
    for name, value in (_course(view) | _condition(view) | _room(view)).items():
        columns[name] = value
        columns[f"{name}_known"] = (~np.isnan(value)).astype(np.float64)
    return columns


def _one(value: float) -> Array:
    return np.array([value], dtype=np.float64)


def _certain(view: StateView) -> dict[str, Array]:
    topology = view.topology
    edges = topology.dataflow
    widths = view.out_width[:-1] if len(view.out_width) > 1 else view.out_width
    actions = [record.action for record in view.state.adaptations]
    return {
        "log_layers": log_scale(1.0, 1e3)(_one(topology.size)),
        "log_places": log_scale(1.0, 1e3)(_one(len(view.place_source))),
        "log_parameters": log_scale(1.0, 1e6)(_one(view.parameters.sum())),
        "log_step": log_scale(1.0, 1e5)(_one(view.state.step)),
        "residual_share": _one(topology.residual.shape[1] / max(1, edges.shape[1])),
        "branching": COUNT(_one(np.bincount(edges[0], minlength=1).max())),
        "narrowest_to_widest": ratio(_one(widths.min()), widths.max()),
        "live_seeds": COUNT(_one(len(view.live_seeds))),
        "fossils": COUNT(_one(len(view.fossils))),
        "germinated": COUNT(_one(actions.count("germinate"))),
        "culled": COUNT(_one(actions.count("cull"))),
    }


def _course(view: StateView) -> dict[str, Array]:
    state = view.state
    moments = [*(point.run for point in state.history), state.run]

    def log_slope(field: str) -> Array:
        losses = np.array([optional(moment, field) for moment in moments])
        positive = losses > 0
        logarithms = np.where(positive, np.log(np.where(positive, losses, 1.0)), np.nan)
        return steep(slope(logarithms[:, None]))

    train, held_out = optional(state.run, "train_loss"), optional(state.run, "held_out_loss")
    return {
        "train_loss": _LOSS(_one(train)),
        "held_out_loss": _LOSS(_one(held_out)),
        "loss_gap": ratio(_one(held_out), train),
        "train_loss_slope": log_slope("train_loss"),
        "held_out_loss_slope": log_slope("held_out_loss"),
        "log_learning_rate": log_scale(1e-6, 1.0)(_one(optional(state.run, "learning_rate"))),
        "log_epoch": log_scale(1.0, 100.0)(_one(state.epoch if state.HasField("epoch") else np.nan)),
    }


def _condition(view: StateView) -> dict[str, Array]:
    return {
        "mean_health": _over(view.layers["health"], "mean"),
        "least_health": _over(view.layers["health"], "min"),
        "mean_bottleneck": _over(view.layers["expressivity_bottleneck"], "mean"),
        "best_explained_error": _over(view.places["explained_error"], "max"),
        "best_growth_gradient": log_scale(1e-8, 1.0)(_over(view.places["growth_gradient"], "max")),
    }


def _room(view: StateView) -> dict[str, Array]:
    state, limits = view.state, view.state.limits
    host = max(1.0, float(view.parameters.sum()))
    used = sum(seed.parameters for seed in [*view.live_seeds, *view.fossils])
    room = limits.max_live_seeds - len(view.live_seeds) if limits.HasField("max_live_seeds") else np.nan
    budget = limits.parameter_budget - used if limits.HasField("parameter_budget") else np.nan
    graft = limits.graft_parameter_budget if limits.HasField("graft_parameter_budget") else np.nan
    to_last = limits.last_germination_step - state.step if limits.HasField("last_germination_step") else np.nan
    steps = [record.step for record in state.adaptations]
    since = max(0, state.step - max(steps)) if steps else np.nan
    return {
        "seed_room": COUNT(np.clip(_one(room), 0.0, None)),
        "budget_left": np.clip(_one(budget / host), 0.0, 1.0),
        "graft_budget": np.clip(_one(graft / host), 0.0, 1.0),
        "steps_to_last_germination": STEPS(_one(to_last)),
        "steps_since_adaptation": STEPS(_one(since)),
    }


def _over(values: Array, what: str) -> Array:
    known = values[~np.isnan(values)]
    return _one(getattr(known, what)() if len(known) else np.nan)
