"""Decisions for a caller: on the caller's state and terms, carried out nowhere."""

from __future__ import annotations

import math
import uuid
from typing import Final

import numpy as np

from esperml.contract import InvalidFieldError
from esperml.settings import TamiyoSettings
from esperml.tamiyo import limits
from esperml.tamiyo.engine import Options, Verdict, decide
from esperml.tamiyo.policies import Policy
from esperml.tamiyo.rules import Situation
from esperml.tamiyo.store import PolicyStore
from esperml.tamiyo.validate import check_state
from esperml.v1 import decision_pb2, graph_pb2, tamiyo_pb2

MAX_PLACES: Final = 16
"""Places that an answer lists."""


class FeatureVersionError(ValueError):
    """The caller counts on a feature version that the policy does not have.

    Attributes:
        wanted: what the caller counts on.
        given: what the policy has.
    """

    def __init__(self, wanted: int, given: int) -> None:
        super().__init__(f"options.feature_version: is {wanted}, but the policy has {given}")
        self.wanted = wanted
        self.given = given


def ask(
    policies: PolicyStore, settings: TamiyoSettings, state: graph_pb2.ModelGraphState, options: tamiyo_pb2.DecideOptions
) -> tuple[Policy, Verdict]:
    """Decide on a caller's state.

    Args:
        policies: who may decide.
        settings: for what the caller leaves open, the run's limits included.
        state: the state; it is taken over, and gets the limits and the mask that were respected.
        options: how.

    Returns:
        The policy that decided, and its verdict.

    Raises:
        InvalidFieldError: a field of the state or the options is missing or out of range.
        UnknownPolicyError: there is no policy of that name.
        CheckpointError: the shipped policy was asked for and cannot be loaded.
        FeatureVersionError: the policy reads other features than the caller counts on.
    """
    view = check_state(state)
    policy = policies.get(options.policy, "options.policy")
    if options.HasField("feature_version") and options.feature_version != policy.facts.feature_version:
        raise FeatureVersionError(options.feature_version, policy.facts.feature_version)
    parameters = max(1, int(view.specs.parameters.sum()))
    state.limits.CopyFrom(limits.resolve(state.limits, settings, parameters))
    situation = Situation(
        view=view,
        vocabulary=policy.facts.vocabulary,
        health_threshold=_threshold(options, "health_threshold", settings.health_threshold),
    )
    how = Options(
        sample=options.sample,
        confidence_threshold=_threshold(options, "confidence_threshold", settings.confidence_threshold),
        mode=decision_pb2.MODE_OBSERVE,
        ttl_steps=settings.command_ttl_steps,
    )
    generator = np.random.default_rng(options.random_seed if options.HasField("random_seed") else None)
    verdict = decide(situation, policy, how, uuid.uuid4().hex, generator)
    if not verdict.decision.disposition:
        verdict.decision.disposition = decision_pb2.DISPOSITION_SHADOWED
    return policy, verdict


def answer(policy: Policy, verdict: Verdict) -> tamiyo_pb2.DecideResponse:
    """The answer to a caller."""
    scores, graph = verdict.scores, verdict.state.graph
    into = np.bincount(
        np.array(graph.places.targets, dtype=np.int64), weights=scores.places, minlength=len(graph.layers)
    )
    column = {name: index for index, name in enumerate(verdict.blueprints)}
    best = np.argsort(-scores.places, kind="stable")[:MAX_PLACES]
    probabilities, blueprints = scores.places[best].tolist(), scores.blueprints[best].tolist()
    response = tamiyo_pb2.DecideResponse(
        decision=verdict.decision,
        adapt_probability=scores.adapt,
        places=[
            tamiyo_pb2.PlaceScore(
                place=place,
                probability=probability,
                blueprints=[given[column[name]] if name in column else 0.0 for name in graph.blueprints],
            )
            for place, probability, given in zip(best.tolist(), probabilities, blueprints, strict=True)
        ],
        layer_scores=into.tolist(),
        rules=verdict.decision.rules,
        policy=policy.facts.name,
        policy_version=policy.facts.version,
        timings=verdict.timings,
    )
    if scores.value is not None:
        response.value = scores.value
    return response


def describe(policy: Policy, *, is_default: bool) -> tamiyo_pb2.Policy:
    """A policy as the contract tells it."""
    facts = policy.facts
    described = tamiyo_pb2.Policy(
        name=facts.name,
        version=facts.version,
        kind=facts.kind,
        feature_version=facts.feature_version,
        blueprints=facts.vocabulary or (),
        parameters=facts.parameters,
        is_default=is_default,
        metrics=facts.metrics,
    )
    if facts.trained_at is not None:
        described.trained_at.FromDatetime(facts.trained_at)
    return described


def _threshold(options: tamiyo_pb2.DecideOptions, name: str, default: float) -> float:
    if not options.HasField(name):  # type: ignore[arg-type]
        return default
    value: float = getattr(options, name)
    if math.isnan(value) or not 0 <= value <= 1:
        raise InvalidFieldError(f"options.{name}", f"is {value:g}, outside [0, 1]")
    return value
