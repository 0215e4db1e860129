"""Health and what follows from it: the formulas of feature version 1.

They are fixed: a policy is trained on them, and a recording must mean the same tomorrow. Another formula is another
feature version. docs/health.md tells the same to people who do not read code.

Everywhere absent in is absent out: NaN stands for what was not measured, and no formula turns it into a number.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from esperml.tamiyo.columns import Array
from esperml.tamiyo.topology import Topology

HISTORY_LENGTH: Final = 16
"""Earlier reports that a trend looks back on."""

LEAST_REPORTS: Final = 3
"""Reports below which a trend says nothing: two points always lie on a line."""

RECOVERY_STEPS: Final = 200.0
"""Steps after an adaptation at which a layer counts as half rested."""


def activity(dead_fraction: Array) -> Array:
    """``1 - dead_fraction``: share of units that respond.

    A rectified unit that no sample of the batch excites gets no gradient and does not come back by itself, so each
    is capacity lost.
    """
    return 1.0 - dead_fraction


def gradient_flow(vanishing_fraction: Array, exploding_fraction: Array) -> Array:
    """``max(0, 1 - vanishing - exploding)``: share of gradient entries of a usable size.

    The two are disjoint, so their sum is the share of entries that do not train. Where one was not measured the other
    stands alone; where neither was, the result is absent.
    """
    no_vanishing, no_exploding = np.isnan(vanishing_fraction), np.isnan(exploding_fraction)
    lost = np.where(no_vanishing, 0.0, vanishing_fraction) + np.where(no_exploding, 0.0, exploding_fraction)
    return np.where(no_vanishing & no_exploding, np.nan, np.maximum(1.0 - lost, 0.0))


def expressivity(expressivity_bottleneck: Array) -> Array:
    """``1 - expressivity_bottleneck``: share of the step that the loss asks for which the layer can take.

    What is left is the part that no change of the present parameters gives: the very case for new ones.
    """
    return 1.0 - expressivity_bottleneck


def health(*parts: Array) -> Array:
    """Geometric mean of the parts that are known; absent where none is.

    The geometric mean, because the parts are limits in series: a layer with dead units only, or without gradient, is
    sick however well its other parts are, while an arithmetic mean would call it fair. It rises with every part, and a
    part that was not measured neither helps nor harms.

    Args:
        parts: arrays of shape ``[N]``, 0 to 1, NaN where absent.
    """
    stacked = np.stack(parts)
    known = ~np.isnan(stacked)
    count = known.sum(axis=0)
    product = np.where(known, stacked, 1.0).prod(axis=0)
    return np.where(count > 0, product ** (1.0 / np.maximum(count, 1)), np.nan)


def slope(values: Array) -> Array:
    """Least-squares slope along the first axis, per report, NaN entries left out.

    Args:
        values: shape ``[T, N]``, oldest first.

    Returns:
        Shape ``[N]``; NaN where fewer than :data:`LEAST_REPORTS` values are known.
    """
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    times = np.arange(len(values), dtype=np.float64)[:, None]
    safe = np.maximum(count, 1)
    mean_time = np.where(known, times, 0.0).sum(axis=0) / safe
    mean_value = np.where(known, values, 0.0).sum(axis=0) / safe
    centred = np.where(known, times - mean_time, 0.0)
    covariance = (centred * np.where(known, values - mean_value, 0.0)).sum(axis=0)
    variance = (centred**2).sum(axis=0)
    enough = count >= LEAST_REPORTS
    return np.where(enough, covariance / np.where(variance > 0, variance, 1.0), np.nan)


def trend(history: Array) -> Array:
    """Slope of health per report, -1 to 1: where the layer is heading if nothing is done.

    A least-squares line rather than a difference of two reports, because single reports are noisy.

    Args:
        history: health at the last reports, oldest first, the present one last; shape ``[T, N]``.
    """
    return np.clip(slope(history), -1.0, 1.0)


def stability(history: Array) -> Array:
    """``1 - 2 * standard deviation`` of health over the last reports, 0 (erratic) to 1 (constant).

    The factor two maps the greatest deviation that values in 0 to 1 can have, one half, to zero. The deviation is
    taken about the mean, not about the trend: a layer that changes fast, whichever way, is not one to judge yet.

    Args:
        history: as for :func:`trend`.
    """
    known = ~np.isnan(history)
    count = known.sum(axis=0)
    safe = np.maximum(count, 1)
    mean = np.where(known, history, 0.0).sum(axis=0) / safe
    variance = np.where(known, (history - mean) ** 2, 0.0).sum(axis=0) / safe
    return np.where(count >= LEAST_REPORTS, np.clip(1.0 - 2.0 * np.sqrt(variance), 0.0, 1.0), np.nan)


def readiness(layer_health: Array, steadiness: Array, steps_since_adaptation: Array) -> Array:
    """``(1 - health) * stability * s / (s + 200)``: how ready the layer is to be adapted, 0 to 1.

    Three conditions in series: it needs help, its state is settled enough to be judged, and the last adaptation here
    (``s`` steps ago) has had time to show. A layer that was never adapted is fully rested. Stability is left out while
    it is absent: it is a reason to wait, not the need itself. Absent where health is.
    """
    settled = np.where(np.isnan(steadiness), 1.0, steadiness)
    rested = np.where(
        np.isnan(steps_since_adaptation), 1.0, steps_since_adaptation / (steps_since_adaptation + RECOVERY_STEPS)
    )
    return (1.0 - layer_health) * settled * rested


def throughput_trend(history: Array) -> Array:
    """Slope of throughput per report, divided by its mean, -1 to 1.

    Relative, because samples per second differ by orders of magnitude between layers and machines.

    Args:
        history: throughput at the last reports, oldest first; shape ``[T, N]``, NaN where absent.
    """
    known = ~np.isnan(history)
    mean = np.where(known, history, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.clip(slope(history) / np.where(mean > 0, mean, 1.0), -1.0, 1.0)


def present_health(arrays: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Health and its parts from raw measures, ``[N]`` each."""
    parts = {
        "health_activity": activity(arrays["dead_fraction"]),
        "health_gradient": gradient_flow(arrays["vanishing_fraction"], arrays["exploding_fraction"]),
        "health_expressivity": expressivity(arrays["expressivity_bottleneck"]),
    }
    return health(*parts.values()), parts


def derive(arrays: dict[str, Array], health_history: Array, topology: Topology) -> dict[str, Array]:
    """All measures that follow from raw ones and the health of earlier reports.

    Args:
        arrays: measures of the layers, each of shape ``[N]``; only raw ones and ``steps_since_adaptation`` are read.
        health_history: health at earlier reports, oldest first, shape ``[T, N]``; T may be 0.
        topology: of the same N layers.

    Returns:
        ``health`` and its parts, ``health_trend``, ``stability``, ``readiness``, ``upstream_health``,
        ``downstream_health`` and ``layer_position``, each of shape ``[N]``.
    """
    present, parts = present_health(arrays)
    history = np.concatenate([health_history[-HISTORY_LENGTH:], present[None, :]])
    steady = stability(history)
    return {
        "health": present,
        **parts,
        "health_trend": trend(history),
        "stability": steady,
        "readiness": readiness(present, steady, arrays["steps_since_adaptation"]),
        "upstream_health": topology.mean_over_sources(present),
        "downstream_health": topology.mean_over_targets(present),
        "layer_position": topology.depth,
    }
