"""Features of the host as a whole."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import Array, optional
from esperml.tamiyo.feature_names import GRAPH_FEATURES
from esperml.tamiyo.health import slope
from esperml.tamiyo.node_features import COUNT, STEPS
from esperml.tamiyo.sheet import Sheet, Value
from esperml.tamiyo.view import StateView

_LOSS: Final = (1e-3, 10.0)

_SHEET: Final = Sheet(
    GRAPH_FEATURES,
    {
        "log_layers": (1.0, 1e3),
        "log_places": (1.0, 1e3),
        "log_parameters": (1.0, 1e6),
        "log_step": (1.0, 1e5),
        "branching": COUNT,
        "live_seeds": COUNT,
        "fossils": COUNT,
        "germinated": COUNT,
        "culled": COUNT,
        "train_loss": _LOSS,
        "held_out_loss": _LOSS,
        "log_learning_rate": (1e-6, 1.0),
        "log_epoch": (1.0, 100.0),
        "best_growth_gradient": (1e-8, 1.0),
        "seed_room": COUNT,
        "steps_to_last_germination": STEPS,
        "steps_since_adaptation": STEPS,
    },
)


def graph_features(view: StateView) -> NDArray[np.float32]:
    """Every feature of :data:`~esperml.tamiyo.feature_names.GRAPH_FEATURES`, ``[1, G]``."""
    state, topology = view.state, view.topology
    widths = view.specs.out_width[:-1] if len(view.specs.out_width) > 1 else view.specs.out_width
    train, held_out = optional(state.run, "train_loss"), optional(state.run, "held_out_loss")
    train_slope, held_out_slope = _loss_slopes(view)
    actions = [record.action for record in state.adaptations]
    return _SHEET.table(
        1,
        raw={
            "residual_share": topology.residual.shape[1] / max(1, topology.dataflow.shape[1]),
            "mean_health": _known(view.layers["health"]).mean(),
            "least_health": _known(view.layers["health"]).min(),
            "mean_bottleneck": _known(view.layers["expressivity_bottleneck"]).mean(),
            "best_explained_error": _known(view.places["explained_error"]).max(),
            **_budgets(view),
        },
        slopes={"train_loss_slope": train_slope, "held_out_loss_slope": held_out_slope},
        ratios={"narrowest_to_widest": (widths.min(), widths.max()), "loss_gap": (held_out, train)},
        scaled={
            "log_layers": topology.size,
            "log_places": len(view.place_source),
            "log_parameters": view.specs.parameters.sum(),
            "log_step": state.step,
            "branching": np.bincount(topology.dataflow[0], minlength=1).max(),
            "live_seeds": len(view.live_seeds),
            "fossils": len(view.fossils),
            "germinated": actions.count("germinate"),
            "culled": actions.count("cull"),
            "train_loss": train,
            "held_out_loss": held_out,
            "log_learning_rate": optional(state.run, "learning_rate"),
            "log_epoch": state.epoch if state.HasField("epoch") else np.nan,
            "best_growth_gradient": _known(view.places["growth_gradient"]).max(),
            **_room(view),
        },
    )


def _loss_slopes(view: StateView) -> Array:
    """Slopes of the logarithms of training and held-out loss per report, ``[2]``."""
    moments = [*(point.run for point in view.state.history), view.state.run]
    losses = np.array([(optional(run, "train_loss"), optional(run, "held_out_loss")) for run in moments])
    positive = losses > 0
    return slope(np.where(positive, np.log(np.where(positive, losses, 1.0)), np.nan))


def _budgets(view: StateView) -> dict[str, Value]:
    """What seeds may still have, and what one may, relative to the host's parameters, 0 to 1."""
    limits = view.state.limits
    host = max(1.0, float(view.specs.parameters.sum()))
    used = sum(seed.parameters for seed in [*view.live_seeds, *view.fossils])
    left = limits.parameter_budget - used if limits.HasField("parameter_budget") else np.nan
    graft = limits.graft_parameter_budget if limits.HasField("graft_parameter_budget") else np.nan
    budget_left, graft_budget = np.clip([left / host, graft / host], 0.0, 1.0).tolist()
    return {"budget_left": budget_left, "graft_budget": graft_budget}


def _room(view: StateView) -> dict[str, Value]:
    state, limits = view.state, view.state.limits
    steps = [record.step for record in state.adaptations]
    has_most, has_last = limits.HasField("max_live_seeds"), limits.HasField("last_germination_step")
    return {
        "seed_room": max(0, limits.max_live_seeds - len(view.live_seeds)) if has_most else np.nan,
        "steps_to_last_germination": limits.last_germination_step - state.step if has_last else np.nan,
        "steps_since_adaptation": max(0, state.step - max(steps)) if steps else np.nan,
    }


def _known(values: Array) -> Array:
    """The known values, or a NaN where there is none."""
    known = values[~np.isnan(values)]
    return known if len(known) else np.array([np.nan])
