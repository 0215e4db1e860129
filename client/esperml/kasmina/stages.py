"""The life of a seed: one table of transitions, each with the gate that guards it.

A seed walks ``dormant → germinated → blending → holding → fossilised`` and may be culled on the way; a culled place is
dormant again. The session moves a seed along the transitions marked automatic; the others need a command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from esperml.kasmina.errors import RefusedError
from esperml.v1 import health_pb2

Stage: TypeAlias = "health_pb2.SeedStage.ValueType"

DORMANT: Final = health_pb2.SEED_STAGE_DORMANT
GERMINATED: Final = health_pb2.SEED_STAGE_GERMINATED
BLENDING: Final = health_pb2.SEED_STAGE_BLENDING
HOLDING: Final = health_pb2.SEED_STAGE_HOLDING
FOSSILISED: Final = health_pb2.SEED_STAGE_FOSSILISED
CULLED: Final = health_pb2.SEED_STAGE_CULLED

LIVE: Final = frozenset({GERMINATED, BLENDING, HOLDING})
"""Stages in which a seed can still be culled."""


@dataclass(frozen=True, slots=True)
class SeedFacts:
    """What a gate may ask of a seed.

    Attributes:
        alpha: factor on the seed's output, 0 to 1.
        steps_in_stage: optimizer steps since the seed entered its stage.
    """

    alpha: float
    steps_in_stage: int


@dataclass(frozen=True, slots=True)
class Transition:
    """One way from a stage to another.

    Attributes:
        source: stage before.
        target: stage after.
        automatic: taken by the session as soon as the gate opens; otherwise on command.
        gate: what must hold, in words.
        opens: whether it holds.
    """

    source: Stage
    target: Stage
    automatic: bool
    gate: str
    opens: Callable[[SeedFacts], bool]


def _always(_facts: SeedFacts) -> bool:
    return True


def _has_trained(facts: SeedFacts) -> bool:
    return facts.steps_in_stage >= 1 and facts.alpha < 1


def _is_blended(facts: SeedFacts) -> bool:
    return facts.alpha >= 1


def _has_trained_blended(facts: SeedFacts) -> bool:
    return facts.steps_in_stage >= 1 and facts.alpha >= 1


TRANSITIONS: Final = (
    Transition(DORMANT, GERMINATED, False, "none", _always),
    Transition(GERMINATED, BLENDING, True, "one optimizer step, alpha below 1", _has_trained),
    Transition(GERMINATED, HOLDING, True, "one optimizer step, alpha at 1", _has_trained_blended),
    Transition(BLENDING, HOLDING, True, "alpha at 1", _is_blended),
    Transition(HOLDING, FOSSILISED, False, "alpha at 1", _is_blended),
    Transition(GERMINATED, CULLED, False, "none", _always),
    Transition(BLENDING, CULLED, False, "none", _always),
    Transition(HOLDING, CULLED, False, "none", _always),
    Transition(CULLED, DORMANT, True, "none", _always),
)
"""Every valid transition. What is not here is refused."""


def stage_name(stage: Stage) -> str:
    """The short name that people use: ``holding`` for ``SEED_STAGE_HOLDING``."""
    return health_pb2.SeedStage.Name(stage).removeprefix("SEED_STAGE_").lower()


def check(source: Stage, target: Stage, facts: SeedFacts) -> None:
    """Raise :class:`RefusedError`, naming the gate, unless a seed may go from ``source`` to ``target``."""
    for transition in TRANSITIONS:
        if (transition.source, transition.target) == (source, target):
            if not transition.opens(facts):
                raise RefusedError(
                    f"a seed goes from {stage_name(source)} to {stage_name(target)} only with {transition.gate}; "
                    f"it has alpha {facts.alpha:g} after {facts.steps_in_stage} steps"
                )
            return
    raise RefusedError(f"a seed cannot go from {stage_name(source)} to {stage_name(target)}")


def advance(source: Stage, facts: SeedFacts) -> Stage:
    """The stage after ``source`` by itself: that of the first automatic transition that opens, or ``source``."""
    for transition in TRANSITIONS:
        if transition.source == source and transition.automatic and transition.opens(facts):
            return transition.target
    return source
