"""From a state to a decision: masks, policy, draw, suppression, and a reason that a person can read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esperml.tamiyo import rules
from esperml.tamiyo.policies import Policy, Scores
from esperml.tamiyo.rules import Situation
from esperml.v1 import decision_pb2, graph_pb2, tamiyo_pb2


@dataclass(frozen=True, slots=True)
class Options:
    """How to decide.

    Attributes:
        sample: draw from the policy's distribution rather than take the most probable.
        confidence_threshold: adaptations less probable than this are held back. It does not bind policies that always
            draw: their probabilities are set by hand and say nothing of how sure they are.
        mode: how far Tamiyo may go.
        ttl_steps: steps after which the decision expires; 0 means never.
    """

    sample: bool
    confidence_threshold: float
    mode: decision_pb2.Mode.ValueType
    ttl_steps: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and what it came from.

    Attributes:
        decision: with disposition NONE or SUPPRESSED, or unstated where it is to be carried out.
        state: the state with the mask that was respected.
        scores: the policy's distribution after masks.
        blueprints: names of the columns of ``scores.blueprints``.
        choice: place and blueprint (as columns of the scores) that were drawn; ``None`` for nothing.
        timings: where the time went.
    """

    decision: decision_pb2.AdaptationDecision
    state: graph_pb2.ModelGraphState
    scores: Scores
    blueprints: tuple[str, ...]
    choice: tuple[int, int] | None
    timings: tamiyo_pb2.Timings


def decide(
    situation: Situation, policy: Policy, options: Options, decision_id: str, generator: np.random.Generator
) -> Verdict:
    """Take a decision.

    Propensities are those of what was really done: after the masks, and for the most probable choice, which is taken
    with certainty, log-probability 0. ``confidence`` keeps what the policy itself gave it.

    Args:
        situation: what is known and what bounds it. Its state is taken over and given the mask that was respected.
        policy: who judges.
        options: how.
        decision_id: of the decision to be.
        generator: source of the draw. One number is used for each factor, whatever comes out.
    """
    started = time.perf_counter()
    masked = rules.apply_masks(situation)
    state = situation.state
    state.mask.CopyFrom(masked.mask)
    blueprints = tuple(state.graph.blueprints) if policy.facts.vocabulary is None else policy.facts.vocabulary
    scores = policy.judge(situation.view, blueprints)
    draws = options.sample or policy.facts.always_draws
    choice = _draw(scores, generator) if draws else _most_probable(scores)
    decision = decision_pb2.AdaptationDecision(
        decision_id=decision_id,
        run_id=state.run_id,
        step=state.step,
        structure_version=state.graph.structure_version,
        policy=policy.facts.name,
        policy_version=policy.facts.version,
        feature_version=policy.facts.feature_version,
        rules=masked.findings,
        mode=options.mode,
        propensity=_propensity(scores, choice, drawn=draws),
        confidence=scores.adapt if choice else 1.0 - scores.adapt,
    )
    if scores.value is not None:
        decision.value_estimate = scores.value
    if choice is None:
        decision.action.none.SetInParent()
        decision.disposition = decision_pb2.DISPOSITION_NONE
        decision.reason = _reason_for_nothing(scores, masked.findings)
    else:
        _germinate(decision, situation, scores, blueprints, choice, options)
        finding = None
        if not policy.facts.always_draws:
            finding = rules.confidence(scores.adapt, options.confidence_threshold)
        if finding:
            decision.rules.append(finding)
            decision.disposition = decision_pb2.DISPOSITION_SUPPRESSED
            decision.propensity.effective_none_probability = 1.0
            decision.reason = f"Held back, because {finding.reason}. It would have been: {decision.reason}"
    total = time.perf_counter() - started
    timings = tamiyo_pb2.Timings(
        features=scores.features_s,
        policy=scores.policy_s,
        rules=total - scores.features_s - scores.policy_s,
        total=total,
    )
    return Verdict(decision, state, scores, blueprints, choice, timings)


def _draw(scores: Scores, generator: np.random.Generator) -> tuple[int, int] | None:
    adapt, where, which = generator.random(3)
    if adapt >= scores.adapt:
        return None
    place = _pick(scores.places, where)
    return place, _pick(scores.blueprints[place], which)


def _pick(probabilities: np.ndarray[tuple[int], np.dtype[np.float64]], uniform: float) -> int:
    """The index at which the cumulative distribution passes ``uniform``; never one of probability zero."""
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # The product may round up to the last sum itself, and the index then runs past the end.
    return min(index, int(np.flatnonzero(probabilities)[-1]))


def _most_probable(scores: Scores) -> tuple[int, int] | None:
    if scores.adapt < 1.0 - scores.adapt:
        return None
    place = int(np.argmax(scores.places))
    return place, int(np.argmax(scores.blueprints[place]))


def _propensity(scores: Scores, choice: tuple[int, int] | None, *, drawn: bool) -> decision_pb2.Propensity:
    if not drawn:
        heads = (0.0,) if choice is None else (0.0, 0.0, 0.0)
        none = 1.0 if choice is None else 0.0
    elif choice is None:
        heads = (math.log1p(-scores.adapt),)
        none = 1.0 - scores.adapt
    else:
        place, blueprint = choice
        heads = (
            math.log(scores.adapt),
            math.log(scores.places[place]),
            math.log(scores.blueprints[place, blueprint]),
        )
        none = 1.0 - scores.adapt
    propensity = decision_pb2.Propensity(
        adapt_log_probability=heads[0], joint_log_probability=sum(heads), effective_none_probability=none
    )
    if len(heads) > 1:
        propensity.place_log_probability = heads[1]
        propensity.blueprint_log_probability = heads[2]
    return propensity


def _germinate(
    decision: decision_pb2.AdaptationDecision,
    situation: Situation,
    scores: Scores,
    blueprints: Sequence[str],
    choice: tuple[int, int],
    options: Options,
) -> None:
    state, (place, blueprint) = situation.state, choice
    source, target = state.graph.places.sources[place], state.graph.places.targets[place]
    decision.target.source_layer = state.graph.layers[source].name
    decision.target.target_layer = state.graph.layers[target].name
    germinate = decision.action.germinate
    germinate.blueprint = blueprints[blueprint]
    germinate.parameter_budget = situation.graft_budget
    germinate.blend_steps = state.limits.blend_steps
    if options.ttl_steps:
        decision.expires_after_step = state.step + options.ttl_steps
    set_urgency(decision, float(situation.health[target]))
    about = "not known" if math.isnan(situation.health[target]) else f"{situation.health[target]:.2f}"
    into = f"from the input of {decision.target.source_layer} into {decision.target.target_layer}"
    if source == target:
        into = f"beside {decision.target.target_layer}"
    where, which = scores.places[place], scores.blueprints[place, blueprint]
    decision.reason = (
        f"Grow {germinate.blueprint} of at most {germinate.parameter_budget} parameters {into}, "
        f"whose health is {about}: adapting is {scores.adapt:.2f} probable, this place {where:.2f} "
        f"among {int((scores.places > 0).sum())}, this blueprint {which:.2f} there."
    )


def set_urgency(decision: decision_pb2.AdaptationDecision, target_health: float) -> None:
    """Fill in urgency, and priority from it and the confidence, as far as they are known.

    Args:
        decision: its confidence may be set.
        target_health: health of the target layer, NaN where it is not known.
    """
    factors = [decision.confidence] if decision.HasField("confidence") else []
    if not math.isnan(target_health):
        decision.urgency = 1.0 - target_health
        factors.append(decision.urgency)
    if factors:
        decision.priority = math.prod(factors)


def _reason_for_nothing(scores: Scores, findings: Sequence[decision_pb2.RuleFinding]) -> str:
    if scores.places.any():
        return (
            f"Do nothing: adapting is {scores.adapt:.2f} probable, with {int((scores.places > 0).sum())} places open."
        )
    if not findings:
        return "Do nothing: the host has no place where a seed could grow."
    return f"Do nothing: no choice is left, because {'; '.join(finding.reason for finding in findings)}."
