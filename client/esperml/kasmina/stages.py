"""The life of a seed: one table of transitions, each with the gate that guards it.

A seed walks ``dormant → germinated → training → blending → holding → fossilised``; training is left out where no
command asked for it. It may be culled on the way, or rolled back, a fossil too; its place is then embargoed, and
dormant again in the end. Seeds have the stages from germinated to their end, empty places those before and after. The
session moves both along the transitions marked automatic; the others need a command, or a run that goes back to an
earlier moment.
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
TRAINING: Final = health_pb2.SEED_STAGE_TRAINING
BLENDING: Final = health_pb2.SEED_STAGE_BLENDING
HOLDING: Final = health_pb2.SEED_STAGE_HOLDING
FOSSILISED: Final = health_pb2.SEED_STAGE_FOSSILISED
CULLED: Final = health_pb2.SEED_STAGE_CULLED
EMBARGOED: Final = health_pb2.SEED_STAGE_EMBARGOED
ROLLED_BACK: Final = health_pb2.SEED_STAGE_ROLLED_BACK

LIVE: Final = frozenset({GERMINATED, TRAINING, BLENDING, HOLDING})
"""Stages in which a seed can still be culled."""


@dataclass(frozen=True, slots=True)
class SeedFacts:
    """What a gate may ask of a seed, or of an empty place.

    Attributes:
        alpha: factor on the seed's output, 0 to 1.
        steps_in_stage: optimizer steps since the seed, or the place, entered its stage.
        steps_to_train: optimizer steps that the seed still has to train before it blends in.
        steps_to_rest: optimizer steps that the place still has to rest.
    """

    alpha: float
    steps_in_stage: int
    steps_to_train: int = 0
    steps_to_rest: int = 0


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


def _is_to_train(facts: SeedFacts) -> bool:
    return facts.steps_in_stage >= 1 and facts.steps_to_train > 0


def _has_begun(facts: SeedFacts) -> bool:
    return facts.steps_in_stage >= 1 and facts.steps_to_train == 0 and facts.alpha < 1


def _has_begun_blended(facts: SeedFacts) -> bool:
    return facts.steps_in_stage >= 1 and facts.steps_to_train == 0 and facts.alpha >= 1


def _has_trained(facts: SeedFacts) -> bool:
    return facts.steps_to_train == 0 and facts.alpha < 1


def _has_trained_blended(facts: SeedFacts) -> bool:
    return facts.steps_to_train == 0 and facts.alpha >= 1


def _is_blended(facts: SeedFacts) -> bool:
    return facts.alpha >= 1


def _has_rested(facts: SeedFacts) -> bool:
    return facts.steps_to_rest == 0


TRANSITIONS: Final = (
    Transition(DORMANT, GERMINATED, False, "none", _always),
    Transition(GERMINATED, TRAINING, True, "one optimizer step, steps left to train", _is_to_train),
    Transition(GERMINATED, BLENDING, True, "one optimizer step, none left to train, alpha below 1", _has_begun),
    Transition(GERMINATED, HOLDING, True, "one optimizer step, none left to train, alpha at 1", _has_begun_blended),
    Transition(TRAINING, BLENDING, True, "no steps left to train, alpha below 1", _has_trained),
    Transition(TRAINING, HOLDING, True, "no steps left to train, alpha at 1", _has_trained_blended),
    Transition(BLENDING, HOLDING, True, "alpha at 1", _is_blended),
    Transition(HOLDING, FOSSILISED, False, "alpha at 1", _is_blended),
    *(Transition(stage, CULLED, False, "none", _always) for stage in sorted(LIVE)),
    *(Transition(stage, ROLLED_BACK, False, "none", _always) for stage in sorted(LIVE | {FOSSILISED})),
    Transition(CULLED, EMBARGOED, True, "none", _always),
    Transition(ROLLED_BACK, EMBARGOED, True, "none", _always),
    Transition(EMBARGOED, DORMANT, True, "no steps left to rest", _has_rested),
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
