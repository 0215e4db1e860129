"""The rules that bound what a policy may do. docs/rules.md tells them to people who do not read code.

All but one are masks: they take choices away before the decision is drawn, so that the recorded probability is that of
the choice among what was really possible. Each is a small function of the situation that says what it takes and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esperml.tamiyo.columns import LAYER_MEASURES, Array
from esperml.tamiyo.view import LIVE_STAGES, StateView
from esperml.v1 import decision_pb2, graph_pb2, health_pb2

Bits = NDArray[np.uint64]
"""Blueprints at each place as bit masks, ``[P]``, as in ``PlaceTable.blueprints``."""

EVIDENCE: Final = (
    "activation_mean",
    "activation_variance",
    "dead_fraction",
    "effective_rank",
    "gradient_norm",
    "gradient_to_weight",
    "vanishing_fraction",
    "exploding_fraction",
    "expressivity_bottleneck",
)
"""Measures of which a layer needs at least one before it is judged. Sizes and times do not count: they say nothing of
how the layer trains."""
_EVIDENCE_ROWS: Final = [LAYER_MEASURES.index(name) for name in EVIDENCE]


@dataclass(frozen=True)
class Situation:
    """All that the rules look at.

    Attributes:
        view: the state, with all limits filled in. A mask that it brings is respected.
        vocabulary: blueprints that the policy knows; ``None`` where it takes any.
        health_threshold: layers healthier than this are left alone.
        paused: whether a person paused the run.
        embargo: places, by index, that must rest, each with the step at which they may be used again.
        waiting: places for which a command or a proposal is under way.
        reserved: parameters that those may take.
    """

    view: StateView
    vocabulary: Sequence[str] | None
    health_threshold: float
    paused: bool = False
    embargo: Mapping[int, int] = field(default_factory=dict)
    waiting: frozenset[int] = frozenset()
    reserved: int = 0

    @property
    def state(self) -> graph_pb2.ModelGraphState:
        """The message."""
        return self.view.state

    @property
    def health(self) -> Array:
        """Health of each layer, ``[N]``; NaN where not known."""
        return self.view.layers["health"]

    @property
    def targets(self) -> NDArray[np.int64]:
        """Target layer of each place, ``[P]``."""
        return self.view.place_target

    @cached_property
    def live(self) -> list[health_pb2.SeedSignal]:
        """Seeds that are planted and not settled."""
        return [seed for seed in self.state.seeds if seed.stage in LIVE_STAGES]

    @cached_property
    def parameters_left(self) -> int:
        """Parameters that further seeds may have together."""
        used = sum(seed.parameters for seed in self.state.seeds if seed.stage != health_pb2.SEED_STAGE_CULLED)
        return self.state.limits.parameter_budget - used - self.reserved

    @property
    def graft_budget(self) -> int:
        """Parameters that the next seed may have."""
        return min(self.state.limits.graft_parameter_budget, self.parameters_left)


@dataclass(frozen=True, slots=True)
class Removal:
    """What a rule takes away.

    Attributes:
        places: places at which it takes the blueprints of ``bits``, ``[P]``, bool.
        reason: why, with the figures.
        bits: the blueprints, all by default.
    """

    places: NDArray[np.bool_]
    reason: str
    bits: int = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Masked:
    """What is left.

    Attributes:
        mask: as it is recorded with the state.
        findings: rules that took something away.
    """

    mask: graph_pb2.ActionMask
    findings: list[decision_pb2.RuleFinding]


def _everywhere(situation: Situation, reason: str) -> Removal:
    return Removal(np.ones(len(situation.targets), dtype=np.bool_), reason)


def _at(situation: Situation, places: Sequence[int] | NDArray[np.int64], reason: str) -> Removal | None:
    if not len(places):
        return None
    taken = np.zeros(len(situation.targets), dtype=np.bool_)
    taken[list(places)] = True
    return Removal(taken, reason)


def paused(situation: Situation) -> Removal | None:
    """A person paused the run."""
    return _everywhere(situation, "the run is paused") if situation.paused else None


def warm_up(situation: Situation) -> Removal | None:
    """Early measures say little, and early gains would have come anyway."""
    step, warmup = situation.state.step, situation.state.limits.warmup_steps
    return _everywhere(situation, f"step {step} is before the end of warm-up at {warmup}") if step < warmup else None


def last_germination(situation: Situation) -> Removal | None:
    """What is planted too late cannot pay for itself."""
    limits, step = situation.state.limits, situation.state.step
    if not limits.HasField("last_germination_step") or step <= limits.last_germination_step:
        return None
    return _everywhere(situation, f"step {step} is after the last germination at {limits.last_germination_step}")


def live_seeds(situation: Situation) -> Removal | None:
    """Seeds that train at the same time blur each other's worth."""
    living, most = len(situation.live) + len(situation.waiting), situation.state.limits.max_live_seeds
    if living < most:
        return None
    return _everywhere(situation, f"{living} seeds live or are under way, and {most} may")


def parameter_budget(situation: Situation) -> Removal | None:
    """The run may not grow beyond its budget."""
    if situation.graft_budget >= 1:
        return None
    budget = situation.state.limits.parameter_budget
    return _everywhere(situation, f"{max(0, situation.parameters_left)} of {budget} parameters are left")


def caller_mask(situation: Situation) -> Removal | None:
    """The state itself says that nothing may be done."""
    state = situation.state
    if not state.HasField("mask") or state.mask.may_adapt:
        return None
    return _everywhere(situation, "the state's own mask allows nothing")


def occupied(situation: Situation) -> Removal | None:
    """One place holds one seed."""
    holding = {seed.place for seed in situation.state.seeds if seed.stage != health_pb2.SEED_STAGE_CULLED}
    taken = sorted(holding | situation.waiting)
    return _at(situation, taken, f"{len(taken)} places hold a seed or wait for one")


def embargo(situation: Situation) -> Removal | None:
    """What was just culled or refused would be again."""
    resting = {place: until for place, until in situation.embargo.items() if situation.state.step < until}
    if not resting:
        return None
    return _at(
        situation,
        sorted(resting),
        f"{len(resting)} places rest after a cull or a refusal, the first until step {min(resting.values())}",
    )


def unmeasured(situation: Situation) -> Removal | None:
    """A layer of which nothing is known cannot be judged."""
    known: NDArray[np.bool_] = np.any(situation.view.layer_table.known[_EVIDENCE_ROWS], axis=0)
    places = np.flatnonzero(~known[situation.targets])
    return _at(situation, places, f"{int((~known).sum())} layers have no measures yet")


def healthy(situation: Situation) -> Removal | None:
    """What is healthy is left alone."""
    threshold = situation.health_threshold
    # NaN compares false: a layer of unknown health is not taken for a healthy one.
    well = situation.health > threshold
    places = np.flatnonzero(well[situation.targets])
    return _at(situation, places, f"{int(well.sum())} layers are healthier than {threshold:g}")


def unknown_blueprint(situation: Situation) -> Removal | None:
    """A policy cannot judge what it was not trained on."""
    if situation.vocabulary is None:
        return None
    names = situation.state.graph.blueprints
    unknown = [name for name in names if name not in situation.vocabulary]
    if not unknown:
        return None
    bits = sum(1 << bit for bit, name in enumerate(names) if name in unknown)
    every = np.ones(len(situation.targets), dtype=np.bool_)
    return Removal(every, f"the policy does not know {', '.join(unknown)}", bits)


MASKS: Final[tuple[Callable[[Situation], Removal | None], ...]] = (
    paused,
    caller_mask,
    warm_up,
    last_germination,
    live_seeds,
    parameter_budget,
    occupied,
    embargo,
    unmeasured,
    healthy,
    unknown_blueprint,
)
"""Every masking rule, in the order in which they apply. A rule's name is its function's."""


def apply_masks(situation: Situation) -> Masked:
    """What the rules leave of what fits.

    Args:
        situation: of a state with P places.

    Returns:
        The mask, and a finding for each rule that took away what no rule before it had.
    """
    state = situation.state
    fits = state.mask.blueprints if state.HasField("mask") and state.mask.may_adapt else state.graph.places.blueprints
    bits: Bits = np.array(fits, dtype=np.uint64)
    findings = []
    for rule in MASKS:
        removal = rule(situation)
        if removal is None:
            continue
        left = np.where(removal.places, bits & ~np.uint64(removal.bits), bits)
        taken = int(np.bitwise_count(bits).sum()) - int(np.bitwise_count(left).sum())
        bits = left
        if taken:
            findings.append(
                decision_pb2.RuleFinding(
                    rule=rule.__name__,
                    effect=decision_pb2.RULE_EFFECT_MASKED,
                    reason=removal.reason,
                    choices_masked=taken,
                )
            )
    may_adapt = bool(bits.any())
    mask = graph_pb2.ActionMask(may_adapt=may_adapt, blueprints=bits.tolist() if may_adapt else [])
    return Masked(mask, findings)


def confidence(adapt_probability: float, threshold: float) -> decision_pb2.RuleFinding | None:
    """Hold back an adaptation of which the policy is not sure.

    The one rule that suppresses: it looks at the probability of adapting itself, not at that of the place or the
    blueprint, among which near ties are common and harmless.
    """
    if adapt_probability >= threshold:
        return None
    return decision_pb2.RuleFinding(
        rule="confidence",
        effect=decision_pb2.RULE_EFFECT_SUPPRESSED,
        reason=f"adapting is {adapt_probability:.2f} probable, less than the threshold of {threshold:g}",
    )
