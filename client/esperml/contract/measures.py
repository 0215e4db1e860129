"""The registry of measures: each is named once, with its unit, its range and who fills it.

``EnhancedHealthSignal`` and ``LayerColumns`` have one field a measure, of the same name and number; a test holds them
to this registry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from esperml.contract.errors import InvalidFieldError


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure of a layer.

    Attributes:
        name: field in ``EnhancedHealthSignal`` and in ``LayerColumns``.
        unit: unit, or ``1`` for a plain number.
        low: least value.
        high: greatest value.
        derived: filled by Tamiyo from raw measures, never by a host.
        absent: what it means when it is absent.
    """

    name: str
    unit: str
    low: float
    high: float
    derived: bool
    absent: str

    def check(self, value: float, field: str) -> None:
        """Raise :class:`InvalidFieldError`, naming ``field``, unless ``value`` is finite and in range."""
        if not math.isfinite(value):
            raise InvalidFieldError(field, f"is {value}; leave out what was not measured")
        if not self.low <= value <= self.high:
            raise InvalidFieldError(field, f"is {value:g}, outside [{self.low:g}, {self.high:g}]")


_INFINITY = math.inf
_NOT_SAMPLED = "not sampled for this report"


def _derived(name: str, low: float, high: float, absent: str, unit: str = "1") -> Measure:
    return Measure(name, unit, low, high, derived=True, absent=absent)


def _raw(name: str, low: float, high: float, unit: str = "1", absent: str = _NOT_SAMPLED) -> Measure:
    return Measure(name, unit, low, high, derived=False, absent=absent)


_TABLE = (
    _derived("health", 0, 1, "none of its parts is known"),
    _derived("health_activity", 0, 1, "dead_fraction is absent"),
    _derived("health_gradient", 0, 1, "vanishing_fraction and exploding_fraction are absent"),
    _derived("health_expressivity", 0, 1, "expressivity_bottleneck is absent"),
    _derived("health_trend", -1, 1, "fewer than three reports"),
    _derived("stability", 0, 1, "fewer than three reports"),
    _derived("readiness", 0, 1, "health is absent"),
    _derived("upstream_health", 0, 1, "no layer feeds this one, or none has a health"),
    _derived("downstream_health", 0, 1, "this one feeds no layer, or none has a health"),
    _derived("layer_position", 0, 1, "the graph has one layer"),
    _raw("activation_mean", -_INFINITY, _INFINITY, "output unit"),
    _raw("activation_variance", 0, _INFINITY, "output unit squared"),
    _raw("dead_fraction", 0, 1, absent="not sampled, or no rectifier follows"),
    _raw("effective_rank", 0, 1),
    _raw("gradient_norm", 0, _INFINITY),
    _raw("gradient_to_weight", 0, _INFINITY),
    _raw("vanishing_fraction", 0, 1),
    _raw("exploding_fraction", 0, 1),
    _raw("expressivity_bottleneck", 0, 1),
    _raw("latency_mean", 0, _INFINITY, "s"),
    _raw("latency_variance", 0, _INFINITY, "s²"),
    _raw("throughput", 0, _INFINITY, "samples/s"),
    _derived("throughput_trend", -1, 1, "fewer than three reports with throughput"),
    _raw("memory_bytes", 0, _INFINITY, "B"),
    _raw("parameters", 0, _INFINITY),
    _raw("flops", 0, _INFINITY, "FLOP/sample", absent="the cost of this kind of layer is not known"),
    _derived("adaptation_count", 0, _INFINITY, "the run has not reported"),
    _derived("steps_since_adaptation", 0, _INFINITY, "the layer was never adapted", unit="steps"),
    _raw("input_autocorrelation", -1, 1),
)

MEASURES: Final[Mapping[str, Measure]] = {measure.name: measure for measure in _TABLE}
"""Every measure of a layer by name, in the order of the contract."""
