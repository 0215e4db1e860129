"""How alpha rises from 0 to 1 while a seed blends in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from esperml.kasmina.errors import RefusedError
from esperml.v1 import decision_pb2

Schedule: TypeAlias = "decision_pb2.AlphaSchedule.ValueType"

LINEAR: Final = decision_pb2.ALPHA_SCHEDULE_UNSPECIFIED
"""What a command that says nothing means."""

_STEEPNESS: Final = 12.0


def _linear(progress: float) -> float:
    return progress


def _cosine(progress: float) -> float:
    return (1 - math.cos(math.pi * progress)) / 2


def _sigmoid(progress: float) -> float:
    return (math.tanh(_STEEPNESS * (progress - 0.5) / 2) / math.tanh(_STEEPNESS / 4) + 1) / 2


_SHAPES: Final[Mapping[Schedule, Callable[[float], float]]] = {
    LINEAR: _linear,
    decision_pb2.ALPHA_SCHEDULE_LINEAR: _linear,
    decision_pb2.ALPHA_SCHEDULE_COSINE: _cosine,
    decision_pb2.ALPHA_SCHEDULE_SIGMOID: _sigmoid,
}


def alpha_at(schedule: Schedule, step: int, steps: int) -> float:
    """Alpha in the ``step``-th optimizer step of blending, from 1, of ``steps``: above 0, and 1 from the last on.

    With p = step / steps: p itself; ``(1 - cos πp) / 2``; or the logistic function of 12 (p - 1/2), stretched to run
    from 0 to 1.
    """
    if step >= steps:
        return 1.0
    return _SHAPES[schedule](step / steps)


def check_schedule(schedule: int) -> None:
    """Raise :class:`~esperml.kasmina.errors.RefusedError` unless ``schedule`` is one that is known here."""
    if schedule not in _SHAPES:
        raise RefusedError(f"action.germinate.schedule {schedule} is not known here; leave it out for a linear one")
