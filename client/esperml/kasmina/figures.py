"""What a session tells of seeds, of the optimizer and of itself."""

from __future__ import annotations

import operator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from torch.optim import Optimizer

from esperml.kasmina.measures import representable
from esperml.kasmina.seeds import Seed
from esperml.v1 import health_pb2

_MOST: Final = 2**32 - 1


def seed_signal(seed: Seed, gradient_norm: float | None) -> health_pb2.SeedSignal:
    """How a seed fares. ``gradient_norm`` is ``None`` where it was not measured."""
    seed.count_unusable()
    return health_pb2.SeedSignal(
        seed_id=seed.seed_id,
        place=seed.place,
        stage=seed.stage,
        blueprint=seed.blueprint,
        alpha=seed.alpha,
        steps_in_stage=seed.steps_in_stage,
        parameters=seed.parameter_count,
        ablation_contribution=seed.ablation_contribution,
        gradient_norm=gradient_norm,
        errors=seed.errors,
    )


def learning_rate(optimizer: Optimizer) -> float | None:
    """That of the first group; ``None`` where it has none, or none that makes sense."""
    rate = float(optimizer.param_groups[0].get("lr", -1.0))
    return rate if representable(rate) and rate >= 0 else None


def as_epoch(epoch: object) -> int | None:
    """An epoch as the contract can tell it; ``None`` where it is no whole number from 0."""
    try:
        number = operator.index(epoch)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number if 0 <= number <= _MOST else None


@cache
def client_version() -> str:
    """The installed version, which takes reading files."""
    try:
        return version("esperml")
    except PackageNotFoundError:
        return "unknown"
